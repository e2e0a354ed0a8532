"""The step that computes with the library's op: one fused kernel for the local part and one for each remote piece.

The backend is an argument, so that the same path runs on a CPU with `"sdpa"`, where the tests hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels import ops
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.ring_attention.step import Gradients


class OpStep:
    """A `Step` over `torch.ops.dilated_attention_pytorch.attention`.

    Args:
        backend: the op's backend, `"triton"` or `"sdpa"`.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return ops.attention(
            q, k, v, problem, key_padding_mask=key_padding_mask, row_start=None, cu_seqlens=None, seed=seed,
            backend=self.backend,
        )  # fmt: skip

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        problem: Problem, *, key_padding_mask: Tensor | None, seed: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        pattern = problem.pattern
        dq, dk, dv = torch.ops.dilated_attention_pytorch.attention_backward(
            grad_out, grad_lse, out, lse, q, k, v, key_padding_mask, None, None, seed,
            list(pattern.segment_lengths), list(pattern.dilation_rates), pattern.offsets, problem.is_causal,
            problem.scale, problem.dropout_p, problem.q_start, problem.k_start, problem.seq_len,
            problem.mixing_gradient, problem.padding, self.backend,
        )  # fmt: skip
        return dq, dk, dv

    def rows_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None
    ) -> tuple[Tensor, Tensor]:
        """See `Step`. Masks and dropout follow positions that the rows no longer tell: torch's engine takes those."""
        if bias is not None or drop is not None:
            return torch_calls.forward(q, k, v, scale=scale, is_causal=False, bias=bias, drop=drop)
        problem = _one_segment(q, k, scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = self.forward(q, k, v, problem, key_padding_mask=None, seed=None)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def rows_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
        scale: float, bias: Tensor | None, drop: torch_calls.Dropout | None,
    ) -> Gradients:  # fmt: skip
        """See `Step`."""
        if bias is not None or drop is not None:
            return torch_calls.backward(
                grad_out, q, k, v, out, lse, scale=scale, is_causal=False, bias=bias, drop=drop, grad_lse=grad_lse
            )
        problem = _one_segment(q, k, scale)
        grad_lse, lse = None if grad_lse is None else grad_lse.squeeze(-1), lse.squeeze(-1)
        grad_out, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        grads = self.backward(grad_out, grad_lse, q, k, v, out, lse, problem, key_padding_mask=None, seed=None)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


def _one_segment(q: Tensor, k: Tensor, scale: float) -> Problem:
    """Every query sees every key: a branch of rate 1 whose one segment holds both ranges."""
    length = max(q.shape[2], k.shape[2])
    pattern = DilatedPattern((length,), (1,), k.shape[1])
    return Problem(pattern, False, scale, 0.0, 0, 0, length, "exact", "none")
