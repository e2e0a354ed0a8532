"""Which backend serves a call: one list of reasons chooses, refuses and is printed by `dilated-attention info`."""

from __future__ import annotations

from typing import NamedTuple

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.validation import check_choice
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.kernels.sdpa import backend as sdpa
from dilated_attention_pytorch.kernels.triton import support
from dilated_attention_pytorch.types import QKV, BackendName


class BackendChoice(NamedTuple):
    """The backend that a call takes, and why."""

    backend: str
    reason: str


def choose_backend(x: QKV, problem: Problem, name: BackendName = "auto") -> BackendChoice:
    """The backend that a call takes; a function of the call alone, so both passes agree.

    Args:
        x: queries, keys and values; only their device, dtype and width are looked at.
        problem: the call's settings.
        name: the backend asked for. A backend named explicitly is never replaced.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: the backend named cannot compute the call; the message says why, and which one can.
    """
    if name == "auto":
        reasons = support.why_not(x, problem) or support.why_not_unasked(x, problem)
        if not reasons:
            return BackendChoice("triton", "fused Triton kernels: one pass over all branches")
        why = f"torch's own attention, memory linear in N; not triton: {'; '.join(reasons)}"
        return BackendChoice("sdpa", why)
    check_choice("backend", name, BackendName)
    if name == "triton" and (reasons := support.why_not(x, problem)):
        raise NotImplementedError(
            f"backend='triton' cannot compute this call: {'; '.join(reasons)}; backend='sdpa' computes it"
        )
    return BackendChoice(name, "asked for by name")


def backend_for(x: QKV, problem: Problem, name: BackendName = "auto") -> Backend:
    """The module that serves a call; Triton is imported when it is first chosen."""
    if choose_backend(x, problem, name).backend == "sdpa":
        return sdpa
    from dilated_attention_pytorch.kernels.triton import backend as triton

    return triton
