"""Reading, copying in, computing, copying out and writing, all at once on neighbouring ranges.

A reader thread fills staging memory, a writer thread empties it, and on CUDA two copy streams and a compute stream hand
ranges to one another by events. Two buffers of each kind: while one is used the next is filled. Results stay referenced
until their copy has ended, so no allocator needs to be told about streams.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.streaming import pages
from dilated_attention_pytorch.streaming.passes import Load, Loaded, Pass
from dilated_attention_pytorch.streaming.ranges import BUFFERS
from dilated_attention_pytorch.streaming.sources import Writer

_ALIGNMENT = 512  # bytes, as torch's own allocator aligns on CUDA

Results = dict[str, Tensor]
# Each result where the device left it, and the staging memory it travels through; None where it needs none.
Leaving = dict[str, tuple[Tensor, Tensor | None]]


def run(
    work: Pass, writers: dict[str, Writer], device: torch.device, pool: UnifiedMemoryPool, tick: Callable[[], None]
) -> None:
    """Walks a pass over all its ranges.

    Args:
        work: what is computed.
        writers: where results go; those without a writer are dropped.
        device: where it is computed.
        pool: lends the staging and device buffers.
        tick: called when a range is written.

    Raises:
        Exception: whatever a source, a sink or the computation raises; by then no thread runs and no copy flies.
    """
    ranges = work.plan.ranges
    loads = [work.loads(*bounds) for bounds in ranges]
    transport = (
        _Cuda(work, writers, device, pool, loads) if device.type == "cuda" else _Host(work, writers, pool, loads)
    )
    reads: list[Future[None]] = []
    writes: list[Future[None]] = []
    reading = ThreadPoolExecutor(1, "streaming-read")
    writing = ThreadPoolExecutor(1, "streaming-write")

    def read_ahead() -> None:
        number = len(reads)
        if number < len(ranges):
            reads.append(reading.submit(transport.fill, number, loads[number]))

    try:
        for _ in range(BUFFERS):
            read_ahead()
        for number, (start, stop) in enumerate(ranges):
            reads[number].result()
            loaded = transport.bring(number, loads[number])
            if transport.copies_inputs:
                read_ahead()  # staging is free once the copy has ended, which `fill` waits for
            if number >= BUFFERS:
                writes[number - BUFFERS].result()
            results = transport.compute(number, start, stop, loaded)
            if not transport.copies_inputs:
                read_ahead()
            leaving = transport.take(number, start, stop, results)
            writes.append(writing.submit(transport.write, number, start, stop, leaving, tick))
        for future in writes[-BUFFERS:]:
            future.result()
    finally:
        for executor in (reading, writing):
            executor.shutdown(wait=True, cancel_futures=True)
        transport.close()
        work.reset()
    for writer in writers.values():
        writer.commit()


class _Host:
    """The CPU computes on the staging memory itself."""

    copies_inputs = False

    def __init__(
        self, work: Pass, writers: dict[str, Writer], pool: UnifiedMemoryPool, loads: list[list[Load]]
    ) -> None:
        self.work, self.writers = work, writers
        self.lent = ExitStack()
        # Nothing needs giving back if borrowing fails half-way: a dropped handle returns its block.
        self.staging = self.borrow(pool, max(_size(self.staged(x)) for x in loads), "cpu", "staging of inputs")

    def borrow(
        self, pool: UnifiedMemoryPool, size: int, device: torch.device | str, purpose: str, *, pinned: bool = False
    ) -> list[Tensor]:
        """Buffers until `close`."""
        handles = [
            pool.borrow((size,), torch.uint8, torch.device(device), purpose=f"streaming: {purpose}", pinned=pinned)
            for _ in range(BUFFERS)
        ]
        return [self.lent.enter_context(handle).tensor for handle in handles]

    def staged(self, loads: list[Load]) -> list[Load]:
        """Those that go through staging memory."""
        return loads

    def fill(self, number: int, loads: list[Load]) -> None:
        """Reads a range into staging memory, in the reader's thread."""
        for load, out in _views(self.staging[number % BUFFERS], self.staged(loads)):
            reader = self.work.readers[load.name]
            if load.branch is None:
                reader.read_into(load.start, load.stop, out)
            else:
                reader.gather_into(load.branch, load.start, load.stop, out)

    def bring(self, number: int, loads: list[Load]) -> Loaded:
        """The tensors that the range is computed from."""
        pages.trim()  # on a CPU the limit is one on resident memory
        return {load.key: x for load, x in _views(self.staging[number % BUFFERS], loads)}

    def compute(self, number: int, start: int, stop: int, loaded: Loaded) -> Results:
        """The results that somebody wants."""
        results = self.work.compute(start, stop, loaded)
        return {name: x for name, x in results.items() if name in self.writers}

    def take(self, number: int, start: int, stop: int, results: Results) -> Leaving:
        """Sends the results on their way to the host."""
        return {name: (x, x) for name, x in results.items()}

    def write(self, number: int, start: int, stop: int, leaving: Leaving, tick: Callable[[], None]) -> None:
        """Writes a range, in the writer's thread."""
        for name, (_, host) in leaving.items():
            if host is None:
                self.writers[name].landed(start, stop)
            else:
                self.writers[name].write(start, host)
        tick()

    def close(self) -> None:
        """Gives all memory back."""
        self.lent.close()


class _Cuda(_Host):
    """Copies through pinned staging memory; from and to pinned tensors without."""

    copies_inputs = True

    def __init__(
        self,
        work: Pass,
        writers: dict[str, Writer],
        device: torch.device,
        pool: UnifiedMemoryPool,
        loads: list[list[Load]],
    ) -> None:
        self.pool = pool
        super().__init__(work, writers, pool, loads)
        self.inputs = self.borrow(pool, max(map(_size, loads)), device, "inputs")
        plan = work.plan
        staged = [name for name, writer in writers.items() if writer.pinned(0, 1) is None]
        results = min(plan.length, plan.problem.seq_len) * plan.sizes.results(plan.sizes.dtype.itemsize)
        room = results + len(staged) * _ALIGNMENT if staged else 0
        self.outgoing = self.borrow(pool, room, "cpu", "staging of results", pinned=True)
        self.copy_in, self.computing, self.copy_out = (torch.cuda.Stream(device) for _ in range(3))
        for stream in (self.copy_in, self.computing, self.copy_out):
            stream.wait_stream(torch.cuda.current_stream(device))  # what was lent may still be in use there
        self.arrived, self.computed, self.left = ([torch.cuda.Event() for _ in range(BUFFERS)] for _ in range(3))

    def borrow(
        self, pool: UnifiedMemoryPool, size: int, device: torch.device | str, purpose: str, *, pinned: bool = False
    ) -> list[Tensor]:
        """See `_Host`; host memory is pinned."""
        return super().borrow(pool, size, device, purpose, pinned=torch.device(device).type == "cpu")

    def staged(self, loads: list[Load]) -> list[Load]:
        """See `_Host`."""
        return [x for x in loads if x.branch is not None or self.work.readers[x.name].pinned(x.start, x.stop) is None]

    def fill(self, number: int, loads: list[Load]) -> None:
        """See `_Host`."""
        self.arrived[number % BUFFERS].synchronize()  # the staging memory's last range is on the device
        super().fill(number, loads)

    def bring(self, number: int, loads: list[Load]) -> Loaded:
        """See `_Host`."""
        slot = number % BUFFERS
        staged = {load.key: x for load, x in _views(self.staging[slot], self.staged(loads))}
        self.copy_in.wait_event(self.computed[slot])  # the device memory's last range is computed
        loaded = {}
        with torch.cuda.stream(self.copy_in):
            for load, x in _views(self.inputs[slot], loads):
                host = staged.get(load.key)
                if host is None:
                    host = self.work.readers[load.name].pinned(load.start, load.stop)
                assert host is not None
                _copy(x, host)
                loaded[load.key] = x
            self.arrived[slot].record()
        return loaded

    def compute(self, number: int, start: int, stop: int, loaded: Loaded) -> Results:
        """See `_Host`."""
        slot = number % BUFFERS
        with torch.cuda.stream(self.computing):
            self.arrived[slot].wait()
            results = super().compute(number, start, stop, loaded)
            results = {name: x.contiguous() for name, x in results.items()}
            self.computed[slot].record()
        return results

    def take(self, number: int, start: int, stop: int, results: Results) -> Leaving:
        """See `_Host`."""
        slot, at = number % BUFFERS, 0
        leaving: Leaving = {}
        with torch.cuda.stream(self.copy_out):
            self.computed[slot].wait()
            for name, x in results.items():
                host = self.writers[name].pinned(start, stop)
                staged = None
                if host is None:
                    host, at = _view(self.outgoing[slot], at, tuple(x.shape), x.dtype)
                    staged = host
                leaving[name] = x, staged
                _copy(host, x)
            self.left[slot].record()
        return leaving

    def write(self, number: int, start: int, stop: int, leaving: Leaving, tick: Callable[[], None]) -> None:
        """See `_Host`."""
        self.left[number % BUFFERS].synchronize()
        super().write(number, start, stop, leaving, tick)

    def close(self) -> None:
        """See `_Host`; waits for what still flies."""
        try:
            for stream in (self.copy_in, self.computing, self.copy_out):
                stream.synchronize()
        finally:
            super().close()


def _copy(to: Tensor, x: Tensor) -> None:
    """A copy between host and device that the host does not wait for; each batch row is contiguous in both."""
    for into, row in zip(to, x, strict=True):
        into.copy_(row, non_blocking=True)


def _size(loads: list[Load]) -> int:
    """Bytes of a buffer for all of them."""
    return sum(-(-load.nbytes // _ALIGNMENT) * _ALIGNMENT for load in loads)


def _views(buffer: Tensor, loads: list[Load]) -> list[tuple[Load, Tensor]]:
    """Where each of them lies in a buffer."""
    found, at = [], 0
    for load in loads:
        x, at = _view(buffer, at, load.shape, load.dtype)
        found.append((load, x))
    return found


def _view(buffer: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A tensor in a buffer from byte `at` on, and where the next one may start."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[at : at + size].view(dtype).view(shape), -(-(at + size) // _ALIGNMENT) * _ALIGNMENT
