"""A message shows what it was given through `core/messages.py`, which cuts it: no value is too long for one."""

import ast
import re
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import DilatedPattern, LongNetConfig, RingAttentionConfig, SlideEncoder
from dilated_attention_pytorch.cli.app import in_options
from dilated_attention_pytorch.core.messages import line, listed, quoted, shown
from dilated_attention_pytorch.kernels.hilbert import curve_order
from dilated_attention_pytorch.models.slide.attention import query_rows
from dilated_attention_pytorch.streaming import streamed_forward

PACKAGE = Path(__file__).parents[2] / "dilated_attention_pytorch"
LONG = "x" * 5000
# Lists of the user's, not the library's own constants, nor shapes.
LISTS = re.compile(r"(list|tuple)\((?![A-Z_]+\b|get_args|allowed\b|names\b|command\.|.*\.shape\b).*\)")


def written_out(tree: ast.AST) -> list[str]:
    """What a `raise` shows in full, by `!r` or as a list or tuple, but for names that Python asks a module for."""
    raised = [x for x in ast.walk(tree) if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call)]
    raised = [x for x in raised if ast.unparse(x.exc.func) not in ("AttributeError", "ModuleNotFoundError")]
    values = (x for one in raised for x in ast.walk(one) if isinstance(x, ast.FormattedValue))
    shown = [(ast.unparse(x.value), x.conversion == ord("r")) for x in values]
    return [text for text, by_repr in shown if LISTS.fullmatch(text) or (by_repr and not text.isupper())]


def test_no_error_shows_a_value_in_full():
    found = {
        str(path.relative_to(PACKAGE)): values
        for path in PACKAGE.rglob("*.py")
        if (values := written_out(ast.parse(path.read_text())))
    }
    assert found == {}
    assert written_out(ast.parse("raise ValueError(f'got {value!r} for {NAME!r}')")) == ["value"]
    lists = "raise ValueError(f'got {tuple(x)}, {list(x)}, {tuple(x.shape)}, {list(_ALL)}')"
    assert written_out(ast.parse(lists)) == ["tuple(x)", "list(x)"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: query_rows(LONG, 3),
        lambda: RingAttentionConfig(segment_lengths=[4], dilation_rates=[1], mode=LONG),
        lambda: LongNetConfig(positions=LONG),
        lambda: LongNetConfig.from_dict({LONG: 1}),
        lambda: SlideEncoder(depth=10**5000),
        lambda: curve_order("raster", grid=[10**5000, 2, 3, 4]),
        lambda: curve_order("raster", grid=[10**5000, 2]),
        lambda: DilatedPattern(range(1, 9999), (1,), 1),
        lambda: streamed_forward(*[torch.ones(1, 4, 1, 4)] * 3, **{LONG: 1}),
    ],
)
def test_long_values_are_cut(call):
    with pytest.raises((ValueError, TypeError), match="expected") as error:
        call()
    assert len(str(error.value)) < 700


def test_what_is_shown():
    assert quoted(LONG) == f"'{LONG[:199]}..." and shown(LONG) == f"str {quoted(LONG)}"
    assert quoted(10**5000) == "an int of 16610 bits" and quoted(Path("a/b")) == "a/b"
    assert quoted(torch.device("cuda:1")) == "cuda:1" and shown(torch.ones(2)) == "Tensor of torch.float32"
    assert listed(range(9)) == "0, 1, 2, 3, 4, and 4 more" and listed([LONG]) == f"{LONG[:200]}..."
    assert line(f"got {LONG} of\nmany") == f"got {LONG[:200]}... of many"


def test_a_command_cuts_what_it_was_given():
    """Options are shown as they were typed, without quotes."""
    assert in_options(f"expected no --time with classes, got {LONG}", "slide", "tune") == (
        f"expected no --time with classes, got {LONG[:200]}..."
    )
