"""How the forward kernels for Hopper are launched; `support.py` says when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.triton.hopper import causal, tiles
from dilated_attention_pytorch.kernels.triton.hopper import forward as full
from dilated_attention_pytorch.kernels.triton.hopper.support import MAX_RATES, ROWS
from dilated_attention_pytorch.kernels.triton.hopper.views import column_strides, residue_views, stride_views
from dilated_attention_pytorch.kernels.triton.launch_aligned import alignment
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import AttentionOutput

GROUP = 64  # rows of a warpgroup


class HopperConfig(NamedTuple):
    """How a kernel is cut.

    Attributes:
        block: rows of keys per step.
        stages: steps whose keys are in shared memory.
        q_registers: whether the queries' rows are kept in registers.
        pingpong: whether two warpgroups issue their products in turns (without a causal mask).
        groups: warpgroups of a tile (3 only without one). Three hide each other's waits, and leave 160 registers a
            thread in place of 240.
    """

    block: int
    stages: int
    q_registers: bool
    pingpong: bool = False
    groups: int = 2


# (head_dim, causal) -> configurations, of which `fitting` chooses: the fastest of those that were measured on an H100
# or H200 (shared memory holds no more stages).
_CONFIGS = {
    (64, False): (HopperConfig(128, 4, False, True), HopperConfig(128, 5, False, groups=3)),
    (128, False): (HopperConfig(128, 3, True, True),),
    (64, True): (HopperConfig(64, 8, True),),
    (128, True): (HopperConfig(64, 6, True),),
}

Config = TypeVar("Config", bound=Any)


def configs_for(work: Work) -> tuple[HopperConfig]:
    """The kernel's configuration."""
    plan, n = alignment(work), work.x.q.shape[1]
    shortest = _covering(plan.lengths, n, plan.rate)[0]
    return (fitting(_CONFIGS[work.x.q.shape[3], work.problem.is_causal], shortest),)


def fitting(configs: Sequence[Config], rows: int) -> Config:
    """The fastest for segments of so many rows: three groups take 7% less time for a row, but a segment's last tile may
    have more groups than rows for them."""

    def time(config: Config) -> float:
        tile = config.groups * GROUP
        return triton.cdiv(rows, tile) * tile * (0.93 if config.groups == 3 else 1.0)

    return min(configs, key=time)


def forward(work: Work, tape: Tape, config: HopperConfig) -> AttentionOutput:
    """Out and lse by one launch, of one program per multiprocessor."""
    (q, k, v), plan = work.x, alignment(work)
    batch, n, heads, _ = q.shape
    out = tape.empty(q, q.shape)
    lse = tape.empty(q, (batch, heads, n), torch.float32)
    rates, lengths = plan.rates, plan.lengths
    rows = [(q, GROUP), (k, config.block), (v, config.block)]
    if work.problem.is_causal:
        assert config.groups == 2, config
        kernel: Any = causal.hopper_forward_causal
        views = [view for x, number in rows for view in stride_views(x, rates, number, MAX_RATES)]
        per = lengths[0] // ROWS
        flags: dict[str, Any] = {}
    else:
        kernel = full.hopper_forward
        views = [view for x, number in rows for view in residue_views(x, plan.rate, number)]
        lengths = _covering(lengths, n, plan.rate)
        per, _ = tiles.group_tiles(config.groups, GROUP, lengths, rates)
        flags = {"PINGPONG": config.pingpong, "GROUPS": config.groups}
    # Segments of the shortest branch, the last as long as the others: what lies past the end is not written.
    count = triton.cdiv(n, lengths[0])
    num_tiles, even = batch * heads * count * per, n % lengths[0] == 0
    # A scale of 0 becomes a tiny one: 0 times a logit of -inf is NaN.
    scale = max(work.logit_scale, 1e-30)
    sizes = n, heads, heads // k.shape[2], count, num_tiles
    args = (*views, out, lse, counter_of(q, tape), *column_strides(q, k, v), *sizes, scale)
    flags |= {
        "LENGTHS": lengths, "RATES": rates, "STAGES": config.stages, "EVEN": even,
        "Q_REGISTERS": config.q_registers, **options(config.groups),
    }  # fmt: skip
    # A short call has fewer tiles than there are multiprocessors.
    grid = (min(programs_on(q), num_tiles),)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return AttentionOutput(out, lse)


def options(groups: int = 2) -> dict[str, int]:
    """The first warpgroup's warps, and the registers that each thread starts with: two warpgroups with 240 and a
    producer with 24 share three times 168, three with 160 and one with 32 four times 128."""
    return {"num_warps": 4, "maxnreg": {2: 168, 3: 128}[groups]}


def _covering(lengths: tuple[int, ...], n: int, rate: int) -> tuple[int, ...]:
    """The lengths; where even the shortest is longer than the sequence, one that covers it, and that few sequences
    differ in: tiles are counted by segments."""
    if lengths[0] <= n:
        return lengths
    cover = rate * ROWS
    while cover < n:
        cover *= 2
    return (min(cover, lengths[0]),) * len(lengths)


def counter_of(x: Tensor, tape: Tape) -> Tensor:
    """What `tickets.py` counts with, one for each launch."""
    return tape.empty(x, (1,), torch.int32, fill=0)


def programs_on(x: Tensor) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
