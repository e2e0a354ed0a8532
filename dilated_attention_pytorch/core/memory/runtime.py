"""The few calls through which a pool touches a device; tests pass an object of their own with the same methods.

`torch.cuda.MemPool` serves here, for device memory: blocks that live for a whole training run get segments of their
own, so they neither pin down nor split the segments of the caching allocator that activations come and go in, and
dropping the MemPool gives them back to the driver. It is entered around one raw allocation and never around user
code: `use_mem_pool` holds for one thread, so it would miss what a backward thread allocates. Host memory has no
counterpart.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory import topology
from dilated_attention_pytorch.core.memory.blocks import Place
from dilated_attention_pytorch.core.validation import quoted, shown

# What has to come after a block's last use. "none": the processor is done when a call returns. "stream": work is
# queued, and later work of the same stream comes after it by itself. "host": devices may still read or write the
# memory, and the processor touches it at any moment.
Ordering = Literal["none", "stream", "host"]


class Runtime:
    """The devices that torch has: the CPU, page-locked host memory, CUDA."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, torch.cuda.MemPool] = {}

    def place(self, device: torch.device, pinned: bool) -> Place:
        """The place meant, with the device's number; ValueError for a device that is not there."""
        if device.type == "cpu":
            return Place(torch.device("cpu"), pinned)
        if device.type != "cuda":
            raise ValueError(f"expected device to be of type 'cpu' or 'cuda', got {quoted(str(device))}")
        count = torch.cuda.device_count()
        index = device.index
        if index is None and count:
            index = torch.cuda.current_device()
        if index is None or index >= count:
            raise ValueError(
                f"expected device to be there, got {quoted(str(device))} where torch sees {count} CUDA devices"
            )
        if pinned:
            raise ValueError(f"expected device='cpu' with pinned=True, which is host memory, got {quoted(str(device))}")
        return Place(torch.device("cuda", index))

    def ordering(self, place: Place) -> Ordering:
        """How work on the place's memory is ordered."""
        if place.device.type == "cuda":
            return "stream"
        return "host" if place.pinned and torch.cuda.is_available() else "none"

    def node(self, place: Place) -> int | None:
        """The NUMA node that memory for the caller should lie on; None if there is no choice."""
        if place.device.type != "cpu" or len(topology.nodes()) < 2:
            return None
        near_device = place.pinned and torch.cuda.is_available()
        node = topology.cuda_node(torch.cuda.current_device()) if near_device else None
        # If nobody knows the device's node, the caller may: `torchrun --numa-binding` binds it there.
        return topology.current_node() if node is None else node

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        """Raw memory, uint8 `(size,)`, not filled; RuntimeError or MemoryError if there is none left."""
        # Without inference mode, whoever asks first: an inference tensor may not be written to once the mode is over.
        with torch.inference_mode(False), torch.no_grad():
            if place.device.type == "cuda":
                if place.device not in self._pools:
                    with torch.cuda.device(place.device):
                        self._pools[place.device] = torch.cuda.MemPool()
                with torch.cuda.use_mem_pool(self._pools[place.device], place.device):
                    return torch.empty(size, dtype=torch.uint8, device=place.device)
            lock = place.pinned and torch.cuda.is_available()
            if node is not None or (lock and os.name == "posix"):
                return topology.allocate_pages(size, node, lock=lock)
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=lock)

    def empty_device(self, place: Place) -> torch.device:
        """The device of tensors of no bytes."""
        return place.device

    def emptied(self, place: Place) -> None:
        """Called when everything allocated at a place is given back."""
        self._pools.pop(place.device, None)

    def current_stream(self, place: Place) -> Hashable:
        """The calling thread's stream there."""
        return torch.cuda.current_stream(place.device if place.device.type == "cuda" else None)

    def record(self, stream: Hashable) -> Any:
        """An event behind everything queued on the stream."""
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"expected stream to be a torch.cuda.Stream, got {shown(stream)}")
        return stream.record_event()

    def finished(self, event: Any) -> bool:
        """True if the work before the event is done."""
        return bool(event.query())

    def wait(self, stream: Hashable, event: Any) -> None:
        """Makes the stream wait for the event."""
        assert isinstance(stream, torch.cuda.Stream)
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Makes the caller wait for the event."""
        event.synchronize()

    def capturing(self, place: Place) -> bool:
        """True while the calling thread's stream is captured into a graph."""
        # Asking does not begin CUDA where nobody has.
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
