"""The attention op as PyTorch sees it: schema, fake kernel, autograd, FLOPs. Imports no Triton.

One op with a `backend` argument: `torch.ops.dilated_attention_pytorch.attention`. Name it in a selective
checkpointing policy to keep its result instead of computing it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.validation import check_row_start_values
from dilated_attention_pytorch.kernels import flops
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.kernels.sdpa import backend as sdpa


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    *,
    key_padding_mask: Tensor | None,
    row_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Calls the op; arguments as in `core.reference.attention`, and the backend's name."""
    refuse_tangents(q, k, v)
    pattern = problem.pattern
    return _attention(
        q,
        k,
        v,
        key_padding_mask,
        row_start,
        cu_seqlens,
        seed,
        list(pattern.segment_lengths),
        list(pattern.dilation_rates),
        pattern.offsets,
        problem.is_causal,
        problem.scale,
        problem.dropout_p,
        problem.q_start,
        problem.k_start,
        problem.seq_len,
        problem.mixing_gradient,
        problem.padding,
        backend,
    )


def refuse_tangents(q: Tensor, k: Tensor, v: Tensor) -> None:
    """A custom op has no way to register a forward-mode formula: its outputs would just lose the tangents."""
    if forward_ad._current_level < 0:
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for looking at a tangent
            x = torch._C._functorch.get_unwrapped(x)
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"expected no forward-mode tangent (torch.func.jvp, make_dual), got one on {name}; "
                "backend='reference' of dilated_attention computes it"
            )


@torch.library.custom_op("dilated_attention_pytorch::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    row_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    offsets: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    q_start: int,
    k_start: int,
    seq_len: int,
    mixing_gradient: str,
    padding: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    settings = (tuple(segment_lengths), tuple(dilation_rates), offsets, is_causal, scale, dropout_p)
    problem = Problem.of(k.shape[2], *settings, q_start, k_start, seq_len, mixing_gradient, padding)
    if row_start is not None:
        check_row_start_values(row_start)
    out, lse = implementation(q, problem, backend).forward(
        q, k, v, problem, key_padding_mask=key_padding_mask, row_start=row_start, cu_seqlens=cu_seqlens, seed=seed
    )
    return out.to(q.dtype), lse


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("dilated_attention_pytorch::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    row_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    offsets: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    q_start: int,
    k_start: int,
    seq_len: int,
    mixing_gradient: str,
    padding: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (tuple(segment_lengths), tuple(dilation_rates), offsets, is_causal, scale, dropout_p)
    problem = Problem.of(k.shape[2], *settings, q_start, k_start, seq_len, mixing_gradient, padding)
    grads = implementation(q, problem, backend).backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        problem,
        key_padding_mask=key_padding_mask,
        row_start=row_start,
        cu_seqlens=cu_seqlens,
        seed=seed,
    )
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def implementation(q: Tensor, problem: Problem, backend: Any) -> Any:
    """The module whose `forward` and `backward` serve a call; a function of the call alone, so both passes agree."""
    choice = choose_backend(q.device, q.dtype, q.shape[-1], mixing_gradient=problem.mixing_gradient, backend=backend)
    if choice.backend == "sdpa":
        return sdpa
    try:
        from dilated_attention_pytorch.kernels.triton import launch
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"backend='triton' needs the package {error.name!r}, which is not installed; backend='sdpa' computes it"
        ) from error
    return launch


def repeater(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, backend: str
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None:
    """What computes out and lse for tensors of the same layout without the op; None where nothing is gained."""
    return implementation(q, problem, backend).repeater(q, k, v, problem)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)  # an unused lse costs nothing


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, *extras = ctx.saved_tensors
    none = (None,) * (len(extras) + len(ctx.settings))
    if grad_out is None and grad_lse is None:
        return None, None, None, *none
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _attention_backward(grad_out, grad_lse, out, lse, q, k, v, *extras, *ctx.settings)
    return *grads, *none


_attention.register_autograd(_differentiate, setup_context=_setup_context)


flops.register_when_counted()
