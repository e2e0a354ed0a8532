"""Triton in a ring: no step of its own, only the question whether the fused kernels take a rank's share.

A rank's own keys are one call of `kernels/triton/backend.py`, with the rank's range of positions; rows that arrive are
calls of the same functions with one segment (`ring_attention/remote.py`). Rows under a mask or dropout are the
exception: torch's own attention takes those. `RingAttentionConfig.backend` decides as it does on one device, and
nothing here imports Triton.
"""

from __future__ import annotations

from dilated_attention_pytorch.kernels.triton.support import why_not, why_not_unasked

__all__ = ["why_not", "why_not_unasked"]
