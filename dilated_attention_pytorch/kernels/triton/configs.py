"""Tile shapes for the kernels: `tuned` where a device was measured, a careful guess elsewhere.

What a program may take of shared memory, in bytes: 232,448 on Hopper and Blackwell's data-centre GPUs, 166,912 on the
A100 and Orin, 101,376 on every other GPU from 8.0 on (RTX 30 to 50, A10, A40, L4, L40).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.triton import tuned

Direction = Literal["forward", "backward"]


class Config(NamedTuple):
    """How a kernel is cut.

    Attributes:
        block_m: rows of queries per tile.
        block_n: rows of keys per tile.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
        early: in dK/dV, issue the product dO V^T before the exponentials.
        descriptors: load through the copy engine (TMA) where there is one and the layout allows it.
        short: what takes its place in a branch of few slots per segment; the general kernels ask by `at`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    early: bool = False
    descriptors: bool = True
    short: Config | None = None

    def at(self, slots: int) -> Config:
        """The configuration for a branch whose segments have so many slots."""
        return self.short if self.short is not None and slots <= SHORT_SEGMENT else self

    @property
    def flags(self) -> dict[str, int]:
        """The part that every launch is told."""
        return dict(BM=self.block_m, BN=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages)


# Segments of at most so many slots: programs of a few steps wait more than they compute, and small tiles, of which more
# fit side by side, are faster.
SHORT_SEGMENT = 512

# A causal forward on a q of at most so many elements is one launch over strided tiles. They waste more of the diagonal
# than tiles of consecutive slots, but one launch per branch does not fill the chip. Measured with 12 heads of 64:
# one launch takes 32 us against 73 at N=1024, 222 against 244 at 8192, 397 against 419 at 16384. Two backward launches
# stand for ten of three branches, which a host that trains a model layer by layer feels more than the device; measured
# is only that (docs/log.md, 2026-11-29).
SHORT_CAUSAL = {"forward": 12 * 64 * 16384, "backward": 12 * 64 * 8192}

# On a q of at most so many elements the forward loads through plain pointers: describing two views takes the host
# longer than the copy engine saves. 37 us per call against 45 to 68 at N=1024; from N=2048 on the device decides.
SHORT_FORWARD = 12 * 64 * 1024

# Kernel -> head_dim up to -> candidates, written as in `tuned`, for 16-bit inputs where that has none and for fp32.
_Table = dict[str, dict[int, list[tuple[Any, ...]]]]

# GPUs with Hopper's shared memory.
_HALF: _Table = {
    "aligned_forward": {64: [(128, 64, 4, 3), (64, 64, 4, 3)], 128: [(128, 64, 8, 3), (64, 64, 4, 2)]},
    "aligned_dq": {64: [(128, 64, 4, 2), (64, 64, 4, 3)], 128: [(128, 64, 8, 3), (64, 64, 4, 2)]},
    "aligned_dkv": {64: [(64, 128, 8, 2, "early"), (64, 64, 4, 2, "early")], 128: [(32, 128, 8, 2), (32, 64, 4, 2)]},
    "forward": {64: [(128, 64, 8, 3)], 128: [(128, 64, 8, 3)], 256: [(64, 32, 8, 2)]},
    "dq": {64: [(64, 64, 4, 3)], 128: [(128, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
    "dkv": {64: [(64, 128, 8, 2)], 128: [(32, 128, 8, 2)], 256: [(32, 64, 8, 1)]},
}
_SINGLE: _Table = {
    "forward": {64: [(64, 32, 4, 2)], 128: [(64, 32, 8, 2)], 256: [(32, 32, 8, 1)]},
    "dq": {64: [(64, 32, 4, 2)], 128: [(64, 32, 8, 1)], 256: [(32, 32, 8, 1)]},
    "dkv": {64: [(32, 64, 8, 2)], 128: [(32, 64, 8, 1)], 256: [(32, 32, 8, 1)]},
}

# All other GPUs: without a copy engine Triton spells descriptors out, at the price of the load pipeline
# and of up to thousands of spills. Chosen by compiling for sm_80 and sm_86, not measured: large tiles that fit 101,376
# bytes and spill nothing without masks and dropout (tests/kernels/test_triton_compile.py); fp32 above 128 always
# spills.
_SMALL_HALF: _Table = {
    "aligned_forward": {64: [(128, 64, 4, 3), (64, 64, 4, 3)], 128: [(128, 64, 8, 2), (64, 64, 4, 2)]},
    "aligned_dq": {64: [(128, 64, 8, 2), (64, 64, 4, 2)], 128: [(128, 32, 8, 2), (64, 32, 4, 2)]},
    "aligned_dkv": {64: [(32, 128, 8, 2), (32, 64, 4, 2, "early")], 128: [(64, 64, 8, 2), (32, 64, 8, 2)]},
    "forward": {64: [(128, 64, 8, 3)], 128: [(128, 32, 8, 2)], 256: [(64, 32, 8, 2)]},
    "dq": {64: [(128, 32, 8, 3)], 128: [(128, 32, 8, 2)], 256: [(64, 32, 8, 1)]},
    "dkv": {64: [(32, 64, 4, 1, "early")], 128: [(32, 64, 8, 2, "early")], 256: [(32, 32, 8, 2, "early")]},
}
_SMALL_SINGLE: _Table = {
    "forward": {64: [(32, 32, 4, 3)], 128: [(16, 32, 4, 1)], 256: [(16, 16, 8, 1)]},
    "dq": {64: [(32, 32, 4, 2)], 128: [(16, 32, 4, 1)], 256: [(16, 16, 8, 1)]},
    "dkv": {64: [(32, 32, 4, 1, "early")], 128: [(16, 16, 4, 1, "early")], 256: [(16, 16, 8, 1)]},
}


def architecture(q: Tensor) -> str:
    """The name by which the table of measured shapes knows the device."""
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"sm_{10 * major + minor}"
    return f"sm_{triton.runtime.driver.active.get_current_target().arch}"  # compiling for a GPU that is not there


def candidates(kernel: str, q: Tensor, is_causal: bool = False) -> tuple[Config, ...]:
    """Configurations for a kernel on tensors like q, the best first; none where the kernel is not for them."""
    if triton.knobs.runtime.interpret:
        return (Config(16, 16, 4, 1),)
    width, name = max(64, triton.next_power_of_2(q.shape[3])), architecture(q)
    large = 90 <= int(name.removeprefix("sm_")) < 120
    if q.dtype == torch.float32:
        table, measured = (_SINGLE if large else _SMALL_SINGLE), None
    else:
        rows_of = {up_to: tuned.TABLE.get((name, kernel, up_to, is_causal)) for up_to in tuned.WIDTHS}
        measured = next((rows for up_to, rows in rows_of.items() if q.shape[3] <= up_to and rows), None)
        table = _HALF if large else _SMALL_HALF
    rows = table.get(kernel, {}).get(width, ()) if measured is None else measured
    return tuple(Config(row[0], row[1], row[2], row[3], "early" in row, large) for row in rows)
