"""The linear layer of a decoding step in Triton's interpreter against torch's modules in fp64."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read when Triton is imported
pytest.importorskip("triton")

from dilated_attention_pytorch.kernels.triton.launch_linear import linear, tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("width", "columns"), [(32, 48), (100, 33), (1500, 20)])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_all_of_it_equals_the_modules(width: int, columns: int, activation: str | None) -> None:
    """Widths that no tile divides; means a hundred deviations from zero."""
    norm, layer = nn.LayerNorm(width, device=DEVICE), nn.Linear(width, columns, device=DEVICE)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-2, 2)
        x, residual = torch.randn(1, width, device=DEVICE) + 100, torch.randn(1, columns, device=DEVICE)
        given = (layer.weight, layer.bias)
        plain = linear(x - 100, *given)
        got = linear(x, *given, norm=norm, activation=activation, residual=residual)
        h = F.linear(F.layer_norm(x.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps),
                     *(y.double() for y in given))  # fmt: skip
        want = {None: h, "gelu": F.gelu(h), "relu": F.relu(h)}[activation] + residual
        # x has lost two digits before the norm sees it; sums of `width` products of about one.
        assert (got - want).abs().max() <= 2e-4
        assert (plain - F.linear((x - 100).double(), *(y.double() for y in given))).abs().max() <= 1e-5


def test_half_precision_is_rounded_as_modules_round() -> None:
    norm, layer = nn.LayerNorm(64, device=DEVICE).half(), nn.Linear(64, 40, bias=False, device=DEVICE).half()
    x = torch.randn(1, 64, device=DEVICE).half()
    with torch.no_grad():
        want = F.linear(norm(x).double(), layer.weight.double())
        # One rounding of the result, and entries of the norm that were rounded the other way.
        assert (linear(x, layer.weight, norm=norm) - want).abs().max() <= 2**-10 * want.abs().max()


def test_tiles() -> None:
    """One wave of programs where a layer is small."""
    assert tile(1024, 1024) == (8, 1024) and tile(32_000, 1024) == (32, 256) and tile(64, 48) == (8, 64)
