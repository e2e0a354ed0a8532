"""One place of a pool: its strategy, its raw memory, and the order of work on what is used again.

The order of preference is that of RMM's stream-ordered resources: a free block that the caller's stream used last, or
whose uses are over; then another stream's block, for which the caller's stream waits; then new memory. Host memory,
which the processor touches without a stream, waits only where there is no more to be had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from dilated_attention_pytorch.core.memory.blocks import Allocation, Block, Place, Use, Uses
from dilated_attention_pytorch.core.memory.runtime import Runtime
from dilated_attention_pytorch.core.memory.strategies.base import Exhausted, Strategy

_RECENT = 256  # sizes that say what a request is like
_MOST = (1 << 63) - 1  # bytes that torch can ask for


@dataclass
class Budget:
    """Bytes that a pool holds, of all its places.

    Attributes:
        limit: the most it may hold, None for no limit.
        reserved: what it holds.
        peak: the highest so far.
    """

    limit: int | None
    reserved: int = 0
    peak: int = 0

    def take(self, size: int) -> None:
        """Books memory before it is allocated; raises `Exhausted` over the limit."""
        if size > _MOST:
            raise Exhausted("torch, which counts bytes in 64 bits")
        if self.limit is not None and self.reserved + size > self.limit:
            raise Exhausted("the limit")
        self.reserved += size


class Arena:
    """What a pool keeps of one place. Called with the pool's lock held; the strategy's `Source`."""

    def __init__(self, place: Place, runtime: Runtime, strategy: type[Strategy], budget: Budget) -> None:
        self.place = place
        self.budget = budget
        self.recent: deque[int] = deque(maxlen=_RECENT)
        self._runtime = runtime
        self._ordering = runtime.ordering(place)
        self._events = 0
        self._held = 0
        self._streams: set[Hashable] = set()  # every stream that borrowed or released here
        self.strategy = strategy(self)

    def stream(self) -> Hashable:
        """The caller's stream; None where work has no order to keep."""
        if self._ordering == "none":
            return None
        stream = self._runtime.current_stream(self.place)
        self._streams.add(stream)
        return stream

    def take(self, size: int, stream: Hashable) -> tuple[Block, bool, bool]:
        """A block, whether it was there already, and whether somebody has to wait for it. Raises `Exhausted`."""
        block = self.strategy.find(size, lambda found: self._ready(found, stream))
        if block is not None:
            return block, True, False
        if self._ordering == "stream":
            block = self.strategy.find(size, None)
            if block is not None:
                return block, True, self._order(block, stream)
        return self.strategy.grow(size), False, False

    def take_waiting(self, size: int) -> Block | None:
        """A free block of host memory, once the devices are done with it."""
        block = self.strategy.find(size, None)
        if block is not None:
            self._order(block, None)
        return block

    def give(self, block: Block, borrower: Hashable, streams: Iterable[Hashable] | None) -> None:
        """Takes a block back.

        Args:
            block: which.
            borrower: the stream that it was made ready for.
            streams: those that used it. None: the borrower's and every one that was seen here.
        """
        if self._ordering != "none":
            used = self._streams | {borrower} if streams is None else set(streams)
            events = {stream: self._event(stream) for stream in used}
            self._streams |= used
            # What the borrower's stream waited for is behind its new event. Others did not wait.
            uses: Uses = {} if borrower in used else block.uses
            block.uses = {**uses, **events}
        else:
            for stream in streams or ():
                if stream is not None:
                    self._runtime.record(stream)  # no order to keep, but what is no stream is refused
        self.strategy.give(block)

    def trim(self) -> None:
        """Gives back what is free."""
        self.strategy.trim()

    # What the strategy asks for.

    def node(self) -> int | None:
        """See `Source`."""
        return self._runtime.node(self.place)

    def allocate(self, size: int, node: int | None = None) -> Allocation:
        """See `Source`."""
        self.budget.take(size)
        try:
            tensor = self._runtime.allocate(self.place, size, node)
        except BaseException as error:
            self.budget.reserved -= size
            if isinstance(error, MemoryError | RuntimeError):  # torch raises RuntimeErrors for want of memory
                raise Exhausted(str(error).partition("\n")[0]) from error
            raise
        self.budget.peak = max(self.budget.peak, self.budget.reserved)
        self._held += size
        allocation = Allocation(tensor, size, node)
        if self._ordering == "stream":
            # torch gives out memory whose last work on this stream is still queued. A block cut from it for another
            # stream has to wait for that.
            stream = self.stream()
            allocation.uses = {stream: self._event(stream)}
        return allocation

    def free(self, allocation: Allocation, uses: Uses) -> None:
        """See `Source`."""
        # torch orders freed memory by the stream that it was allocated on and knows nothing of the others.
        for use in uses.values():
            self._runtime.synchronize(use.event)
        allocation.tensor = None
        self.budget.reserved -= allocation.size
        self._held -= allocation.size
        if self._held == 0:
            self._runtime.emptied(self.place)

    def settle(self, block: Block) -> None:
        """See `Source`."""
        if not block.uses:
            return
        over = [stream for stream, use in block.uses.items() if self._runtime.finished(use.event)]
        for stream in over:
            del block.uses[stream]

    # Order.

    def _event(self, stream: Hashable) -> Use:
        self._events += 1
        return Use(self._runtime.record(stream), self._events)

    def _ready(self, block: Block, stream: Hashable) -> bool:
        """Whether the caller may use a block at once."""
        if self._ordering == "stream" and block.uses.keys() <= {stream}:
            return True
        if block.uses:
            self.settle(block)
        return block.uses.keys() <= {stream} if self._ordering == "stream" else not block.uses

    def _order(self, block: Block, stream: Hashable) -> bool:
        """Makes the stream, or for host memory the caller, come after a block's uses; whether there are any."""
        self.settle(block)
        others = [(user, use) for user, use in block.uses.items() if self._ordering == "host" or user != stream]
        for user, use in others:
            if self._ordering == "stream":
                self._runtime.wait(stream, use.event)
            else:
                self._runtime.synchronize(use.event)
                del block.uses[user]
        return bool(others)
