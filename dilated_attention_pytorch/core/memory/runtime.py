"""The few calls through which a pool touches a device; tests put streams of their own behind them.

`torch.cuda.MemPool` serves here, for device memory: blocks that live for a whole training run get segments of their
own, so they neither pin down nor split the segments of the caching allocator that activations come and go in, and
dropping the MemPool gives them back to the driver. It is entered around one raw allocation and never around user
code: its `use_mem_pool` holds for one thread, so what a backward thread allocates would miss it. Host memory has no
such thing.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory import topology
from dilated_attention_pytorch.core.memory.blocks import Place

# What comes after a release. "none": the processor is done when a call returns. "stream": work is queued, and work
# of the same stream comes later by itself. "host": devices may read or write it, but the processor touches it at
# any moment.
Ordering = Literal["none", "stream", "host"]


class Runtime(Protocol):
    """A device as a pool sees it."""

    def place(self, device: torch.device, pinned: bool) -> Place:
        """The place meant, with the device's number; ValueError for one that is not there."""

    def ordering(self, place: Place) -> Ordering:
        """How work on the place's memory is ordered."""

    def node(self, place: Place) -> int | None:
        """The NUMA node that memory for the caller should lie on; None where there is no choice."""

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        """Raw memory, flat uint8, not filled. RuntimeError or MemoryError where there is none left."""

    def empty_device(self, place: Place) -> torch.device:
        """The device of tensors there, for those without bytes."""

    def emptied(self, place: Place) -> None:
        """Called when nothing is allocated at a place any more."""

    def current_stream(self, place: Place) -> Hashable:
        """The calling thread's stream there."""

    def record(self, stream: Hashable) -> Any:
        """An event behind everything queued on the stream."""

    def finished(self, event: Any) -> bool:
        """Whether it has been reached."""

    def wait(self, stream: Hashable, event: Any) -> None:
        """Makes the stream wait for it."""

    def synchronize(self, event: Any) -> None:
        """Makes the caller wait for it."""

    def capturing(self, place: Place) -> bool:
        """Whether the calling thread's stream is being captured into a graph."""


class TorchRuntime:
    """The devices that torch has: the CPU, page-locked host memory, CUDA."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, torch.cuda.MemPool] = {}
        self._device_nodes: dict[int, int | None] = {}

    def place(self, device: torch.device, pinned: bool) -> Place:
        """See `Runtime`."""
        if device.type == "cpu":
            return Place(torch.device("cpu"), pinned)
        if device.type != "cuda":
            raise ValueError(f"expected device to be of type 'cpu' or 'cuda', got {str(device)!r}")
        count = torch.cuda.device_count()
        index = device.index
        if index is None and count:
            index = torch.cuda.current_device()
        if index is None or index >= count:
            raise ValueError(f"expected device to be there, got {str(device)!r} where torch sees {count} CUDA devices")
        if pinned:
            raise ValueError(f"expected device='cpu' with pinned=True, which is host memory, got {str(device)!r}")
        return Place(torch.device("cuda", index))

    def ordering(self, place: Place) -> Ordering:
        """See `Runtime`."""
        if place.device.type == "cuda":
            return "stream"
        return "host" if place.pinned and torch.cuda.is_available() else "none"

    def node(self, place: Place) -> int | None:
        """See `Runtime`."""
        if place.device.type != "cpu" or len(topology.nodes()) < 2:
            return None
        if not (place.pinned and torch.cuda.is_available()):
            return topology.current_node()
        device = torch.cuda.current_device()
        if device not in self._device_nodes:
            self._device_nodes[device] = topology.device_node(topology.pci_address(device))
        node = self._device_nodes[device]
        # Of a device that nobody knows the node of, the caller may: `torchrun --numa-binding` binds it there.
        return topology.current_node() if node is None else node

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        """See `Runtime`."""
        # Not an inference tensor, whoever asks first: those may not be written to once inference mode is over.
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
        """See `Runtime`."""
        return place.device

    def emptied(self, place: Place) -> None:
        """See `Runtime`."""
        self._pools.pop(place.device, None)

    def current_stream(self, place: Place) -> Hashable:
        """See `Runtime`."""
        return torch.cuda.current_stream(place.device if place.device.type == "cuda" else None)

    def record(self, stream: Hashable) -> Any:
        """See `Runtime`."""
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"expected stream to be a torch.cuda.Stream, got {type(stream).__name__} {stream!r}")
        return stream.record_event()

    def finished(self, event: Any) -> bool:
        """See `Runtime`."""
        return bool(event.query())

    def wait(self, stream: Hashable, event: Any) -> None:
        """See `Runtime`."""
        assert isinstance(stream, torch.cuda.Stream)
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """See `Runtime`."""
        event.synchronize()

    def capturing(self, place: Place) -> bool:
        """See `Runtime`."""
        # Asking does not begin CUDA where nobody has.
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
