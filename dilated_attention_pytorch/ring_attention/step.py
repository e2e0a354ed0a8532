"""How a rank computes: the part of its own keys, and plain attention over rows that arrived."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.sdpa import backend as sdpa
from dilated_attention_pytorch.kernels.sdpa import torch_calls

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


class TorchStep:
    """Torch's own attention, on any device; partials stay in fp32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return sdpa.forward(q, k, v, problem, key_padding_mask=key_padding_mask, seed=seed)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        return sdpa.backward(
            grad_out, grad_lse, q, k, v, out, lse, problem, key_padding_mask=key_padding_mask, seed=seed
        )

    def rows_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return torch_calls.forward(q, k, v, scale=scale, is_causal=False, bias=bias, drop=drop)

    def rows_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
        scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        return torch_calls.backward(
            grad_out, q, k, v, out, lse, scale=scale, is_causal=False, bias=bias, drop=drop, grad_lse=grad_lse
        )
