"""`UnifiedMemoryPool`: memory that is used again at the same address, in the right order, and accounted for."""

from __future__ import annotations

import copy
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import cast

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.memory import stats as figures
from dilated_attention_pytorch.core.memory.arena import Arena
from dilated_attention_pytorch.core.memory.blocks import ALIGNMENT, Block, Place, aligned
from dilated_attention_pytorch.core.memory.handle import Handle, Streams, Ticket
from dilated_attention_pytorch.core.memory.runtime import Runtime
from dilated_attention_pytorch.core.memory.stats import PoolStats
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES
from dilated_attention_pytorch.core.memory.strategies.base import Exhausted
from dilated_attention_pytorch.core.torch_private import uncompiled


class PoolExhausted(MemoryError):
    """No memory within the pool's limit, or none left in the system; the message names who holds most."""


class UnifiedMemoryPool:
    """Lends buffers that keep their address and their place: exchange buffers, workspaces of graphs, pinned staging.

    PyTorch pools device memory already. Activations, small tensors and anything that autograd saves do better there:
    this pool may lend a block again as soon as its handle is released. Blocks are not filled unless asked, are lent to
    one borrower at a time, and are reused in the order of streams: at once on the stream that used them last, after a
    wait on another. Any thread may borrow and release; a forked child begins with an empty pool. During the capture of
    a CUDA graph the graph's own memory serves, so a workspace that must keep its address is borrowed before and held
    as long as the graph is.

    Args:
        strategy: `"simple"` keeps exact sizes, `"bucketed"` size classes, `"fragment_aware"` slabs with best fit and
            coalescing, `"numa"` size classes per NUMA node, `"adaptive"` chooses among them by the sizes it sees.
        limit: bytes the pool may hold over all devices; None for no limit.
        runtime: what stands between the pool and the devices; for tests.

    Raises:
        ValueError: an unknown strategy, a limit that is not positive.
        TypeError: a limit that is not an int.

    Example:
        >>> pool = UnifiedMemoryPool("bucketed", limit=2**20)
        >>> with pool.borrow((4, 8), torch.float32, "cpu", purpose="rows") as handle:
        ...     handle.tensor.fill_(1.0).sum().item()
        32.0
        >>> pool.stats().current, pool.stats().misses
        (0, 1)
    """

    @uncompiled
    def __init__(self, strategy: str = "adaptive", limit: int | None = None, *, runtime: Runtime | None = None) -> None:
        if not isinstance(strategy, str) or strategy not in STRATEGIES:
            raise ValueError(f"expected strategy to be one of {list(STRATEGIES)}, got {check.quoted(strategy)}")
        if limit is not None:
            limit = check.check_positive_int("limit", limit)
        self.strategy = strategy
        self.limit = limit
        self._given_runtime = runtime
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        """Empties the pool: at the start, and in a forked child."""
        self._lock = threading.Lock()
        self._runtime = Runtime() if self._given_runtime is None else self._given_runtime
        self._arenas: dict[Place, Arena] = {}
        self._handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()  # by id of the tensor
        self._ledger = PoolStats()
        self._dropped: deque[Ticket] = deque()  # of handles dropped without a release; no lock guards it

    @uncompiled
    def borrow(
        self,
        shape: int | Sequence[int],
        dtype: torch.dtype,
        device: str | torch.device,
        purpose: str = "unnamed",
        *,
        pinned: bool = False,
        zero: bool = False,
    ) -> Handle:
        """Lends a contiguous tensor, not filled; ready for work on the current stream of its device.

        Args:
            shape: of the tensor.
            dtype: of its elements.
            device: `"cpu"` or a CUDA device.
            purpose: the name under which statistics and errors count the block.
            pinned: page-locked host memory (`device="cpu"`); ordinary memory if there is no CUDA.
            zero: fill it with zeros.

        Returns:
            The handle, a context manager with `tensor` and `release`.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a negative size, a device that is not there, pinned memory on a device.
            PoolExhausted: over the limit even after trimming, out of memory, or more bytes than torch can count.
        """
        sizes = _sizes(shape)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"expected dtype to be a torch.dtype, got {check.quoted(dtype)}")
        where = check.check_device("device", device)
        if not isinstance(purpose, str):
            raise TypeError(f"expected purpose to be a str, got {check.shown(purpose)}")
        check.check_bool("pinned", pinned)
        check.check_bool("zero", zero)
        place = self._runtime.place(where, pinned)
        size = math.prod(sizes) * dtype.itemsize
        if size == 0 and math.prod(max(1, n) for n in sizes) >= 1 << 63:
            raise ValueError(f"expected shape to have strides of 64 bits, got ({check.listed(sizes)})")
        # An inference tensor may not be written to once inference mode is over.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if self._runtime.capturing(place):
                tensor = torch.empty(sizes, dtype=dtype, device=place.device, pin_memory=pinned)
                with self._lock:
                    self._ledger.bypassed += 1
                handle = self._handle(Ticket(None, None, size, 0, purpose, None), tensor)
            else:
                with self._lock:
                    self._take_dropped()
                    ticket = self._lend(place, size, purpose)
                    if ticket.block is None:
                        tensor = torch.empty(sizes, dtype=dtype, device=self._runtime.empty_device(place))
                    else:
                        tensor = ticket.block.view(size).view(dtype).view(sizes)
                    handle = self._handles[id(tensor)] = self._handle(ticket, tensor)
        if zero:
            handle.tensor.zero_()
        return handle

    @uncompiled
    def release(self, tensor: Tensor, stream: Streams = None) -> None:
        """Releases the handle whose tensor this is.

        Args:
            tensor: the very object that a live handle of this pool lends.
            stream: as in `Handle.release`.

        Raises:
            ValueError: a tensor that this pool does not lend, or no longer does.
            TypeError: an object that is not a tensor, or not a stream.
        """
        check.check_dense("tensor", tensor)
        handle = self._handles.get(id(tensor))
        if handle is None or handle.released or handle.tensor is not tensor:
            raise ValueError(
                "expected a tensor that this pool lends, the object itself, got one that is foreign or already "
                f"released: shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
            )
        handle.release(stream)

    def stats(self) -> PoolStats:
        """A snapshot of everything counted."""
        with self._lock:
            self._take_dropped()
            result = copy.deepcopy(self._ledger)
            unusable = 0
            for place, arena in self._arenas.items():
                some, free = figures.fragmentation((b.size for b in arena.strategy.free_blocks()), arena.recent)
                unusable += some
                result.free += free
                result.strategies[str(place)] = arena.strategy.describe()
            result.fragmentation = unusable / result.free if result.free else 0.0
            return result

    def report(self) -> str:
        """The statistics as a table."""
        return figures.table(self.stats(), self.limit)

    def trim(self) -> int:
        """Gives back the memory in which no block is lent, after the work that still uses it; returns the bytes."""
        with self._lock:
            self._take_dropped()
            return self._trim()

    def __repr__(self) -> str:
        return f"UnifiedMemoryPool(strategy={self.strategy!r}, limit={self.limit})"

    def _handle(self, ticket: Ticket, tensor: Tensor) -> Handle:
        return Handle(ticket, tensor, self._release, self._dropped)

    def _release(self, handle: Handle, stream: Streams) -> None:
        """`Handle.release`, under the pool's lock."""
        with self._lock:
            ticket, arena = handle._ticket, handle._ticket.arena
            if handle._tensor is None:
                return
            # Handles that came over a fork, or that serve a graph, have nothing to give back.
            if arena is not None and self._arenas.get(arena.place) is arena:
                if ticket.block is not None and self._runtime.capturing(arena.place):
                    raise RuntimeError(
                        f"expected {check.quoted(ticket.purpose)}, borrowed before the capture of a graph, to be held "
                        "as long as the graph is, got a release during the capture"
                    )
                if stream is None:
                    streams: Iterable[Hashable] = {ticket.stream, arena.stream()}
                elif isinstance(stream, list | tuple | set | frozenset):
                    streams = stream
                else:
                    streams = [cast(Hashable, stream)]
                self._take_back(ticket, arena, streams)
                handle._finalizer.detach()
            self._handles.pop(id(handle._tensor), None)
            handle._tensor = None

    # With the lock held.

    def _lend(self, place: Place, size: int, purpose: str) -> Ticket:
        arena = self._arenas.get(place)
        if arena is None:
            arena = Arena(place, self._runtime, STRATEGIES[self.strategy], self._ledger, self.limit)
            self._arenas[place] = arena
        stream = arena.stream()
        block, hit, waited = (None, True, False) if size == 0 else self._take(arena, size, stream, purpose)
        if block is not None:
            arena.recent.append(size)
        given = 0 if block is None else block.size
        self._ledger.lend_to(purpose, str(place), size, given, hit=hit, waited=waited)
        return Ticket(arena, block, size, given, purpose, stream)

    def _take(self, arena: Arena, size: int, stream: Hashable, purpose: str) -> tuple[Block, bool, bool]:
        with suppress(Exhausted):
            return arena.take(size, stream)
        self._trim()
        try:
            return arena.take(size, stream)
        except Exhausted as error:
            limit = "no limit" if self.limit is None else f"a limit of {self.limit} bytes"
            units = "" if aligned(size) == size else f" ({aligned(size)} in whole units of {ALIGNMENT})"
            raise PoolExhausted(
                f"expected {size} bytes{units} for {check.quoted(purpose)} on {arena.place} to fit into {limit} beside "
                f"the {self._ledger.reserved} bytes held; refused by {error}. Largest owners: "
                f"{figures.owners(self._ledger.by_purpose)}"
            ) from error

    def _take_back(self, ticket: Ticket, arena: Arena, streams: Iterable[Hashable] | None) -> None:
        if ticket.block is not None:
            arena.give(ticket.block, ticket.stream, streams)  # first: it refuses objects that are not streams
        self._ledger.take_back_from(ticket.purpose, str(arena.place), ticket.size, ticket.given)

    def _take_dropped(self) -> None:
        """Takes back the blocks of handles that were dropped, unless a graph is being captured."""
        while self._dropped:
            ticket = self._dropped[0]
            if ticket.arena is not None:
                if self._runtime.capturing(ticket.arena.place):
                    return
                self._take_back(ticket, ticket.arena, None)
                self._ledger.dropped += 1
            self._dropped.popleft()

    def _trim(self) -> int:
        before = self._ledger.reserved
        for arena in self._arenas.values():
            arena.strategy.trim()
        self._ledger.trims += 1
        return before - self._ledger.reserved


def _sizes(shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, Sequence) and not isinstance(shape, str | bytes):
        return tuple(
            n if type(n) is int and 0 <= n < 1 << 63 else check.check_int(f"shape[{i}]", n, 0)  # a borrow is short
            for i, n in enumerate(shape)
        )
    try:
        return (check.check_int("shape", shape, 0),)
    except TypeError as error:
        raise TypeError(f"expected shape to be an int or a sequence of ints, got {check.shown(shape)}") from error


_pools: weakref.WeakSet[UnifiedMemoryPool] = weakref.WeakSet()
# A child's copies of its parent's raw memory: freeing them would call a CUDA that a child may not touch. What is lent
# at the fork comes in with the parent's `_dropped`, where the finalizers of inherited handles put their tickets.
_inherited: list[object] = []


def _after_fork() -> None:
    for pool in list(_pools):
        _inherited.append((pool._arenas, pool._dropped, pool._runtime))
        pool._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
