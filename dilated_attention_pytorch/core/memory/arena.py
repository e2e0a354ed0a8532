"""One place of a pool: its strategy, its raw memory, and the order of work on memory that is used again.

The order of preference is that of RMM's stream-ordered resources: a free block that the caller's stream used last, or
whose uses are over; then another stream's block, for which the caller's stream waits; then new memory. Host memory is
touched by the processor, which would have to wait itself, so there new memory comes before a busy block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from contextlib import suppress

from typing_extensions import override

from dilated_attention_pytorch.core.memory.blocks import Block, Place, RawMemory, Use, Uses
from dilated_attention_pytorch.core.memory.runtime import Runtime
from dilated_attention_pytorch.core.memory.stats import PoolStats
from dilated_attention_pytorch.core.memory.strategies.base import Exhausted, Source, Strategy
from dilated_attention_pytorch.core.validation import check_instance

_RECENT = 256  # requests whose sizes say what a typical one is
_MOST = (1 << 63) - 1  # bytes: torch counts them in 64 bits


class Arena(Source):
    """What a pool keeps of one place; every method is called with the pool's lock held.

    Attributes:
        place: where its memory lies.
        strategy: keeps the free blocks, and takes raw memory from this arena.
        recent: sizes of the latest requests, in bytes.
    """

    def __init__(
        self, place: Place, runtime: Runtime, strategy: type[Strategy], ledger: PoolStats, limit: int | None
    ) -> None:
        self.place = place
        self.recent: deque[int] = deque(maxlen=_RECENT)
        self._runtime = runtime
        self._ledger = ledger  # the pool's, so `reserved` and `limit` count all places
        self._limit = limit
        self._ordering = runtime.ordering(place)
        self._events = 0
        self._held = 0  # bytes of raw memory here
        self._streams: set[Hashable] = set()  # every stream that borrowed or released here
        self.strategy = strategy(self)

    def stream(self) -> Hashable:
        """The caller's stream; None if work here has no order to keep."""
        if self._ordering == "none":
            return None
        stream = self._runtime.current_stream(self.place)
        self._streams.add(stream)
        return stream

    def take(self, size: int, stream: Hashable) -> tuple[Block, bool, bool]:
        """A block, whether the pool held it already, and whether its last use had to be waited for.

        Raises:
            Exhausted: no memory within the limit, or none left.
        """
        block = self.strategy.find(size, lambda found: self._ready(found, stream))
        if block is not None:
            return block, True, False
        if self._ordering == "host":
            with suppress(Exhausted):
                return self.strategy.grow(size), False, False
        block = self.strategy.find(size, None)
        if block is not None:
            return block, True, self._order(block, stream)
        return self.strategy.grow(size), False, False

    def give(self, block: Block, borrower: Hashable, streams: Iterable[Hashable] | None) -> None:
        """Takes a block back.

        Args:
            block: of `take`.
            borrower: the stream that it was made ready for.
            streams: those whose work used it. None: the borrower's and every one that was seen here.
        """
        streams = None if streams is None else list(streams)
        for stream in streams or ():
            check_instance("stream", stream, Hashable, type(None))
        if self._ordering == "none":
            for stream in streams or ():
                if stream is not None:
                    self._runtime.record(stream)  # only to refuse objects that are not streams
        else:
            used = self._streams | {borrower} if streams is None else set(streams)
            events = {stream: self._event(stream) for stream in used}
            self._streams |= used
            # Earlier uses, which the borrower's stream waited for, lie before its new event; before no other's.
            earlier: Uses = {} if borrower in used else block.uses
            block.uses = {**earlier, **events}
        self.strategy.give(block)

    # What the strategy asks for.

    @override
    def node(self) -> int | None:
        return self._runtime.node(self.place)

    @override
    def allocate(self, size: int, node: int | None = None) -> RawMemory:
        if size > _MOST:
            raise Exhausted("torch, which counts bytes in 64 bits")
        if self._limit is not None and self._ledger.reserved + size > self._limit:
            raise Exhausted("the limit")
        try:
            tensor = self._runtime.allocate(self.place, size, node)
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors if memory is short
            raise Exhausted(str(error).partition("\n")[0]) from error
        self._ledger.reserved += size
        self._ledger.peak_reserved = max(self._ledger.peak_reserved, self._ledger.reserved)
        self._held += size
        raw = RawMemory(tensor, size, node)
        if self._ordering == "stream":
            # torch gives out memory whose last work on this stream is still queued. A block cut from it for another
            # stream has to wait for that.
            stream = self.stream()
            raw.uses = {stream: self._event(stream)}
        return raw

    @override
    def free(self, raw: RawMemory, uses: Uses) -> None:
        # torch orders freed memory by the stream that it was allocated on, and does not know the others.
        for use in uses.values():
            self._runtime.synchronize(use.event)
        raw.tensor = None
        self._ledger.reserved -= raw.size
        self._held -= raw.size
        if self._held == 0:
            self._runtime.emptied(self.place)

    @override
    def settle(self, block: Block) -> None:
        block.uses = {stream: use for stream, use in block.uses.items() if not self._runtime.finished(use.event)}

    # Order.

    def _event(self, stream: Hashable) -> Use:
        self._events += 1
        return Use(self._events, self._runtime.record(stream))

    def _ready(self, block: Block, stream: Hashable) -> bool:
        """True if the caller may use a block at once."""
        own = {stream} if self._ordering == "stream" else set()
        if not block.uses.keys() <= own:
            self.settle(block)
        return block.uses.keys() <= own

    def _order(self, block: Block, stream: Hashable) -> bool:
        """Makes the stream, or for host memory the caller, come after a block's uses; True if there are any."""
        self.settle(block)
        if self._ordering == "host":
            others, block.uses = list(block.uses.values()), {}
            for use in others:
                self._runtime.synchronize(use.event)
        else:
            others = [use for user, use in block.uses.items() if user != stream]
            for use in others:
                self._runtime.wait(stream, use.event)
        return bool(others)
