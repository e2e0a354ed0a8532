"""What a borrower holds."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor

from dilated_attention_pytorch.core.memory.arena import Arena
from dilated_attention_pytorch.core.memory.blocks import Block
from dilated_attention_pytorch.core.memory.uncompiled import uncompiled

if TYPE_CHECKING:
    from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool


@dataclass(eq=False, slots=True)
class Ticket:
    """A pool's note of a handle. It knows nothing of the handle, which may be dropped at any moment.

    Attributes:
        number: counts the pool's borrows.
        arena: the place; None for memory that is not the pool's (under graph capture).
        block: None for no bytes.
        size: bytes asked for.
        purpose: as given.
        stream: the stream that the block was made ready for.
    """

    number: int
    arena: Arena | None
    block: Block | None
    size: int
    purpose: str
    stream: Hashable


class Handle:
    """A tensor lent by a pool: `with pool.borrow(...) as handle: use(handle.tensor)`.

    The tensor is ready for work on the stream that was current at the borrow; another stream waits for that one
    first, as for any tensor made there. When it is released, the block may be lent again: whoever still holds the
    tensor, or a view of it, then reads somebody else's data. So does who keeps the tensor of a handle that was
    dropped.
    """

    __slots__ = ("__weakref__", "_finalizer", "_pool", "_tensor", "_ticket")

    def __init__(self, pool: UnifiedMemoryPool, ticket: Ticket, tensor: Tensor) -> None:
        self._pool = pool
        self._ticket = ticket
        self._tensor: Tensor | None = tensor
        # A bare append: it may run in any thread, within any of the pool's own methods, so it takes no lock.
        self._finalizer = weakref.finalize(self, pool.dropped.append, ticket.number)
        self._finalizer.atexit = False

    @property
    def tensor(self) -> Tensor:
        """The tensor; ValueError once it is released."""
        if self._tensor is None:
            raise ValueError(f"expected a handle that was not released, got one of {self._ticket.purpose!r} that was")
        return self._tensor

    @property
    def released(self) -> bool:
        """Whether it was."""
        return self._tensor is None

    @uncompiled
    def release(self, stream: Hashable | Iterable[Hashable] | None = None) -> None:
        """Gives the block back, as soon as the last work on it is queued. A second call does nothing.

        Args:
            stream: the stream or streams whose work uses the block, all of them; a later borrower's work comes after
                theirs. None: the stream current at the borrow and the one current now.

        Raises:
            TypeError: what is no stream; the block is still lent.
        """
        self._pool._release(self, stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._tensor is None else f"{tuple(self._tensor.shape)} {self._tensor.dtype}"
        return f"Handle({self._ticket.purpose!r}, {state})"
