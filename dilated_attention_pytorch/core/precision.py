"""In which dtype sums are kept: fp32 at least (docs/spec.md, 3), whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """The function with autocast off on its first tensor's device: autocast would round the factors of each product."""

    @wraps(function)
    def exact(x: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = x.device.type
        if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know the device "meta"
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return exact
