"""Devices whose streams run only when told to, behind the protocol that the pool's own runtime has.

Memory is ordinary host memory. Work queued on a stream runs when the test says so, in any order that the streams' own
order and their waits allow: a block that is lent too early is overwritten, and the work that checks it notices.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.blocks import Place

GARBAGE = 0xEE


class FakeEvent:
    def __init__(self) -> None:
        self.done = False


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], bool]] = deque()  # each returns whether it could run

    def __repr__(self) -> str:
        return self.name


class FakeRuntime:
    """Two CUDA devices, page-locked host memory and a CPU, all of them this machine's memory."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.capacity = capacity  # bytes of each allocation: the system's refusal
        self.streams: list[FakeStream] = []
        self.defaults = {torch.device("cuda", i): self.stream(f"cuda:{i} default") for i in range(2)}
        self.raw: list[tuple[Place, int]] = []
        self.empty_places: list[Place] = []
        self.is_capturing = False
        self.nodes: int | None = None
        self._lock = threading.RLock()
        self._local = threading.local()

    # What the pool asks.

    def place(self, device: torch.device, pinned: bool) -> Place:
        if device.type == "cuda" and (device.index or 0) < 2 and not pinned:
            return Place(torch.device("cuda", device.index or 0))
        if device.type == "cpu":
            return Place(torch.device("cpu"), pinned)
        raise ValueError(f"expected a fake device, got {device}, pinned {pinned}")

    def ordering(self, place: Place) -> Any:
        return "stream" if place.device.type == "cuda" else "host" if place.pinned else "none"

    def node(self, place: Place) -> int | None:
        return self.nodes if place.device.type == "cpu" else None

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        if size > self.capacity:
            raise torch.OutOfMemoryError("the fake device is full")
        self.raw.append((place, size))
        tensor = torch.empty(size, dtype=torch.uint8)
        if place.device.type == "cuda":
            # As torch's allocator may do: whoever had this memory before still writes to it, on this stream.
            self.launch(self.current_stream(place), lambda: tensor.fill_(GARBAGE))
        return tensor

    def empty_device(self, place: Place) -> torch.device:
        return torch.device("cpu")

    def emptied(self, place: Place) -> None:
        self.empty_places.append(place)

    def current_stream(self, place: Place) -> FakeStream:
        device = place.device if place.device.type == "cuda" else torch.device("cuda", 0)
        stream: FakeStream = getattr(self._local, "current", {}).get(device, self.defaults[device])
        return stream

    def record(self, stream: Any) -> FakeEvent:
        event = FakeEvent()
        self.launch(stream, lambda: setattr(event, "done", True))
        return event

    def finished(self, event: FakeEvent) -> bool:
        return event.done

    def wait(self, stream: Any, event: FakeEvent) -> None:
        with self._lock:
            stream.queue.append(lambda: event.done)

    def synchronize(self, event: FakeEvent) -> None:
        while not event.done:
            if not any([self.advance(stream) for stream in self.streams]):
                raise AssertionError("streams wait for one another: a deadlock")

    def capturing(self, place: Place) -> bool:
        return self.is_capturing

    # What a test does.

    def stream(self, name: str) -> FakeStream:
        self.streams.append(FakeStream(name))
        return self.streams[-1]

    @contextmanager
    def using(self, stream: FakeStream, device: torch.device) -> Iterator[None]:
        """Makes a stream current in this thread."""
        before = dict(getattr(self._local, "current", {}))
        self._local.current = {**before, device: stream}
        yield
        self._local.current = before

    def launch(self, stream: Any, work: Callable[[], object]) -> None:
        """Queues work; it runs when the stream advances."""
        with self._lock:
            stream.queue.append(lambda: (work(), True)[1])

    def advance(self, stream: FakeStream, steps: int | None = None) -> int:
        """Runs a stream as far as its waits allow, or some steps; how many it ran."""
        ran = 0
        with self._lock:
            while stream.queue and (steps is None or ran < steps) and stream.queue[0]():
                stream.queue.popleft()
                ran += 1
        return ran

    def finish(self) -> None:
        """Runs all streams to their ends."""
        while any([self.advance(stream) for stream in self.streams]):
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for one another: a deadlock"
