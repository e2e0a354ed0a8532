"""Stands in for `core.memory.UnifiedMemoryPool` until that is merged: the same `borrow`, straight from torch."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor


class Handle:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self, stream: object = None) -> None:
        self.tensor = torch.empty(0)


class UnifiedMemoryPool:
    def __init__(self, strategy: str = "simple", limit: int | None = None) -> None:
        self.strategy, self.limit = strategy, limit

    def borrow(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        purpose: str,
        pinned: bool = False,
        zero: bool = False,
    ) -> Handle:
        make = torch.zeros if zero else torch.empty
        return Handle(make(shape, dtype=dtype, device=device, pin_memory=pinned))
