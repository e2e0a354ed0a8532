"""How the forward kernels for Hopper are launched; `support.py` says when."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.triton.hopper import causal
from dilated_attention_pytorch.kernels.triton.hopper import forward as full
from dilated_attention_pytorch.kernels.triton.hopper.support import MAX_RATES, ROWS
from dilated_attention_pytorch.kernels.triton.hopper.views import column_strides, residue_views, stride_views
from dilated_attention_pytorch.kernels.triton.launch_aligned import alignment
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import AttentionOutput

# Two warpgroups with 240 registers a thread and a producer with 24 start with as many each.
OPTIONS = {"num_warps": 4, "maxnreg": 168}


class HopperConfig(NamedTuple):
    """How a kernel is cut.

    Attributes:
        block: rows of keys per step.
        stages: steps whose keys are in shared memory.
        q_registers: whether the queries' rows are kept in registers.
        pingpong: whether the warpgroups issue their products in turns.
    """

    block: int
    stages: int
    q_registers: bool
    pingpong: bool = False


# (head_dim, causal); the fastest of those that were measured on an H100 (shared memory holds no more stages).
_CONFIGS = {
    (64, False): HopperConfig(128, 4, False, True),
    (128, False): HopperConfig(128, 3, True, True),
    (64, True): HopperConfig(64, 8, True),
    (128, True): HopperConfig(64, 6, True),
}


def configs_for(work: Work) -> tuple[HopperConfig]:
    """The kernel's configuration."""
    return (_CONFIGS[work.x.q.shape[3], work.problem.is_causal],)


def forward(work: Work, tape: Tape, config: HopperConfig) -> AttentionOutput:
    """Out and lse by one launch, of one program per multiprocessor."""
    (q, k, v), plan = work.x, alignment(work)
    batch, n, heads, _ = q.shape
    out = tape.empty(q, q.shape)
    lse = tape.empty(q, (batch, heads, n), torch.float32)
    if work.problem.is_causal:
        kernel: Any = causal.hopper_forward_causal
        views = [v for x, rows in _blocks(work, config) for v in stride_views(x, plan.rates, rows, MAX_RATES)]
        # Segments of the shortest branch, the last as long as the others: what lies past the end is not written.
        count = triton.cdiv(n, plan.lengths[0])
        num_tiles = batch * heads * count * (plan.lengths[0] // ROWS)
        even = n % plan.lengths[0] == 0
        flags: dict[str, Any] = {}
    else:
        kernel = full.hopper_forward
        views = [view for x, rows in _blocks(work, config) for view in residue_views(x, plan.rate, rows)]
        count = triton.cdiv(triton.cdiv(n, plan.rate), ROWS)
        num_tiles = batch * heads * count * plan.rate
        even = n % (plan.rate * ROWS) == 0
        flags = {"PINGPONG": config.pingpong}
    # A scale of 0 becomes a tiny one: 0 times a logit of -inf is NaN.
    scale = max(work.logit_scale, 1e-30)
    sizes = n, heads, heads // k.shape[2], count, num_tiles
    args = (*views, out, lse, counter_of(q, tape), *column_strides(q, k, v), *sizes, scale)
    flags |= {
        "LENGTHS": plan.lengths, "RATES": plan.rates, "STAGES": config.stages, "EVEN": even,
        "Q_REGISTERS": config.q_registers, **OPTIONS,
    }  # fmt: skip
    # A short call has fewer tiles than there are multiprocessors.
    grid = (min(programs_on(q), num_tiles),)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return AttentionOutput(out, lse)


def _blocks(work: Work, config: HopperConfig) -> list[tuple[Tensor, int]]:
    """q, k and v, and how many rows of each are loaded at once."""
    q, k, v = work.x
    return [(q, ROWS // 2), (k, config.block), (v, config.block)]


def counter_of(x: Tensor, tape: Tape) -> Tensor:
    """What `tickets.py` counts with, one for each launch."""
    return tape.empty(x, (1,), torch.int32, fill=0)


def programs_on(x: Tensor) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
