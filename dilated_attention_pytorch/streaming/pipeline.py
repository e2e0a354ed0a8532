"""Reading, copying in, computing, copying out and writing, all at once on neighbouring ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.streaming import pages
from dilated_attention_pytorch.streaming.passes import Load, Loaded, Pass
from dilated_attention_pytorch.streaming.ranges import BUFFERS
from dilated_attention_pytorch.streaming.sources import HostTensor, Writer, pinned

_ALIGNMENT = 512  # bytes, as torch's own allocator aligns on CUDA

Writers = dict[str, Writer]
Results = dict[str, Tensor]
# Each result where the device left it, and the staging memory it travels through; None where it needs none.
Leaving = dict[str, tuple[Tensor, Tensor | None]]


class RangeStep(NamedTuple):
    """One range of the walk."""

    number: int
    slot: int  # which of the buffers of each kind it uses
    start: int
    stop: int
    loads: list[Load]  # what to bring in for it


# A reader thread fills staging memory, a writer thread empties it, and on CUDA two copy streams and a compute stream
# hand ranges to one another by events. Two buffers of each kind: while one is used the next is filled. Results stay
# referenced until their copy has ended, so no allocator needs to be told about streams.
def run(work: Pass, writers: Writers, device: torch.device, pool: UnifiedMemoryPool, tick: Callable[[], None]) -> None:
    """Walks a pass over all its ranges; results without a writer are dropped; `tick` is called when one is written."""
    transport = (_Cuda if device.type == "cuda" else _Host)(work, writers, device, pool)
    steps = transport.steps
    # Now that all memory is there, nothing refuses the call any more.
    for writer in writers.values():
        if isinstance(writer, HostTensor):
            writer.begin()
    reading, writing = _Lane("streaming-read"), _Lane("streaming-write")

    def read_ahead() -> None:
        if len(reading.tasks) < len(steps):
            reading.submit(transport.fill, steps[len(reading.tasks)])

    try:
        for _ in range(BUFFERS):
            read_ahead()
        for step in steps:
            reading.tasks[step.number].result()
            loaded = transport.bring(step)
            if transport.copies_inputs:
                read_ahead()  # staging is free once the copy has ended, which `fill` waits for
            # The staging memory of results is free once the last range that used it is written.
            if step.number >= BUFFERS:
                writing.tasks[step.number - BUFFERS].result()
            results = transport.compute(step, loaded)
            if not transport.copies_inputs:
                read_ahead()  # staging was computed on
            writing.submit(transport.write, step, transport.take(step, results), tick)
        for task in writing.tasks[-BUFFERS:]:
            task.result()
    finally:
        # Whatever a source, a sink or the computation raises comes through when no thread runs and no copy flies.
        reading.close()
        writing.close()
        transport.close()
    for writer in writers.values():
        writer.commit()


class _Lane:
    """A thread that does tasks in order."""

    def __init__(self, name: str) -> None:
        self.tasks: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, name)
        self.close = partial(self._thread.shutdown, wait=True, cancel_futures=True)
        # A mode is a thread's own.
        self._inference = torch.is_inference_mode_enabled()

    def submit(self, task: Callable[..., None], *args: Any) -> None:
        self.tasks.append(self._thread.submit(self._do, self.tasks[-1:], task, *args))

    def _do(self, earlier: list[Future[None]], task: Callable[..., None], *args: Any) -> None:
        # After a failure nothing is done any more: a write would leave a gap that its sink cannot know of.
        for done in earlier:
            done.result()
        with torch.inference_mode(self._inference), torch.no_grad():
            task(*args)


class _Host:
    """The CPU computes on the staging memory itself."""

    copies_inputs = False  # to the device, through pinned memory

    def __init__(self, work: Pass, writers: Writers, device: torch.device, pool: UnifiedMemoryPool) -> None:
        self.work, self.writers, self.pool = work, writers, pool
        self.steps = [RangeStep(i, i % BUFFERS, *x, work.loads(*x)) for i, x in enumerate(work.plan.ranges)]
        self.lent = ExitStack()
        # Nothing needs giving back if borrowing fails half-way: a dropped handle returns its block.
        self.staging = self.borrow(max(_size(self.staged(step)) for step in self.steps), "staging of inputs")

    def borrow(self, size: int, purpose: str, device: torch.device | None = None) -> list[Tensor]:
        """Buffers until `close`, in host memory if no device is named."""
        where, is_pinned = device or torch.device("cpu"), self.copies_inputs and device is None
        lend = partial(self.pool.borrow, purpose=f"streaming: {purpose}", pinned=is_pinned)
        return [self.lent.enter_context(lend((size,), torch.uint8, where)).tensor for _ in range(BUFFERS)]

    def staged(self, step: RangeStep) -> list[Load]:
        """The inputs that go through staging memory."""
        return step.loads

    def fill(self, step: RangeStep) -> None:
        """Reads a range into staging memory, in the reader's thread."""
        staged = self.staged(step)
        for load, out in zip(staged, _views(self.staging[step.slot], staged), strict=True):
            reader = self.work.readers[load.name]
            if load.branch is None:
                reader.read_into(load.start, load.stop, out)
            else:
                reader.gather_into(load.branch, load.start, load.stop, out)

    def bring(self, step: RangeStep) -> Loaded:
        """The tensors that the range is computed from."""
        pages.trim()  # on a CPU the limit is one on resident memory
        return _loaded(self.staging[step.slot], step.loads)

    def compute(self, step: RangeStep, loaded: Loaded) -> Results:
        """The results that somebody wants."""
        results = self.work.compute(step.start, step.stop, loaded)
        return {name: x for name, x in results.items() if name in self.writers}

    def take(self, step: RangeStep, results: Results) -> Leaving:
        """Sends the results on their way to the host."""
        return {name: (x, x) for name, x in results.items()}

    def write(self, step: RangeStep, leaving: Leaving, tick: Callable[[], None]) -> None:
        """Writes a range, in the writer's thread."""
        for name, (_, host) in leaving.items():
            writer = self.writers[name]
            if host is not None:
                writer.write(step.start, host)
            elif isinstance(writer, HostTensor):
                writer.landed(step.start, step.stop)
        tick()

    def close(self) -> None:
        """Gives all memory back."""
        self.lent.close()


class _Cuda(_Host):
    """Copies through pinned staging memory; from and to pinned tensors without."""

    copies_inputs = True

    def __init__(self, work: Pass, writers: Writers, device: torch.device, pool: UnifiedMemoryPool) -> None:
        super().__init__(work, writers, device, pool)
        self.inputs = self.borrow(max(_size(step.loads) for step in self.steps), "inputs", device)
        plan = work.plan
        staged = [name for name, writer in writers.items() if pinned(writer, 0, 1) is None]
        results = min(plan.length, plan.problem.seq_len) * plan.sizes.results(plan.sizes.dtype.itemsize)
        room = results + len(staged) * _ALIGNMENT if staged else 0
        self.outgoing = self.borrow(room, "staging of results")
        self.copy_in, self.computing, self.copy_out = (torch.cuda.Stream(device) for _ in range(3))
        for stream in (self.copy_in, self.computing, self.copy_out):
            stream.wait_stream(torch.cuda.current_stream(device))  # what was lent may still be in use there
        # Per buffer: its inputs are on the device, its range is computed, its results are on the host.
        self.arrived, self.computed, self.left = ([torch.cuda.Event() for _ in range(BUFFERS)] for _ in range(3))

    @override
    def staged(self, step: RangeStep) -> list[Load]:
        return [load for load in step.loads if self._pinned(load) is None]

    @override
    def fill(self, step: RangeStep) -> None:
        self.arrived[step.slot].synchronize()  # the staging memory's last range is on the device
        super().fill(step)

    @override
    def bring(self, step: RangeStep) -> Loaded:
        staged, loaded = (
            _loaded(self.staging[step.slot], self.staged(step)),
            _loaded(self.inputs[step.slot], step.loads),
        )
        self.copy_in.wait_event(self.computed[step.slot])  # the device memory's last range is computed
        with torch.cuda.stream(self.copy_in):
            for load in step.loads:
                host = staged[load.key] if load.key in staged else self._pinned(load)
                assert host is not None
                _copy(loaded[load.key], host)
            self.arrived[step.slot].record()
        return loaded

    @override
    def compute(self, step: RangeStep, loaded: Loaded) -> Results:
        with torch.cuda.stream(self.computing):
            self.arrived[step.slot].wait()
            # Copies of batch rows need each of them in one piece.
            results = {name: x.contiguous() for name, x in super().compute(step, loaded).items()}
            self.computed[step.slot].record()
        return results

    @override
    def take(self, step: RangeStep, results: Results) -> Leaving:
        direct = {name: pinned(self.writers[name], step.start, step.stop) for name in results}
        staging = _views(self.outgoing[step.slot], [x for name, x in results.items() if direct[name] is None])
        leaving: Leaving = {name: (x, next(staging) if direct[name] is None else None) for name, x in results.items()}
        with torch.cuda.stream(self.copy_out):
            self.computed[step.slot].wait()
            for name, (x, staged) in leaving.items():
                host = direct[name] if staged is None else staged
                assert host is not None
                _copy(host, x)
            self.left[step.slot].record()
        return leaving

    @override
    def write(self, step: RangeStep, leaving: Leaving, tick: Callable[[], None]) -> None:
        self.left[step.slot].synchronize()
        super().write(step, leaving, tick)

    @override
    def close(self) -> None:
        try:
            for stream in (self.copy_in, self.computing, self.copy_out):
                stream.synchronize()  # no copy may fly when its memory is lent to others
        finally:
            super().close()

    def _pinned(self, load: Load) -> Tensor | None:
        """Host memory to copy an input from without staging, which has whole ranges only."""
        return pinned(self.work.readers[load.name], load.start, load.stop) if load.branch is None else None


def _copy(to: Tensor, x: Tensor) -> None:
    """A copy between host and device that the host does not wait for; each batch row is contiguous in both."""
    for into, row in zip(to, x, strict=True):
        into.copy_(row, non_blocking=True)


def _size(loads: list[Load]) -> int:
    """Bytes of a buffer for all of them."""
    return sum(ceil_div(load.nbytes, _ALIGNMENT) * _ALIGNMENT for load in loads)


def _views(buffer: Tensor, wanted: Iterable[Load | Tensor]) -> Iterator[Tensor]:
    """Tensors of such shapes and dtypes, side by side in a buffer."""
    at = 0
    for x in wanted:
        yield buffer[at : at + x.nbytes].view(x.dtype).view(x.shape)
        at += ceil_div(x.nbytes, _ALIGNMENT) * _ALIGNMENT


def _loaded(buffer: Tensor, loads: list[Load]) -> Loaded:
    """What a buffer holds after loading."""
    return dict(zip((load.key for load in loads), _views(buffer, loads), strict=True))
