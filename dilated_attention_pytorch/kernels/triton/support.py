"""What the Triton kernels can compute. Imports no Triton: asks whether it could be imported."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.types import QKV

MAX_HEAD_DIM = 256
# Wider heads of sequences from so many positions on are faster on sdpa where tiles of 256 columns have to be of few
# rows: everywhere but on Hopper, which has the shared memory for more (docs/log.md, 2026-11-28).
FAST_HEAD_DIM, LONG = 128, 1 << 17
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(x: QKV, problem: Problem) -> list[str]:
    """The reasons why the Triton kernels cannot compute a call; empty if they can."""
    device, dtype, head_dim = x.q.device, x.q.dtype, x.q.shape[-1]
    reasons = []
    if problem.mixing_gradient != "exact":
        reasons.append(f"it has no mixing_gradient={problem.mixing_gradient!r}")
    if dtype not in DTYPES:
        reasons.append(f"it has no {str(dtype).removeprefix('torch.')}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    return reasons + why_not_on(device)


def why_not_unasked(x: QKV, problem: Problem) -> list[str]:
    """The reasons why `auto` leaves out what a call that names the backend gets; empty if it does not.

    The interpreter is for tests, and no call should be slower than on sdpa. sdpa drops weights without torch's kernels.
    """
    if not x.q.is_cuda:
        return [f"the device is {x.q.device.type}, not cuda"]
    head_dim = x.q.shape[-1]
    wide = head_dim > FAST_HEAD_DIM and problem.seq_len >= LONG and problem.dropout_p == 0.0
    if wide and torch.cuda.get_device_capability(x.q.device) != (9, 0):
        return [
            f"head_dim {head_dim} is above {FAST_HEAD_DIM}: with tiles that fit this GPU sdpa was faster at {LONG:,}"
        ]
    return []


@lru_cache
def interpreting() -> bool:
    """True if Triton runs its kernels in Python (TRITON_INTERPRET=1); read once, as Triton does."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "on", "true")


def why_not_on(device: torch.device) -> list[str]:
    """The reasons why no Triton kernel runs on a device; empty if they do."""
    return list(_why_not_on(device, interpreting()))


@lru_cache
def _why_not_on(device: torch.device, interpreted: bool) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["the package 'triton' is not installed"]
    if interpreted:
        return []
    if device.type != "cuda":
        return [f"the device is {device.type}, not cuda"]
    if torch.version.hip is not None:
        return ["it is untested on ROCm"]
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return [f"compute capability {capability[0]}.{capability[1]} is below 8.0"]
    return []
