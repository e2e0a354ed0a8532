"""What a borrower holds, and what the pool notes of it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dilated_attention_pytorch.core.memory.arena import Arena
from dilated_attention_pytorch.core.memory.blocks import Block
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.core.torch_private import uncompiled

Streams = Hashable | Iterable[Hashable] | None  # one, several, or whichever are current


@dataclass(eq=False, slots=True)
class Ticket:
    """The pool's note of a handle, without a reference to the handle, which may be dropped at any moment."""

    arena: Arena | None  # of the block's place; None for memory of a captured graph
    block: Block | None  # None for a tensor of no bytes
    size: int  # bytes asked for
    given: int  # bytes of the block
    purpose: str  # the name under which statistics count it
    stream: Hashable  # the one that the block was made ready for


class Handle:
    """A tensor lent by a pool: `with pool.borrow(...) as handle: use(handle.tensor)`.

    The tensor is ready for work on the stream that was current at the borrow; another stream waits for that one
    first, as for any tensor made there. Once the handle is released or dropped, the block may be lent again: the
    tensor and its views then show the next borrower's data.
    """

    __slots__ = ("__weakref__", "_finalizer", "_give_back", "_tensor", "_ticket")

    def __init__(
        self, ticket: Ticket, tensor: Tensor, give_back: Callable[[Handle, Streams], None], dropped: deque[Ticket]
    ) -> None:
        self._ticket = ticket
        self._give_back = give_back
        self._tensor: Tensor | None = tensor
        # A bare append: it may run in any thread, within any of the pool's own methods, so it takes no lock.
        self._finalizer = weakref.finalize(self, dropped.append, ticket)
        self._finalizer.atexit = False

    @property
    def tensor(self) -> Tensor:
        """The tensor; ValueError once it is released."""
        if self._tensor is None:
            raise ValueError(
                f"expected a handle that was not released, got one of {quoted(self._ticket.purpose)} that was"
            )
        return self._tensor

    @property
    def released(self) -> bool:
        """True once the handle is released."""
        return self._tensor is None

    @uncompiled
    def release(self, stream: Streams = None) -> None:
        """Gives the block back, as soon as the last work on it is queued. A second call does nothing.

        Args:
            stream: the stream, or all the streams, whose work uses the block; a later borrower's work comes after
                theirs. None: the stream current at the borrow and the one current now.

        Raises:
            TypeError: an object that is not a stream; the block is still lent.
        """
        self._give_back(self, stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._tensor is None else f"{tuple(self._tensor.shape)} {self._tensor.dtype}"
        return f"Handle({self._ticket.purpose!r}, {state})"
