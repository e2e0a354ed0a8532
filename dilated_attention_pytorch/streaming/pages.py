"""Pages of memory-mapped files, given back to the kernel once they were read or written."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4  # Linux


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses `[first, last)` that the elements of a tensor span; it holds at least one."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + span * x.element_size()


# Pages that a process touches count as its resident memory until the kernel wants them back. Dropping pages of a shared
# mapping of a file loses nothing: the next touch finds them in the page cache or in the file. Any other memory
# (anonymous, private copies) would lose its contents, so it is left alone.
def in_shared_file(x: Tensor) -> bool:
    """True if all of the tensor's memory lies in one shared mapping of a file; False where there is no /proc."""
    if x.numel() == 0 or x.device.type != "cpu" or not _MAPS.is_file():
        return False
    first, last = extent(x)
    for line in _MAPS.read_text().splitlines():
        # low-high permissions offset device inode path; an inode of 0 is no file.
        bounds, permissions, _, _, inode = line.split()[:5]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= first < high:
            return last <= high and permissions[3] == "s" and inode != "0"
    return False


def drop(x: Tensor) -> None:
    """Drops the pages of a view of a tensor that is `in_shared_file`, batch row by batch row."""
    for row in x:
        first, last = extent(row)
        # madvise wants the start of a page. A neighbour's rows on it come back from the page cache.
        low = first // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(low), ctypes.c_size_t(last - low), _MADV_DONTNEED)


def trim() -> None:
    """Gives freed memory that the C library's allocator keeps back to the kernel; only glibc has a call for it."""
    # Tensors below 32 MiB come from a heap that grows by fragmentation to several times what is in use.
    if give_back := getattr(_libc(), "malloc_trim", None):
        give_back(ctypes.c_size_t(0))


@lru_cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
