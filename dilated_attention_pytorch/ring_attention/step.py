"""How a rank computes: the part of its own keys, and plain attention over rows that arrived."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem, one_segment
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient

Gradients = tuple[Tensor, Tensor, Tensor]


class Step(Protocol):
    """The arithmetic of ring attention, which knows of no other rank.

    Results may come in half precision; they are merged and summed in fp32.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Partial dilated attention of one range of queries over one range of keys."""

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """Its gradients, given the out and lse of all keys."""

    def rows_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None
    ) -> tuple[Tensor, Tensor]:
        """Attention without causality over `(b, H, L, D)` rows, as `torch_calls.forward`."""

    def rows_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
        scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None,
    ) -> Gradients:  # fmt: skip
        """Its gradients, as `torch_calls.backward`."""


class BackendStep:
    """A `Step` over a backend of the op."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return self.backend.forward(QKV(q, k, v), problem, Masks(key_padding_mask, seed=seed))

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        saved, masks = AttentionOutput(out, lse), Masks(key_padding_mask, seed=seed)
        return self.backend.backward(OutputGradient(grad_out, grad_lse), QKV(q, k, v), saved, problem, masks)

    def rows_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`. Masks and dropout follow positions that the rows no longer tell: torch's engine takes those."""
        if bias is not None or drop is not None:
            return torch_calls.forward(QKV(q, k, v), torch_calls.Softmax(scale, False, bias, drop))
        problem = one_segment(q.shape[2], k.shape[2], k.shape[1], scale)
        out, lse = self.backend.forward(QKV(*(x.transpose(1, 2) for x in (q, k, v))), problem)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def rows_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
        scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        if bias is not None or drop is not None:
            how = torch_calls.Softmax(scale, False, bias, drop)
            grad, saved = OutputGradient(grad_out, grad_lse), AttentionOutput(out, lse)
            return torch_calls.backward(grad, QKV(q, k, v), saved, how)
        problem = one_segment(q.shape[2], k.shape[2], k.shape[1], scale)
        grad_lse, lse = None if grad_lse is None else grad_lse.squeeze(-1), lse.squeeze(-1)
        grad_out, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        grads = self.backend.backward(
            OutputGradient(grad_out, grad_lse), QKV(q, k, v), AttentionOutput(out, lse), problem
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
