"""The decoding kernel in Triton's interpreter against the reference, a position at a time."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read when Triton is imported
triton = pytest.importorskip("triton")

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import RotaryPositions, rotate
from dilated_attention_pytorch.kernels.decode_layout import DecodeLayout
from dilated_attention_pytorch.kernels.triton import launch_decode
from dilated_attention_pytorch.types import QKV

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32 sums of at most 60 terms, in another order, merged over splits: a few dozen roundings.
CLOSE = 5e-6


class Case(NamedTuple):
    """A layer, the positions to look at, and what stood before them."""

    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    prompt: int
    positions: tuple[int, ...]
    offsets: str = "modulo"
    pads: tuple[int, ...] = (0,)
    shift: int = 0


CASES = {
    "nested": Case((16, 64), (1, 4), 4, 4, 16, 40, (40, 47, 48, 63, 64, 65, 79, 128)),
    "blocked, grouped, padded": Case((16, 64), (1, 4), 8, 2, 16, 40, (63, 64, 71, 94), "blocked", (0, 7, 30)),
    "not nested": Case((6, 16, 40), (1, 2, 3), 4, 4, 8, 5, (5, 11, 40, 47, 48, 79, 80, 81), pads=(0, 3)),
    "a ring": Case((24, 30), (1, 1), 2, 2, 8, 50, (50, 59, 60, 71, 72, 89), pads=(0, 3)),
    "shifted": Case((16, 64), (1, 4), 4, 2, 16, 30, (30, 39, 40, 41, 55, 56, 103, 104), pads=(0, 9), shift=24),
    "shifted, a ring": Case((24, 30), (1, 1), 2, 2, 8, 50, (50, 52, 53, 64, 65, 89), shift=7),
    "no dense branch": Case((12, 50), (3, 4), 6, 6, 24, 0, (0, 1, 12, 49, 50, 60)),
    "a segment beyond the sequence": Case((16, 1 << 40), (1, 5), 4, 2, 24, 20, (20, 32, 77)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rotary", [True, False])
def test_each_position_equals_the_reference(name: str, rotary: bool) -> None:
    """The buffers hold NaN wherever nothing was written, so that nothing else may be read."""
    case = CASES[name]
    total, batch = case.positions[-1] + 1, len(case.pads)
    q = torch.randn(batch, total, case.heads, case.width, device=DEVICE)
    k, v = (torch.randn(batch, total, case.kv_heads, case.width, device=DEVICE) for _ in range(2))
    pads = torch.tensor(case.pads, device=DEVICE)
    own = torch.arange(total, device=DEVICE) - pads[:, None]
    positions = RotaryPositions(case.width)
    turned = positions.rotation(own, q.dtype)
    seen_q = rotate(q, turned.q_cos, turned.q_sin) if rotary else q
    seen_k = rotate(k, turned.k_cos, turned.k_sin) if rotary else k
    pattern = DilatedPattern(case.lengths, case.rates, case.kv_heads, case.offsets)  # type: ignore[arg-type]
    want = dilated_attention(
        seen_q, seen_k, v, segment_lengths=case.lengths, dilation_rates=case.rates, offsets=case.offsets,
        is_causal=True, row_start=pads, key_padding_mask=own >= 0, segment_shift=case.shift, backend="reference",
    )  # fmt: skip

    layout = DecodeLayout(pattern, total, case.shift)
    assert layout.compact == (not name.endswith("a ring"))
    buffers = tuple(torch.full((batch, case.kv_heads, layout.rows, case.width), torch.nan, device=DEVICE) for _ in "kv")
    write(layout, buffers, seen_k[:, : case.prompt], v[:, : case.prompt], own[:, : case.prompt])
    for n in range(case.prompt, total):
        if n not in case.positions:  # what the kernel would leave behind
            write(layout, buffers, seen_k[:, n : n + 1], v[:, n : n + 1], own[:, n : n + 1])
            continue
        new = QKV(*(x[:, n : n + 1] for x in (q, k, v)))
        rotation = positions.rotation(own[:, n : n + 1], q.dtype) if rotary else None
        out = launch_decode.step(new, rotation, own[:, n].contiguous(), buffers, layout, case.width**-0.5)
        assert (out[:, 0] - want[:, n]).abs().max() <= CLOSE, n


def write(layout: DecodeLayout, buffers: tuple[Tensor, ...], k: Tensor, v: Tensor, own: Tensor) -> None:
    if own.shape[1]:
        layout.write(buffers[0], k, own)
        layout.write(buffers[1], v, own)


def test_the_smaller_layout_is_taken() -> None:
    """The model of the benchmark: 6,144 rows in place of the 32,768 that a ring takes."""
    layout = DecodeLayout(DilatedPattern((2048, 8192, 32_768), (1, 4, 16), 16), 1 << 20)
    assert layout.compact and layout.rows == 2048 * 3
    assert DecodeLayout(layout.pattern, 100).rows == 100, "a short sequence needs its own length"


def test_a_distant_position_equals_a_near_one() -> None:
    """2^40 is a multiple of every length: the same keys are in sight, and int64 positions lose nothing."""
    layout = DecodeLayout(DilatedPattern((16, 64), (1, 4), 2), 64)
    x = QKV(*(torch.randn(1, 1, 2, 16, device=DEVICE) for _ in range(3)))
    k = torch.randn(1, 50, 2, 16, device=DEVICE)
    found = []
    for start in (0, 1 << 40):
        own = torch.arange(start, start + 50, device=DEVICE)[None]
        buffers = tuple(torch.full((1, 2, layout.rows, 16), torch.nan, device=DEVICE) for _ in "kv")
        write(layout, buffers, k, k, own)
        found.append(launch_decode.step(x, None, own[:, -1] + 1, buffers, layout, 0.25))
    assert torch.equal(*found)
