"""Which backend a call takes. Imports no Triton: asks whether it could be imported."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import NamedTuple

import torch

from dilated_attention_pytorch.core.validation import check_choice
from dilated_attention_pytorch.types import Backend, MixingGradient

_MAX_HEAD_DIM = 256
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class BackendChoice(NamedTuple):
    """Which backend a call takes, and why."""

    backend: str
    reason: str


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    mixing_gradient: MixingGradient = "exact",
    backend: Backend = "auto",
) -> BackendChoice:
    """The backend that a call takes.

    Args:
        device: of q, k and v.
        dtype: of q, k and v.
        head_dim: D.
        mixing_gradient: as in `dilated_attention`.
        backend: what was asked for; a backend named explicitly is never replaced.

    Returns:
        The backend's name, and the reason in words.

    Raises:
        ValueError: an unknown backend.

    Example:
        >>> choose_backend(torch.device("cpu"), torch.float32, 64).backend
        'sdpa'
    """
    if backend != "auto":
        check_choice("backend", backend, Backend)
        return BackendChoice(backend, "asked for by name")
    why_not = _why_not_triton(device, dtype, head_dim, mixing_gradient)
    if why_not is None:
        return BackendChoice("triton", "fused Triton kernels: one pass over all branches")
    return BackendChoice("sdpa", f"torch's own attention, memory linear in N; not triton: {why_not}")


def _why_not_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, mixing_gradient: MixingGradient
) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in _TRITON_DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {_MAX_HEAD_DIM}"
    if mixing_gradient != "exact":
        return f"it has no mixing_gradient={mixing_gradient!r}"
    return _why_not_on(device)


@lru_cache
def _why_not_on(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is untested on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
