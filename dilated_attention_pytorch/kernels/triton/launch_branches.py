"""How the kernels of `attention.py` and `attention_backward.py` are launched: branch by branch, the densest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.kernels.triton import attention, attention_backward, configs, views
from dilated_attention_pytorch.kernels.triton.configs import Config, Direction
from dilated_attention_pytorch.kernels.triton.grids import Grid, dilation_rate, grid_of, slots_of
from dilated_attention_pytorch.kernels.triton.hopper import support as hopper
from dilated_attention_pytorch.kernels.triton.query_terms import QueryTerms, compute_delta, rows_by_slot
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.views import FLAT, NO_VIEWS, POINTERS, ViewPair, strides_of
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import QKV, AttentionOutput, OutputGradient

_KERNELS = {"forward": ("forward",), "backward": ("dq", "dkv")}


def configs_for(work: Work, direction: Direction) -> tuple[Config, ...]:
    """The best configuration of each kernel, with the one for short segments."""
    found = (configs.candidates(kernel, work.x.q, work.problem.is_causal) for kernel in _KERNELS[direction])
    return tuple(best._replace(short=others[-1]) if others else best for best, *others in found)


def forward(work: Work, tape: Tape, config: Config, branches: Sequence[int] | None = None) -> AttentionOutput:
    """Out and lse; of some branches alone where they are given."""
    (q, k, v), order = work.x, branches or work.problem.branch_order
    batch, n, heads, _ = q.shape
    # The densest branch writes every row when its rate is 1 and no row lies outside the range: then nothing is filled.
    covered = _covers_all(work, order[0])
    out = tape.empty(q, q.shape, fill=None if covered else 0.0)
    lse = tape.empty(q, (batch, heads, n), torch.float32, fill=None if covered else -torch.inf)
    if out.numel() == 0:
        return AttentionOutput(out, lse)
    # Each launch continues the softmax from the (out, lse) that it finds.
    for branch in order:
        first = covered and branch == order[0]
        if not hopper.why_not_branch(work, None, branch, "forward"):
            _of_hopper().forward(work, tape, branch, AttentionOutput(out, lse), not first)
            continue
        cut = config.at(slots_of(work.problem, branch))
        grid = grid_of(work, branch, cut, by_keys=False)
        pair = _views(work, k, v, branch, cut, cut.block_n)
        # A scale of 0 becomes a tiny one: 0 times a logit of -inf is NaN.
        args = (
            q, k, v, pair.a, pair.b, out, lse, *_masks(work, grid),
            *strides_of(q, k, v, out), *lse.stride()[:2], _mask_stride(work), *_sizes(work, branch, grid),
            max(abs(work.logit_scale), 1e-30), *_dropout(work),
        )  # fmt: skip
        flags = _flags(work, grid, cut) | {
            "FIRST": first, "NEGATE": work.problem.scale < 0, "VIEW": pair.kind,
            "EVEN": not grid.joined and _whole_tiles(work, k, branch, cut),
        }  # fmt: skip
        kernel, programs = attention.branch_forward, (grid.programs * heads,)
        tape.note(kernel, programs, args, flags, kernel[programs](*args, **flags))
    return AttentionOutput(out, lse)


def backward(
    work: Work, grad: OutputGradient, saved: AttentionOutput, tape: Tape, dq_config: Config, dkv_config: Config
) -> QKV:
    """dq, dk and dv."""
    if work.x.q.numel() == 0 or work.x.k.numel() == 0:
        return QKV(*(tape.empty(y, y.shape, fill=0.0) for y in work.x))
    # Given delta and the lse of all branches, each branch's share stands alone: dq and dk, dv may follow each other.
    terms = QueryTerms(grad.out, saved.lse, compute_delta(work, grad, saved, tape))
    dq = backward_dq(work, terms, tape, dq_config)
    return QKV(dq, *backward_dkv(work, terms, tape, dkv_config))


def backward_dq(
    work: Work, terms: QueryTerms, tape: Tape, config: Config, branches: Sequence[int] | None = None
) -> Tensor:
    """dq; of some branches alone where they are given."""
    (q, k, v), order = work.x, branches or work.problem.branch_order
    covered = _covers_all(work, order[0])
    dq = tape.empty(q, q.shape, fill=None if covered else 0.0)
    for branch in order:
        first = covered and branch == order[0]
        if not hopper.why_not_branch(work, terms.grad, branch, "dq"):
            _of_hopper().backward_dq(work, terms, tape, branch, dq, not first)
            continue
        cut = config.at(slots_of(work.problem, branch))
        grid = grid_of(work, branch, cut, by_keys=False)
        pair = _views(work, k, v, branch, cut, cut.block_n)
        args = (
            q, k, v, pair.a, pair.b, *terms, dq, *_masks(work, grid), *strides_of(q, k, v, terms.grad, dq),
            *terms.lse.stride()[:2], _mask_stride(work), *_sizes(work, branch, grid),
            work.logit_scale, work.problem.scale, *_dropout(work),
        )  # fmt: skip
        flags = _flags(work, grid, cut) | {
            "FIRST": first, "VIEW": pair.kind,
            "EVEN": not grid.joined and _whole_tiles(work, k, branch, cut),
        }  # fmt: skip
        kernel, programs = attention_backward.branch_backward_dq, (grid.programs * q.shape[2],)
        tape.note(kernel, programs, args, flags, kernel[programs](*args, **flags))
    return dq


def backward_dkv(
    work: Work, terms: QueryTerms, tape: Tape, config: Config, branches: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """dk and dv; of some branches alone where they are given."""
    (q, k, v), order = work.x, branches or work.problem.branch_order
    batch, n, *_ = q.shape
    covered = _covers_all(work, order[0])
    dk, dv = (tape.empty(y, y.shape, fill=None if covered else 0.0) for y in (k, v))
    for branch in order:
        first = covered and branch == order[0]
        if not hopper.why_not_branch(work, terms.grad, branch, "dkv"):
            _of_hopper().backward_dkv(work, terms, tape, branch, (dk, dv), not first)
            continue
        cut = config.at(slots_of(work.problem, branch))
        grid = grid_of(work, branch, cut, by_keys=True)
        pair = _views(work, q, terms.grad, branch, cut, cut.block_m)
        slots, rows = 0, None
        if pair.kind != POINTERS:
            slots = triton.cdiv(grid.length, grid.rate * cut.block_m) * cut.block_m
            # Where segments are much shorter than a tile, filling them up would take more memory than the queries.
            if grid.num_segments * slots > max(2 * n, 4096):
                pair = NO_VIEWS
            else:
                rows = rows_by_slot(work, terms, tape, grid.length, grid.rate, slots)
                rows = TensorDescriptor(rows, [rows.shape[0], rows.shape[1]], [rows.shape[1], 1], [1, cut.block_m])
        args: tuple[Any, ...] = (
            q, k, v, pair.a, pair.b, rows, terms.grad, terms.lse, terms.delta, dk, dv, *_masks(work, grid),
            *strides_of(q, k, v, terms.grad, dk), *terms.lse.stride()[:2], _mask_stride(work), batch, slots,
            *_sizes(work, branch, grid), work.logit_scale, work.problem.scale, *_dropout(work),
        )  # fmt: skip
        flags = _flags(work, grid, cut) | {
            "FIRST": first, "VIEW": pair.kind, "EARLY": cut.early
        }  # fmt: skip
        kernel, programs = attention_backward.branch_backward_dkv, (grid.programs * k.shape[2],)
        tape.note(kernel, programs, args, flags, kernel[programs](*args, **flags))
        # Free the rows before the next branch allocates its own.
        del args, rows
    return dk, dv


def _of_hopper() -> ModuleType:
    """Gluon is imported where it is used."""
    from dilated_attention_pytorch.kernels.triton.hopper import launch_branch

    return launch_branch


def _covers_all(work: Work, branch: int) -> bool:
    """Whether every row is a slot of the branch, so that its launch writes all of them: no fill, nothing to add to."""
    packed = work.masks.row_start is not None or work.masks.cu_seqlens is not None
    return work.problem.pattern.dilation_rates[branch] == 1 and not packed


def _is_whole(work: Work, walked: Tensor) -> bool:
    """Whether queries and the tensor walked over are the whole of one sequence per row of the batch."""
    q, problem, masks = work.x.q, work.problem, work.masks
    alone = masks.row_start is None and masks.cu_seqlens is None and problem.padding == "none"
    return alone and problem.q_start == 0 and q.shape[1] == walked.shape[1] == problem.seq_len


def _whole_tiles(work: Work, walked: Tensor, branch: int, config: Config) -> bool:
    """Whether every tile of the branch is whole."""
    n, rate = work.problem.seq_len, dilation_rate(work.problem, branch)
    length = min(work.problem.pattern.segment_lengths[branch], n)
    tiles = all(size % (rate * tile) == 0 for size in (n, length) for tile in (config.block_m, config.block_n))
    return _is_whole(work, walked) and tiles and work.block_d == work.x.q.shape[3]


def _views(work: Work, a: Tensor, b: Tensor, branch: int, config: Config, rows: int) -> ViewPair:
    """The views through which the copy engine loads a and b along a branch."""
    rate = dilation_rate(work.problem, branch)
    if not _is_whole(work, a) or not config.descriptors:
        return NO_VIEWS
    if _whole_tiles(work, a, branch, config):
        pair = views.flat_views(a, b, rate, rows)
        if pair.kind == FLAT:
            return pair
    return views.strided_views(a, b, rate, rows, work.block_d)


def _masks(work: Work, grid: Grid) -> tuple[Tensor | None, ...]:
    key_mask, row_start, cu_seqlens, seed = work.masks
    return key_mask, row_start, cu_seqlens, grid.tile_ends, seed


def _mask_stride(work: Work) -> int:
    return 0 if work.masks.key_padding is None else work.masks.key_padding.stride(0)


def _sizes(work: Work, branch: int, grid: Grid) -> tuple[int, ...]:
    (q, k, _), problem = work.x, work.problem
    return (
        q.shape[2], k.shape[2], q.shape[1], k.shape[1], problem.q_start, problem.k_start,
        grid.length, grid.rate, branch,
        grid.num_sequences, grid.num_segments, grid.num_tiles, q.shape[1] // grid.rate, grid.slots_each,
    )  # fmt: skip


def _dropout(work: Work) -> tuple[int, float]:
    """The 32-bit hash below which a weight is dropped, and the factor on those kept."""
    p = work.problem.dropout_p
    return int(p * 2**32), 1.0 / (1.0 - p)


def _flags(work: Work, grid: Grid, config: Config) -> dict[str, Any]:
    packed = work.masks.cu_seqlens is not None
    return {
        "D": work.x.q.shape[3], "BLOCK_D": work.block_d, "MODULO": work.problem.pattern.offsets == "modulo",
        "CAUSAL": work.problem.is_causal, "ZERO_KEYS": work.problem.padding == "zero_keys",
        "SEARCH_STEPS": math.ceil(math.log2(grid.num_sequences + 1)) if packed else 0,
        "PRECISION": work.precision, "JOINED": grid.joined, **config.flags,
    }  # fmt: skip
