"""The host side of the Triton backend: what to launch, with which configuration, in which order."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Repeat
from dilated_attention_pytorch.kernels.triton import attention, attention_backward, configs, launch_aligned, replay
from dilated_attention_pytorch.kernels.triton.configs import Config
from dilated_attention_pytorch.kernels.triton.grids import (
    Grid,
    Layout,
    dilation_rate,
    grid_of,
    layout_of,
    segment_length,
)
from dilated_attention_pytorch.kernels.triton.launch_aligned import Alignment, descriptor, strided_view
from dilated_attention_pytorch.kernels.triton.support import interpreting, why_not
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

__all__ = ["backward", "forward", "repeater", "why_not"]

_LOG2E = 1.4426950408889634


def forward(x: QKV, problem: Problem, masks: Masks = NO_MASKS) -> AttentionOutput:
    """Out in q's dtype and lse in fp32."""
    q = x.q
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return forward(x, problem, masks)
    if interpreting() and q.dtype == torch.bfloat16:  # tl.dot of bf16 is wrong there
        out, lse = forward(QKV(*(y.float() for y in x)), problem, masks)
        return AttentionOutput(out.bfloat16(), lse)
    q, k, v = (_rows_ready(y) for y in x)
    problem, masks = _rebased(problem, q, k, masks)
    layout = layout_of(q, masks)

    def record() -> tuple[Tensor, ...]:
        return _forward(q, k, v, problem, layout)

    if not _repeatable(q, k, layout):
        return AttentionOutput(*record())
    return AttentionOutput(*replay.call(("forward", problem), (q, k, v, layout.seed), record))


def repeater(x: QKV, problem: Problem) -> Repeat | None:
    """Launches a forward again that has no masks, on tensors of the same layout; None if it was not recorded."""
    problem = problem.rebased(x.q.shape[1], x.k.shape[1])
    tape = replay.tape_of(("forward", problem), (*x, None))
    return None if tape is None else lambda x: AttentionOutput(*tape.play((*x, None)))


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, layout: Layout) -> tuple[Tensor, Tensor]:
    short = q.numel() <= configs.SHORT_CAUSAL
    plan, (config,) = _aligned(("aligned_forward",), q, k, problem, layout, causal=short)
    if plan is not None:
        described = q.numel() > configs.SHORT_FORWARD
        return launch_aligned.forward(q, k, v, problem, plan, config, descriptors=described, precision=precision(q))
    branches = problem.branch_order
    # The densest branch writes every row when its rate is 1 and no row lies outside the range.
    writes_all = covers_all(problem, branches[0], layout)
    out = replay.empty(q, q.shape, fill=None if writes_all else 0.0)
    lse = replay.empty(q, (q.shape[0], q.shape[2], q.shape[1]), torch.float32, fill=None if writes_all else -torch.inf)
    if out.numel() == 0:
        return out, lse
    for rank, branch in enumerate(branches):
        config = configs.candidates("forward", q, problem.is_causal)[0]
        forward_branch(q, k, v, out, lse, problem, layout, branch, config, first=writes_all and rank == 0)
    return out, lse


def backward(grad: OutputGradient, x: QKV, saved: AttentionOutput, problem: Problem, masks: Masks = NO_MASKS) -> QKV:
    """Gradients of q, k and v in their dtypes, given what the forward returned."""
    if x.q.is_cuda and x.q.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.q.device):
            return backward(grad, x, saved, problem, masks)
    if interpreting() and x.q.dtype == torch.bfloat16:
        exact = OutputGradient(grad.out.float(), grad.lse), QKV(*(y.float() for y in x))
        grads = backward(*exact, AttentionOutput(saved.out.float(), saved.lse), problem, masks)
        return QKV(*(y.bfloat16() for y in grads))
    q, k, v, out, grad_out = (_rows_ready(y) for y in (*x, saved.out, grad.out))
    problem, masks = _rebased(problem, q, k, masks)
    layout = layout_of(q, masks)
    lse = saved.lse.contiguous()
    grad_lse = None if grad.lse is None else grad.lse.float().contiguous()

    def record() -> tuple[Tensor, ...]:
        return _backward(grad_out, grad_lse, q, k, v, out, lse, problem, layout)

    if not _repeatable(q, k, layout):
        return QKV(*record())
    inputs = (grad_out, grad_lse, q, k, v, out, lse, layout.seed)
    return QKV(*replay.call(("backward", problem), inputs, record))


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, (dq_config, dkv_config) = _aligned(("aligned_dq", "aligned_dkv"), q, k, problem, layout)
    if plan is not None:
        return launch_aligned.backward(
            grad_out, grad_lse, q, k, v, out, lse, problem, plan, dq_config, dkv_config, precision=precision(q)
        )
    branches = problem.branch_order
    writes_all = covers_all(problem, branches[0], layout)
    nothing = q.numel() == 0 or k.numel() == 0
    fill = None if writes_all and not nothing else 0.0
    dq, dk, dv = (replay.empty(x, x.shape, fill=fill) for x in (q, k, v))
    if nothing:
        return dq, dk, dv
    delta = compute_delta(out, grad_out, grad_lse)
    for rank, branch in enumerate(branches):
        config = configs.candidates("dq", q, problem.is_causal)[0]
        first = writes_all and rank == 0
        backward_branch_dq(grad_out, q, k, v, lse, delta, dq, problem, layout, branch, config, first=first)
        config = configs.candidates("dkv", q, problem.is_causal)[0]
        backward_branch_dkv(grad_out, q, k, v, lse, delta, dk, dv, problem, layout, branch, config, first=first)
    return dq, dk, dv


def forward_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    layout: Layout,
    branch: int,
    config: Config,
    *,
    first: bool,
) -> None:
    """Merges a branch into (out, lse), or writes it where it is the first."""
    grid = grid_of(problem, layout, branch, q.shape[0], q.shape[1], config.block_m, by_keys=False)
    even, view, k_view, v_view = _views(q, k, v, problem, layout, branch, config, config.block_n)
    _launch(
        attention.branch_forward,
        grid.programs * q.shape[2],
        config,
        q, k, v, k_view, v_view, out, lse, *_pointers(layout, grid),
        *_strides(q), *_strides(k), *_strides(v), *_strides(out), *lse.stride()[:2], _mask_stride(layout),
        *_sizes(q, k, problem, branch, grid), abs(problem.scale) * _LOG2E or 1e-30, *_dropout(problem),
        **_flags(q, problem, layout, grid, config), FIRST=first, NEGATE=problem.scale < 0,
        VIEW=view, EVEN=even,
    )  # fmt: skip


def compute_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`rowsum(out * grad_out) - grad_lse`, fp32 `(B, H, N)`."""
    batch, n, heads, width = out.shape
    delta = replay.empty(out, (batch, heads, n), torch.float32)
    rows = 64
    replay.launch(
        attention_backward.delta_kernel, (triton.cdiv(n, rows) * heads * batch,), out, grad_out, grad_lse, delta,
        *_strides(out), *_strides(grad_out), *delta.stride()[:2], n, heads,
        D=width, BLOCK_D=_block_d(out), BM=rows, GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta


def backward_branch_dq(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    problem: Problem,
    layout: Layout,
    branch: int,
    config: Config,
    *,
    first: bool,
) -> None:
    """Adds a branch's share to dq, or writes it where it is the first."""
    grid = grid_of(problem, layout, branch, q.shape[0], q.shape[1], config.block_m, by_keys=False)
    even, view, k_view, v_view = _views(q, k, v, problem, layout, branch, config, config.block_n)
    _launch(
        attention_backward.branch_backward_dq,
        grid.programs * q.shape[2],
        config,
        q, k, v, k_view, v_view, grad_out, lse, delta, dq, *_pointers(layout, grid),
        *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), *_strides(dq), *lse.stride()[:2],
        _mask_stride(layout), *_sizes(q, k, problem, branch, grid), problem.scale * _LOG2E,
        problem.scale, *_dropout(problem), **_flags(q, problem, layout, grid, config), FIRST=first,
        VIEW=view, EVEN=even,
    )  # fmt: skip


def backward_branch_dkv(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
    layout: Layout,
    branch: int,
    config: Config,
    *,
    first: bool,
) -> None:
    """Adds a branch's share to dk and dv, or writes it where it is the first."""
    batch, n, heads, _ = q.shape
    grid = grid_of(problem, layout, branch, k.shape[0], k.shape[1], config.block_n, by_keys=True)
    even, rank, q_view, grad_view = _views(q, q, grad_out, problem, layout, branch, config, config.block_m)
    # The descriptor below takes whole tiles, but only where the rows are whole tiles (`_views`).
    rate = dilation_rate(problem, branch)
    length = triton.cdiv(n, rate)
    terms = replay.empty(q, (2, batch, heads, rate, length), torch.float32)
    rows = 512
    replay.launch(
        attention_backward.terms_kernel, (triton.cdiv(n, rows) * batch * heads,), lse, delta, terms,
        n, rate, length, batch * heads, BM=rows,
    )  # fmt: skip
    if rank == 2:
        view = TensorDescriptor(terms, [2 * batch * heads * rate, length], [length, 1], [1, config.block_m])
    _launch(
        attention_backward.branch_backward_dkv,
        grid.programs * k.shape[2],
        config,
        q, k, v, q_view, grad_view, view if rank == 2 else terms, grad_out, dk, dv, *_pointers(layout, grid),
        *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), *_strides(dk),
        _mask_stride(layout), batch, length, *_sizes(q, k, problem, branch, grid), problem.scale * _LOG2E,
        problem.scale, *_dropout(problem), **_flags(q, problem, layout, grid, config), FIRST=first,
        VIEW=rank, EARLY=config.early, EVEN=even,
    )  # fmt: skip


def _rebased(problem: Problem, q: Tensor, k: Tensor, masks: Masks) -> tuple[Problem, Masks]:
    """The problem with positions counted from the range, where that changes nothing: only such ranges take the fast
    kernels, and ranges of one kind then share their launches."""
    if masks.row_start is not None:
        return problem, masks
    nearer = problem.rebased(q.shape[1], k.shape[1])
    if masks.key_padding is not None:
        start = problem.q_start - nearer.q_start
        masks = masks._replace(key_padding=masks.key_padding[:, start : start + nearer.seq_len])
    return nearer, masks


def _repeatable(q: Tensor, k: Tensor, layout: Layout) -> bool:
    """Whether the call's launches depend on its problem and the layout of its tensors alone."""
    packed = layout.key_mask is not None or layout.row_start is not None or layout.cu_seqlens is not None
    return not packed and q.numel() > 0 and k.numel() > 0


def _aligned(
    kernels: tuple[str, ...], q: Tensor, k: Tensor, problem: Problem, layout: Layout, *, causal: bool = False
) -> tuple[Alignment | None, list[Any]]:
    """How one launch can walk all branches, and with which configurations; None where it cannot."""
    nothing = None, [None] * len(kernels)
    if layout.key_mask is not None or layout.row_start is not None or layout.cu_seqlens is not None or q.numel() == 0:
        return nothing
    plan = launch_aligned.alignment(problem, q.shape[1], k.shape[1], causal=causal)
    if plan is None:
        return nothing
    chosen = []
    for kernel in kernels:
        fitting = [
            c for c in configs.candidates(kernel, q, problem.is_causal) if plan.fits(c.block_m) and plan.fits(c.block_n)
        ]
        # Among those, one whose tiles are not mostly empty on a short sequence.
        filled = [c for c in fitting if plan.filled(c.block_m, c.block_n)]
        if not filled:
            return nothing
        chosen.append(filled[0])
    return plan, chosen


def covers_all(problem: Problem, branch: int, layout: Layout) -> bool:
    """Whether every row of every tensor is a slot of the branch, so that its launch writes all of them."""
    return problem.pattern.dilation_rates[branch] == 1 and layout.row_start is None and layout.cu_seqlens is None


def _views(
    q: Tensor, a: Tensor, b: Tensor, problem: Problem, layout: Layout, branch: int, config: Config, rows: int
) -> tuple[bool, int, TensorDescriptor | None, TensorDescriptor | None]:
    """Whether every tile of the branch is whole, and the views through which the copy engine loads a and b, with
    their rank; rank 0 where it does not."""
    n, rate = problem.seq_len, dilation_rate(problem, branch)
    length = min(problem.pattern.segment_lengths[branch], n)
    whole = q.shape[1] == n and problem.q_start == 0 and layout.row_start is None and layout.cu_seqlens is None
    tiles = all(size % (rate * tile) == 0 for size in (n, length) for tile in (config.block_m, config.block_n))
    whole = whole and a.shape[1] == n and problem.padding == "none"
    even = whole and tiles and _block_d(q) == q.shape[3]
    if not whole or not config.descriptors:
        return even, 0, None, None
    views = descriptor(a, rate, rows), descriptor(b, rate, rows)
    if even and None not in views:
        return even, 2, *views
    views = strided_view(a, rate, rows, _block_d(q)), strided_view(b, rate, rows, _block_d(q))
    return (even, 5, *views) if None not in views else (even, 0, None, None)


def _pointers(layout: Layout, grid: Grid) -> tuple[Tensor | None, ...]:
    return layout.key_mask, layout.row_start, layout.cu_seqlens, grid.tile_ends, layout.seed


def _sizes(q: Tensor, k: Tensor, problem: Problem, branch: int, grid: Grid) -> tuple[int, ...]:
    return (
        q.shape[2], k.shape[2], q.shape[1], k.shape[1], problem.q_start, problem.k_start,
        segment_length(problem, branch), dilation_rate(problem, branch), branch,
        grid.num_sequences, grid.num_segments, grid.num_tiles, q.shape[1] // dilation_rate(problem, branch),
    )  # fmt: skip


def _dropout(problem: Problem) -> tuple[int, float]:
    return int(problem.dropout_p * 2**32), 1.0 / (1.0 - problem.dropout_p)


def _flags(q: Tensor, problem: Problem, layout: Layout, grid: Grid, config: Config) -> dict[str, Any]:
    return {
        "D": q.shape[3],
        "BLOCK_D": _block_d(q),
        "BM": config.block_m,
        "BN": config.block_n,
        "MODULO": problem.pattern.offsets == "modulo",
        "CAUSAL": problem.is_causal,
        "PACKED": layout.cu_seqlens is not None,
        "ROW_START": layout.row_start is not None,
        "KEY_MASK": layout.key_mask is not None,
        "DROPOUT": layout.seed is not None and problem.dropout_p > 0.0,
        "ZERO_KEYS": problem.padding == "zero_keys",
        "SEARCH_STEPS": math.ceil(math.log2(grid.num_sequences + 1)) if layout.cu_seqlens is not None else 0,
        "PRECISION": precision(q),
    }


def precision(q: Tensor) -> str:
    """How fp32 products are computed: three tf32 products keep fp32's accuracy on the tensor cores."""
    return "ieee" if q.dtype != torch.float32 or interpreting() else "tf32x3"


def _launch(kernel: Any, programs: int, config: Config, *args: Any, **flags: Any) -> None:
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    replay.launch(
        kernel, (programs,), *args, **flags, num_warps=config.num_warps, num_stages=config.num_stages, **options
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _mask_stride(layout: Layout) -> int:
    return 0 if layout.key_mask is None else layout.key_mask.stride(0)


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def _rows_ready(x: Tensor) -> Tensor:
    """With each row's D values side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
