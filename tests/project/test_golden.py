"""FLOPs, bytes, launches, calls and allocations are those of tests/golden.json; registers: test_triton_compile.py."""

from __future__ import annotations

import json
from collections.abc import Callable

import golden
import pytest

KEPT = json.loads(golden.FILE.read_text(encoding="utf-8"))
RENEW = "if the change is meant: python tests/golden.py --write"


def other_versions(part: str) -> list[str]:
    now = golden.versions()
    return [name for name in golden.DEPENDS[part] if now[name] != KEPT["versions"][name]]


@pytest.mark.parametrize(
    ("part", "measure"),
    [("flops", golden.flops), ("bytes", golden.bytes_), ("cpu calls", golden.cpu_calls), ("launches", golden.launches)],
)
def test_figures_are_as_committed(part: str, measure: Callable[[], dict[str, int]]) -> None:
    if found := other_versions(part):
        pytest.skip(f"the figures were taken with another {found}")
    if part == "launches":
        triton = pytest.importorskip("triton")
        if type(triton.language.cdiv).__name__ != "InterpretedFunction":
            pytest.skip("needs Triton's interpreter")
    changed = golden.differences(KEPT[part], measure())
    assert not changed, "\n".join([*changed, RENEW])


def test_a_difference_is_named() -> None:
    assert golden.differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [
        "b: 2 kept, 3 now",
        "c: nothing kept, 4 now",
    ]
    assert not golden.differences({"a": 1}, {"a": 1})
