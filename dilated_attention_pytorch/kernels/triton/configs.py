"""Tile shapes for the kernels. Measured on an H100; `device/try_kernels.py` shows how."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Config(NamedTuple):
    """How a kernel is cut.

    Attributes:
        block_m: rows of queries a tile.
        block_n: rows of keys a tile.
        num_warps: warps a program.
        num_stages: depth of the load pipeline.
        max_registers: cap on registers a thread, where more programs a multiprocessor are worth a spill.
        early: in dK/dV, issue the product dO V^T before the exponentials.
        descriptors: load through the copy engine (TMA) where the layout allows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    early: bool = False
    descriptors: bool = True


# (kernel, head_dim up to) -> candidates for 16-bit inputs, the best first; a later one fits shorter segments.
_HALF: dict[tuple[str, int], tuple[Config, ...]] = {
    ("aligned_forward", 64): (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    ("aligned_forward", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    ("aligned_dq", 64): (Config(128, 64, 4, 2), Config(64, 64, 4, 3)),
    ("aligned_dq", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    ("aligned_dkv", 64): (Config(64, 128, 8, 2, early=True), Config(64, 64, 4, 2, early=True)),
    ("aligned_dkv", 128): (Config(32, 128, 8, 2), Config(32, 64, 4, 2)),
    ("forward", 64): (Config(128, 64, 8, 3),),
    ("forward", 128): (Config(128, 64, 8, 3),),
    ("forward", 256): (Config(64, 32, 8, 2),),
    ("dq", 64): (Config(64, 64, 4, 3),),
    ("dq", 128): (Config(128, 64, 8, 2),),
    ("dq", 256): (Config(64, 32, 8, 2),),
    ("dkv", 64): (Config(64, 128, 8, 2),),
    ("dkv", 128): (Config(32, 128, 8, 2),),
    ("dkv", 256): (Config(32, 64, 8, 1),),
}
_SINGLE: dict[tuple[str, int], tuple[Config, ...]] = {
    ("forward", 64): (Config(64, 32, 4, 2),),
    ("forward", 128): (Config(64, 32, 8, 2),),
    ("forward", 256): (Config(32, 32, 8, 1),),
    ("dq", 64): (Config(64, 32, 4, 2),),
    ("dq", 128): (Config(64, 32, 8, 1),),
    ("dq", 256): (Config(32, 32, 8, 1),),
    ("dkv", 64): (Config(32, 64, 8, 2),),
    ("dkv", 128): (Config(32, 64, 8, 1),),
    ("dkv", 256): (Config(32, 32, 8, 1),),
}


def candidates(kernel: str, q: Tensor) -> tuple[Config, ...]:
    """Configurations for a kernel on tensors like q, the best first; none where the kernel is not for them."""
    if triton.knobs.runtime.interpret:
        return (Config(16, 16, 4, 1),)
    table = _SINGLE if q.dtype == torch.float32 else _HALF
    width = max(64, triton.next_power_of_2(q.shape[3]))
    return table.get((kernel, width), ())
