"""How the kernels for one branch on Hopper are launched; `support.why_not_branch` says when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.triton.grids import dilation_rate, segment_length, slots_of
from dilated_attention_pytorch.kernels.triton.hopper import launch
from dilated_attention_pytorch.kernels.triton.hopper.branch_backward import hopper_branch_backward
from dilated_attention_pytorch.kernels.triton.hopper.branch_forward import hopper_branch_forward
from dilated_attention_pytorch.kernels.triton.hopper.launch_backward import BackwardConfig, flat
from dilated_attention_pytorch.kernels.triton.hopper.support import ROWS
from dilated_attention_pytorch.kernels.triton.hopper.views import column_strides, unit_views
from dilated_attention_pytorch.kernels.triton.query_terms import QueryTerms, rows_by_slot
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.views import Strides
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import AttentionOutput


class BranchConfig(NamedTuple):
    """How a forward kernel is cut: rows of a block of keys, stages, whether two warpgroups issue their products in
    turns, and warpgroups of a tile."""

    block: int
    stages: int
    pingpong: bool = False
    groups: int = 2


# (columns of a tile, causal) -> configurations, of which `launch.fitting` chooses.
_FORWARD: dict[tuple[int, bool], tuple[BranchConfig, ...]] = {
    (64, False): (BranchConfig(128, 4, pingpong=True), BranchConfig(128, 5, groups=3)),
    (64, True): (BranchConfig(64, 8), BranchConfig(64, 8, groups=3)),
    (128, False): (BranchConfig(128, 3, pingpong=True),),
    (128, True): (BranchConfig(128, 3),),
    (256, False): (BranchConfig(64, 2),),
    (256, True): (BranchConfig(64, 2),),
}
# Columns of a tile -> dQ's and, where `support.why_not_branch` lets it be, dK, dV's.
_BACKWARD: dict[int, tuple[BackwardConfig, ...]] = {
    64: (BackwardConfig(128, 3), BackwardConfig(64, 3, True)),
    128: (BackwardConfig(128, 2), BackwardConfig(64, 2)),
    256: (BackwardConfig(32, 3),),
}


def forward(work: Work, tape: Tape, branch: int, result: AttentionOutput, add: bool) -> None:
    """A branch's out and lse, stored or merged into the result."""
    q, k, v = work.x
    block, num_stages, pingpong, groups = config_of(work, branch)
    views, strides = _views(work, branch, ((q, launch.GROUP), (k, block), (v, block)))
    sizes = _sizes(work, branch, q, groups * launch.GROUP)
    # A scale of 0 becomes a tiny one: 0 times a logit of -inf is NaN.
    args = (*views, *result, *strides, *sizes, max(work.logit_scale, 1e-30))
    flags = _flags(work) | {"ADD": add, "STAGES": num_stages, "PINGPONG": pingpong, "GROUPS": groups}
    flags |= launch.options(groups)
    _launch(tape, hopper_branch_forward, min(launch.programs_on(q), sizes[0]), args, flags)


def config_of(work: Work, branch: int) -> BranchConfig:
    """The configuration of a branch's forward."""
    return launch.fitting(_FORWARD[work.block_d, work.problem.is_causal], slots_of(work.problem, branch))


def backward_dq(work: Work, terms: QueryTerms, tape: Tape, branch: int, dq: Tensor, add: bool) -> None:
    """A branch's share of dq, stored or added."""
    q, k, v = work.x
    _backward(work, (q, terms.grad, k, v), terms, tape, branch, (dq,), add)


def backward_dkv(
    work: Work, terms: QueryTerms, tape: Tape, branch: int, grads: tuple[Tensor, Tensor], add: bool
) -> None:
    """A branch's share of dk and dv, stored or added."""
    q, k, v = work.x
    _backward(work, (k, v, q, terms.grad), terms, tape, branch, grads, add)


def _backward(
    work: Work, pairs: tuple[Tensor, Tensor, Tensor, Tensor], terms: QueryTerms, tape: Tape, branch: int,
    grads: Sequence[Tensor], add: bool,
) -> None:  # fmt: skip
    """The stationary and the streamed pair to the former's gradients."""
    a1, a2, b1, b2 = pairs
    config = _BACKWARD[work.block_d][len(grads) - 1]
    block = config.block
    views, strides = _views(work, branch, ((a1, ROWS // 2), (a2, ROWS // 2), (b1, block), (b2, block)))
    length, rate = segment_length(work.problem, branch), dilation_rate(work.problem, branch)
    # Filled up to whole tiles, so that no block of terms straddles two segments.
    slots = triton.cdiv(slots_of(work.problem, branch), ROWS) * ROWS
    rows = rows_by_slot(work, terms, tape, length, rate, slots)
    sizes = _sizes(work, branch, a1)
    args = (
        *views, flat(rows, block), rows, grads[0], grads[-1], *strides, *column_strides(grads[0]), *sizes, slots,
        work.logit_scale, work.problem.scale,
    )  # fmt: skip
    flags = _flags(work) | {
        "DKV": len(grads) == 2, "ADD": add, "STAGES": config.stages,
        # Products over some of a tile's columns find the pair in shared memory.
        "REGISTERS": config.registers and a1.shape[3] == work.block_d,
    }  # fmt: skip
    _launch(tape, hopper_branch_backward, min(launch.programs_on(a1), sizes[0]), args, flags)


def _views(work: Work, branch: int, blocks: Sequence[tuple[Tensor, int]]) -> tuple[list[Any], list[Strides]]:
    """The views of tensors in blocks of so many rows, and strides in their units."""
    rate = dilation_rate(work.problem, branch)
    found = [unit_views(x, rate, rows, work.block_d) for x, rows in blocks]
    return [view for every, longer, _ in found for view in (every, longer)], [strides for *_, strides in found]


def _sizes(work: Work, branch: int, tiled: Tensor, rows: int = ROWS) -> tuple[int, ...]:
    """Number of tiles, and what `branch_tiles.tile_of` knows; tiles are of this tensor's rows."""
    (q, k, _), problem = work.x, work.problem
    batch, n, heads, _ = q.shape
    length = segment_length(problem, branch)
    num_segments, tiles_each = triton.cdiv(n, length), triton.cdiv(slots_of(problem, branch), rows)
    num_tiles = batch * tiled.shape[2] * num_segments * tiles_each
    sizes = batch, heads, heads // k.shape[2], num_segments, tiles_each, length, dilation_rate(problem, branch), n
    return num_tiles, *sizes


def _flags(work: Work) -> dict[str, Any]:
    modulo = work.problem.pattern.offsets == "modulo"
    return {"CAUSAL": work.problem.is_causal, "MODULO": modulo, "WIDTH": work.x.q.shape[3], **launch.options()}


def _launch(tape: Tape, kernel: Any, programs: int, args: tuple[Any, ...], flags: dict[str, Any]) -> None:
    tape.note(kernel, (programs,), args, flags, kernel[(programs,)](*args, **flags))
