"""Fast path for repeated calls: skips validation and the dispatcher when the same shapes, strides, dtypes and settings
were seen before.

On a short sequence the host decides the time: validating a call takes longer than its kernel, and so does an op's way
through PyTorch's dispatcher. Neither can turn out otherwise for a second call of the same kind. So a call that nothing
watches (no gradient, no compiler, no mode or transform) and whose kind is known goes to its kernels directly; every
other call goes through the op.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Repeat
from dilated_attention_pytorch.kernels.choice import backend_for
from dilated_attention_pytorch.types import QKV, BackendName

_KEPT = 512  # kinds; sequence lengths may never repeat
_known: dict[Hashable, Repeat] = {}


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int], *settings: Any
) -> Hashable | None:
    """What a call's validation and launches depend on; None for a call that has to go through the op.

    Args:
        q, k, v, segment_lengths, dilation_rates: as the user gave them, which may be anything.
        settings: every other argument.
    """
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor or _watched(q, k, v):
        return None
    if not isinstance(segment_lengths, list | tuple) or not isinstance(dilation_rates, list | tuple):
        return None
    try:
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:  # a kernel may be compiled for less alignment
            return None
        tensors = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype
    except RuntimeError:  # a layout without pointer or shape: validation has an opinion on it
        return None
    # Types too: 8.0 and True equal 8 and 1, and validation tells them apart.
    values = *segment_lengths, *dilation_rates, *settings
    kind = (tensors, q.device, k.device, v.device, len(segment_lengths), values, tuple(map(type, values)))
    try:
        hash(kind)
    except TypeError:  # a list among the lengths, say: validation has an opinion on it
        return None
    return kind


def repeat(kind: Hashable | None) -> Repeat | None:
    """What computes out and lse for calls of a kind; None where it was not seen."""
    return None if kind is None else _known.get(kind)


def remember(kind: Hashable | None, x: QKV, problem: Problem, backend: BackendName) -> None:
    """Keep how a call was computed that went through validation and the op."""
    if kind is None or problem.dropout_p > 0.0:
        return
    again = backend_for(x, problem, backend).repeater(x, problem)
    if again is not None:
        if len(_known) >= _KEPT:
            oldest, *_ = tuple(_known)  # whole at once: other threads may add meanwhile
            _known.pop(oldest, None)
        _known[kind] = again


def _watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if autograd, torch.compile, a torch mode, functorch, forward AD or autocast has to see this call."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch_private.is_watched()
        or q.is_neg()  # a kernel reads what stands in memory, whose sign is the other one; the dispatcher mends it
        or k.is_neg()
        or v.is_neg()
        or q.is_meta  # before autocast, which does not know the device
        or torch.is_autocast_enabled(q.device.type)
        or (q.is_cuda and q.device.index != torch.cuda.current_device())
    )
