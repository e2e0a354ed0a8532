"""The attention op as PyTorch sees it: schema, fake kernel, autograd. Imports no Triton.

One op with a `backend` argument: `torch.ops.dilated_attention_pytorch.attention`. Name it in a selective
checkpointing policy to keep its result instead of computing it twice.

Registered by `define`, `impl` and an `autograd.Function`: 20 us per call without gradients and 32 with, where
`custom_op` and `register_autograd` take 25 and 120 (`benchmarks/dispatch.py`, docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import SCHEMA, Problem
from dilated_attention_pytorch.core.validation import check_row_start_values
from dilated_attention_pytorch.kernels import decomposition, flops
from dilated_attention_pytorch.kernels.choice import backend_for
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient

NAMESPACE = "dilated_attention_pytorch"
INPUTS = "Tensor q, Tensor k, Tensor v"
_MASKS = "Tensor? key_padding, Tensor? row_start, Tensor? cu_seqlens, Tensor? seed"
_SETTINGS = f"{SCHEMA}, str backend"

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"attention({INPUTS}, {_MASKS}, {_SETTINGS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
LIBRARY.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {INPUTS}, {_MASKS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# q, k, v, *Masks, *Problem.pack(), backend -> out, lse
attention = torch.ops.dilated_attention_pytorch.attention.default
# *OutputGradient, *AttentionOutput, then as for attention -> dq, dk, dv
attention_backward = torch.ops.dilated_attention_pytorch.attention_backward.default


def refuse_tangents(**named: Any) -> None:
    """Raises for a forward-mode tangent: an op of ours has no formula for it, and its outputs would just lose it."""
    for name, x in named.items():
        if isinstance(x, Tensor) and torch_private.has_tangent(x):
            raise NotImplementedError(
                f"expected no forward-mode tangent (torch.func.jvp, make_dual), got one on {name}; "
                "backend='reference' of dilated_attention computes it"
            )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, masks = QKV(*arguments[:3]), Masks(*arguments[3:7])
    problem = Problem.unpack(x.k.shape[2], arguments[7:-1])
    if masks.row_start is not None:
        check_row_start_values(masks.row_start)
    out, lse = backend_for(x, problem, arguments[-1]).forward(x, problem, masks)
    return out.to(x.q.dtype), lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad, saved = OutputGradient(*arguments[:2]), AttentionOutput(*arguments[2:4])
    x, masks = QKV(*arguments[4:7]), Masks(*arguments[7:11])
    problem = Problem.unpack(x.k.shape[2], arguments[11:-1])
    grads = backend_for(x, problem, arguments[-1]).backward(grad, x, saved, problem, masks)
    return tuple(y.to(x.q.dtype) for y in grads)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[4:7])


def derivative(
    op: Any, backward_op: Any, num_tensors: int, *, is_exchange: bool = False
) -> type[torch.autograd.Function]:
    """The Function of an op: its derivative is the backward op, given what the forward returned, out and lse first,
    then its `num_tensors` tensors, q, k and v first. Other ranks wait for an exchange, so it happens always."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with torch_private.below_autograd_function():
                output: tuple[Tensor, ...] = op(*arguments)
            ctx.save_for_backward(*output, *arguments[:num_tensors])
            ctx.settings = arguments[num_tensors:]
            ctx.mark_non_differentiable(*output[2:])
            ctx.set_materialize_grads(False)  # an unused lse costs nothing
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            grad_out, grad_lse, *_ = grads
            saved, nothing = ctx.saved_tensors, (None,) * (num_tensors - 3 + len(ctx.settings))
            if grad_out is None and grad_lse is None and not is_exchange:
                return None, None, None, *nothing
            grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
            return *backward_op(grad_out, grad_lse, *saved, *ctx.settings), *nothing

    return Derivative


def _at_autograd(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What an op does at the Autograd key: its Function where a gradient is wanted, else the op itself."""
    names = [argument.name for argument in op._schema.arguments]

    def differentiable(*arguments: Any) -> Any:
        if torch_private.is_watched():  # below a transform of torch.func there may be a tangent that nobody saw above
            refuse_tangents(**dict(zip(names, arguments, strict=True)))
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return torch_private.apply_at_level(function, *arguments)
        with torch_private.below_autograd():
            return op(*arguments)

    return differentiable


def end_of_the_road(op: Any, message: str) -> type[torch.autograd.Function]:
    """The Function of a backward op: it has no derivative, and says so only to whoever asks for it."""

    class End(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with torch_private.below_autograd_function():
                return op(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> None:
            raise NotImplementedError(message)

    return End


def register(name: str, op: Any, kernel: Any, fake: Any, function: type[torch.autograd.Function]) -> None:
    """Gives an op its kernel, what a tracer sees of it, and its derivative."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _at_autograd(op, function), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


_END = end_of_the_road(attention_backward, "expected first derivatives only; backend='reference' computes second ones")
register("attention", attention, _forward, _fake_forward, derivative(attention, attention_backward, 7))
register("attention_backward", attention_backward, _backward, _fake_backward, _END)
torch_private.register_decomposition(attention, decomposition.attention, _fake_forward)
flops.register_when_counted()
