"""Exact sizes."""

from __future__ import annotations

from typing import ClassVar

from dilated_attention_pytorch.core.memory.blocks import aligned
from dilated_attention_pytorch.core.memory.strategies.base import SizedStrategy


class SimpleStrategy(SizedStrategy):
    """A free block serves requests of its own size alone, in whole units of 512 bytes.

    For a few sizes that come again and again, such as the exchanges of a fixed pattern. Sizes that never return stay
    until `trim`.
    """

    name: ClassVar[str] = "simple"

    def rounded(self, size: int) -> int:
        """See `SizedStrategy`."""
        return aligned(size)
