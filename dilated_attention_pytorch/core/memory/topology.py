"""NUMA: the node of a device, memory first touched on a node, and the kernel's own word on where pages lie.

Linux gives a page to the node of the thread that touches it first, so a thread bound to the node's processors touches
all of them. `/proc/self/numa_maps` then says where they went. Page-locked memory of any host comes from here too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SYS, PROC = Path("/sys"), Path("/proc")
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE, which the mmap module does not name


@functools.cache
def nodes(sys: Path = SYS) -> dict[int, frozenset[int]]:
    """The processors of every node that has any; empty if the kernel does not say."""
    found = {}
    for folder in sys.glob("devices/system/node/node[0-9]*"):
        cpus: set[int] = set()
        for part in filter(None, (folder / "cpulist").read_text().strip().split(",")):  # "0-3,8" is 0, 1, 2, 3, 8
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
        if cpus:
            found[int(folder.name.removeprefix("node"))] = frozenset(cpus)
    return dict(sorted(found.items()))


@functools.cache
def cuda_node(index: int) -> int | None:
    """The node of a CUDA device; None if torch or the kernel does not say."""
    device: Any = torch.cuda.get_device_properties(index)  # the stub lacks the address
    if not hasattr(device, "pci_bus_id"):
        return None
    return device_node(f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0")


def device_node(pci: str, sys: Path = SYS) -> int | None:
    """The node of a PCI device such as "0000:3b:00.0"; None if nobody knows it (the kernel then writes -1)."""
    try:
        node = int((sys / "bus/pci/devices" / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node in nodes(sys) else None


def current_node() -> int | None:
    """The node of the processor that the calling thread runs on."""
    getcpu = getattr(_libc(), "sched_getcpu", None)
    cpu = getcpu() if getcpu is not None else -1
    return next((node for node, cpus in nodes().items() if cpu in cpus), None)


class _Pages(mmap.mmap):
    """Mapped memory that is unlocked before it is unmapped, whoever holds it last."""

    locked_by = 0  # process; a forked child has no part in the lock
    address = 0

    def __del__(self) -> None:
        if self.locked_by == os.getpid():
            with suppress(Exception):  # at the end of the process CUDA may be gone already, and the lock with it
                torch.cuda.cudart().cudaHostUnregister(self.address)


def allocate_pages(size: int, node: int | None = None, *, lock: bool = False) -> Tensor:
    """Memory in pages of its own, uint8 `(size,)`.

    If the process may not run on the node's processors (a cgroup, a taskset), the pages are touched from where it
    may; `pages_by_node` then shows it.

    Args:
        size: bytes.
        node: whose processors touch every page first; None leaves that to whoever comes first.
        lock: page-lock it for CUDA where it lies. torch's own pinned memory asks for no node, comes in powers of two
            and is never given back.

    Raises:
        MemoryError: the system has none left.
    """
    length = max(1, -(-size // _PAGE)) * _PAGE
    try:
        # A page without access on either side keeps the kernel from joining this mapping with a neighbour, whose
        # pages its map would then count together with ours.
        memory = _Pages(-1, length + 2 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {length} bytes left ({error})") from error
    # The storage begins at the first page that is lent: there torch asks CUDA whether it is page-locked.
    whole = torch.frombuffer(memory, dtype=torch.uint8, offset=_PAGE, count=length)
    first = whole.data_ptr()
    for guard in (first - _PAGE, first + length):
        _libc().mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), _NO_ACCESS)
    if node is not None:
        thread = threading.Thread(target=_touch, args=(first, length, nodes()[node]), name=f"first touch, node {node}")
        thread.start()
        thread.join()
    if lock:
        torch.cuda.init()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(first, length, 0))
        memory.address, memory.locked_by = first, os.getpid()
    return whole[:size]


def _touch(address: int, length: int, cpus: frozenset[int]) -> None:
    """Writes to all pages; in a thread of its own, which it binds."""
    allowed = os.sched_getaffinity(0) & cpus
    if allowed:
        os.sched_setaffinity(0, allowed)
    ctypes.memset(address, 0, length)  # not torch's fill, which has threads of its own


def pages_by_node(address: int, proc: Path = PROC) -> dict[int, int] | None:
    """Pages per node of the mapping that starts at an address; None if the kernel does not say."""
    try:
        lines = (proc / "self/numa_maps").read_text().splitlines()
    except OSError:
        return None
    for start, *fields in map(str.split, lines):
        if int(start, 16) == address:
            pairs = (field[1:].split("=") for field in fields if field[0] == "N" and field[1:2].isdigit())
            return {int(node): int(pages) for node, pages in pairs}
    return None


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
