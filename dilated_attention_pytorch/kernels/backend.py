"""The contract of a backend: what the op, the ring and streaming call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

# Computes the forward of a call seen before, for tensors of the same layout.
Repeat = Callable[[QKV], AttentionOutput]


class Backend(Protocol):
    """One way to compute a `Problem`. A module with these functions is one; backends do not know one another.

    Results may come in the input's dtype or in the accumulator's: callers round, or merge in fp32.
    """

    def why_not(self, x: QKV, problem: Problem) -> list[str]:
        """The reasons why this backend cannot compute a call; empty if it can."""

    def forward(self, x: QKV, problem: Problem, masks: Masks = NO_MASKS) -> AttentionOutput:
        """Attention of the queries over the keys given, out `(B, Nq, H, D)` and lse `(B, H, Nq)`."""

    def backward(
        self, grad: OutputGradient, x: QKV, saved: AttentionOutput, problem: Problem, masks: Masks = NO_MASKS
    ) -> QKV:
        """Gradients of q, k and v. `saved` may be of more keys than these: then the gradients are these keys' share."""

    def repeater(self, x: QKV, problem: Problem) -> Repeat | None:
        """Computes the same forward again without what only a first call needs; None where nothing is gained."""
