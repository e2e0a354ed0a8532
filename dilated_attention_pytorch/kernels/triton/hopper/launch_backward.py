"""How the backward kernels for Hopper are launched; `support.py` says when."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dilated_attention_pytorch.kernels.triton.hopper import backward as full
from dilated_attention_pytorch.kernels.triton.hopper import backward_causal, launch, support
from dilated_attention_pytorch.kernels.triton.hopper.support import MAX_RATES, ROWS
from dilated_attention_pytorch.kernels.triton.hopper.terms import residue_terms_kernel
from dilated_attention_pytorch.kernels.triton.hopper.views import column_strides, stride_views
from dilated_attention_pytorch.kernels.triton.launch_aligned import alignment
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.views import strides_of
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import QKV, AttentionOutput, OutputGradient


class BackwardConfig(NamedTuple):
    """How a pass is cut.

    Attributes:
        block: rows of the streamed pair per step.
        stages: steps whose rows are in shared memory.
        registers: whether the stationary pair is kept in registers.
    """

    block: int
    stages: int
    registers: bool = False


# (head_dim, causal) -> dQ's and dK, dV's; those with which whole calls were fastest (docs/log.md).
_CONFIGS = {
    (64, False): (BackwardConfig(128, 3), BackwardConfig(64, 3, True)),
    (64, True): (BackwardConfig(128, 3), BackwardConfig(64, 3, True)),
    (128, False): (BackwardConfig(128, 2), BackwardConfig(64, 2)),
    (128, True): (BackwardConfig(64, 4), BackwardConfig(64, 2)),
}
# Rows of the tiles by which terms are laid out: at a stride of 16, eight of each residue.
_TERMS_ROWS = 128
# lse and delta of rows that do not exist: an exponential of less vanishes, and a product with it is no NaN.
_NEVER = 1e30


def configs_for(work: Work) -> tuple[BackwardConfig, BackwardConfig]:
    """The configurations of both passes."""
    return _CONFIGS[work.x.q.shape[3], work.problem.is_causal]


def backward(
    work: Work, grad: OutputGradient, saved: AttentionOutput, tape: Tape, dq_config: BackwardConfig,
    dkv_config: BackwardConfig,
) -> QKV:  # fmt: skip
    """dq, dk and dv by two launches, after those that lay out what they need of each query."""
    if support.misplaced("dO", grad.out, alignment(work).rate):
        grad = grad._replace(out=grad.out.contiguous())
    terms = terms_of(work, grad, saved, tape)
    return QKV(backward_dq(work, grad, terms, tape, dq_config), *backward_dkv(work, grad, terms, tape, dkv_config))


def terms_of(work: Work, grad: OutputGradient, saved: AttentionOutput, tape: Tape) -> list[Tensor]:
    """lse in units of log2 and delta of each query, `[2, B, H, r, length]` for each stride r that tiles have."""
    (batch, n, heads, width), padded, strides = work.x.q.shape, _padded(work), _strides(work)
    fill = None if padded == n else _NEVER
    terms = [tape.empty(work.x.q, (2, batch, heads, r, padded // r), torch.float32, fill=fill) for r in strides]
    args = (
        saved.out, grad.out, saved.lse, grad.lse, *terms, *[None] * (MAX_RATES - len(terms)),
        *strides_of(saved.out, grad.out), n, heads, batch * heads, padded,
    )  # fmt: skip
    flags = {"STRIDES": strides, "D": width, "BM": _TERMS_ROWS}
    kernel, grid = residue_terms_kernel, (triton.cdiv(n, _TERMS_ROWS) * batch * heads,)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return terms


def backward_dq(work: Work, grad: OutputGradient, terms: list[Tensor], tape: Tape, config: BackwardConfig) -> Tensor:
    """dq."""
    q, k, v = work.x
    return _launch(work, (q, grad.out), (k, v), (q,), terms, tape, config)[0]


def backward_dkv(
    work: Work, grad: OutputGradient, terms: list[Tensor], tape: Tape, config: BackwardConfig
) -> list[Tensor]:
    """dk and dv."""
    q, k, v = work.x
    return _launch(work, (k, v), (q, grad.out), (k, v), terms, tape, config)


def _launch(
    work: Work, a: Sequence[Tensor], b: Sequence[Tensor], like: Sequence[Tensor], terms: list[Tensor], tape: Tape,
    config: BackwardConfig,
) -> list[Tensor]:  # fmt: skip
    """The gradients of `like`, given the stationary and the streamed pair."""
    q, k, _ = work.x
    plan, problem, block = alignment(work), work.problem, config.block
    grads = [tape.empty(x, x.shape) for x in like]
    batch, n, heads, _ = q.shape
    blocks = *((x, ROWS // 2) for x in a), *((x, block) for x in b)
    padded = _padded(work)
    num_tiles = batch * a[0].shape[2] * padded // ROWS
    sizes: tuple[int, ...] = (num_tiles, batch, heads, heads // k.shape[2])
    flags: dict[str, Any] = {
        "DKV": len(like) == 2, "LENGTHS": plan.lengths, "RATES": plan.rates, "STAGES": config.stages,
        "REGISTERS": config.registers,
    }  # fmt: skip
    if problem.is_causal:
        kernel: Any = backward_causal.hopper_backward_causal
        views = [stride_views(x, plan.rates, rows, MAX_RATES) for x, rows in blocks]
        views.append([*(flat(x, block) for x in terms), *[None] * (MAX_RATES - len(terms))])
        sizes += (padded // plan.lengths[0], n)
    else:
        kernel = full.hopper_backward
        views = [stride_views(x, (plan.rate,), rows, 1) for x, rows in blocks]
        views.append([flat(terms[0], block)])
        length = padded // plan.rate
        sizes += (length // ROWS, n, length)
        flags["EVEN"] = padded == n
    args = (
        *itertools.chain(*views), terms[0], grads[0], grads[-1], launch.counter_of(q, tape),
        *column_strides(*a, *b, grads[0]), *sizes, work.logit_scale, problem.scale,
    )  # fmt: skip
    flags |= launch.options()
    grid = (min(launch.programs_on(q), num_tiles),)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return grads


def _strides(work: Work) -> tuple[int, ...]:
    """The strides at which tiles of queries lie."""
    plan = alignment(work)
    return plan.rates if work.problem.is_causal else (plan.rate,)


def _padded(work: Work) -> int:
    """The length in whole tiles, or in whole segments of the shortest branch."""
    plan = alignment(work)
    unit = plan.lengths[0] if work.problem.is_causal else plan.rate * ROWS
    return triton.cdiv(work.x.q.shape[1], unit) * unit


def flat(terms: Tensor, rows: int) -> TensorDescriptor:
    """A tensor's elements one after another, in blocks of so many."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(terms, [terms.numel()], [1], [rows], layout)
