"""A call as the Triton kernels take it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.validation import check_cu_seqlens_values
from dilated_attention_pytorch.kernels.triton.support import interpreting
from dilated_attention_pytorch.types import QKV, Masks

LOG2E = 1.4426950408889634


class Work(NamedTuple):
    """What a launch computes.

    Attributes:
        x: q, k and v with dense rows.
        problem: the settings; positions count from the range where that changes nothing.
        masks: on the device, the key padding mask as bytes; a seed only with dropout.
    """

    x: QKV
    problem: Problem
    masks: Masks

    @property
    def is_masked(self) -> bool:
        """Whether masks or packing decide what the kernels do, so that two calls alike in layout may differ."""
        return any(mask is not None for mask in self.masks[:3])

    @property
    def block_d(self) -> int:
        """Columns of a tile: D, or the power of two above it; tl.dot asks for 16."""
        return max(16, triton.next_power_of_2(self.x.q.shape[3]))

    @property
    def logit_scale(self) -> float:
        """What turns q . k into a logit in units of log2."""
        return self.problem.scale * LOG2E

    @property
    def precision(self) -> str:
        """How fp32 products are computed: three tf32 products keep fp32's accuracy on the tensor cores."""
        return "ieee" if self.x.q.dtype != torch.float32 or interpreting() else "tf32x3"


def prepare(x: QKV, problem: Problem, masks: Masks) -> Work:
    """Only ranges counted from 0 take the fast kernels, and ranges of one kind then share their launches.

    Kernels read masks as lying without gaps.
    """
    q, k, v = (ready(y) for y in x)
    key_padding, row_start, cu_seqlens, seed = masks
    if row_start is None:
        # The mask covers the whole sequence; the range that positions count from now is a part of it.
        before, problem = problem.q_start, problem.rebased(q.shape[1], k.shape[1])
        if key_padding is not None:
            start = before - problem.q_start
            key_padding = key_padding[:, start : start + problem.seq_len]
    else:
        row_start = row_start.to(q.device).contiguous()
    if key_padding is not None:
        key_padding = key_padding.contiguous().view(torch.uint8)
    if cu_seqlens is not None:
        # On the device, reading it would make the host wait.
        if not cu_seqlens.is_cuda:
            check_cu_seqlens_values(cu_seqlens.tolist(), q.shape[1])
        cu_seqlens = cu_seqlens.to(q.device).contiguous()
    seed = None if seed is None or problem.dropout_p == 0.0 else seed.to(q.device)
    return Work(QKV(q, k, v), problem, Masks(key_padding, row_start, cu_seqlens, seed))


def ready(x: Tensor) -> Tensor:
    """With each row's D values side by side; in fp32 where the interpreter's tl.dot is wrong, on bf16."""
    if x.dtype == torch.bfloat16 and interpreting():
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's device the current one, which Triton launches on."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()
