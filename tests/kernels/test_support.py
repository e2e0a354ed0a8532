"""The support matrix of docs/backends.md, tried cell by cell."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels.triton import support
from dilated_attention_pytorch.types import QKV

DOCS = Path(__file__).parents[2] / "docs"


def load_matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support", DOCS / "support.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support"] = module
    spec.loader.exec_module(module)
    return module


MATRIX = load_matrix()


def page_rows() -> dict[str, list[str]]:
    text = (DOCS / "backends.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- table: support -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert match
    _, _, *lines = match.group(1).strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def test_the_page_has_every_row() -> None:
    assert list(page_rows()) == [feature.name for feature in MATRIX.FEATURES], "run `make tables`"


@pytest.mark.parametrize("backend", MATRIX.BACKENDS)
@pytest.mark.parametrize("feature", MATRIX.FEATURES, ids=lambda f: f.name)
def test_cell(feature: Any, backend: str) -> None:
    if backend == "triton":
        import torch

        triton = pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("test_gpu.py tries the kernels themselves")
        if type(triton.language.cdiv).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported before its interpreter was switched on")
    told = page_rows()[feature.name][MATRIX.BACKENDS.index(backend)]
    assert MATRIX.cell(feature, backend) == told, "run `make tables`"


@pytest.mark.parametrize(
    ("head_dim", "capability", "n", "dropout_p", "slower"),
    [
        (128, (8, 0), 1 << 18, 0.0, False),
        (129, (8, 0), 1 << 18, 0.0, True),
        (256, (9, 0), 1 << 18, 0.0, False),
        (256, (8, 6), 1 << 16, 0.0, False),
        (256, (8, 6), 1 << 18, 0.1, False),
    ],
    ids=["narrow", "wide", "Hopper", "sdpa is bound by the host", "sdpa has no kernel of torch's"],
)
def test_auto_leaves_what_is_faster_elsewhere(
    head_dim: int,
    capability: tuple[int, int],
    n: int,
    dropout_p: float,
    slower: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, shape=(1, n, 1, head_dim), device=torch.device("cuda"))
    problem = replace(one_segment(n, n, 1, 1.0), dropout_p=dropout_p)
    reasons = support.why_not_unasked(QKV(q, q, q), problem)  # type: ignore[arg-type]
    assert [reason.partition(":")[0] for reason in reasons] == [f"head_dim {head_dim} is above 128"] * slower
