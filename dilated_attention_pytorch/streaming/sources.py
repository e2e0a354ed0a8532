"""Where rows come from and go to: host tensors, memory-mapped files, and whatever reads or writes ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dilated_attention_pytorch.streaming import pages
from dilated_attention_pytorch.streaming.compact import CompactBranch

_PICKED = 1 << 16  # positions read at a time where a source knows whole ranges alone and single rows are wanted


@runtime_checkable
class RangeSource(Protocol):
    """Something that knows the rows of a sequence without holding them: data that is generated or fetched.

    A source may also have `read_into(start, stop, out)`, which fills the staging memory it is given and spares a copy.
    Both are called from one thread, mostly in ascending order.

    Attributes:
        shape: `(B, N, H, D)`.
        dtype: of what is read.
    """

    shape: Sequence[int]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """The rows `(B, stop - start, H, D)`, on the CPU."""


@runtime_checkable
class RangeSink(Protocol):
    """Something that takes rows as they are computed.

    A sink may also have `commit()`, called once after the last row and never when anything failed.
    """

    def write(self, start: int, rows: Tensor) -> None:
        """Takes rows `(B, n, H, D)` from position `start` on, in ascending order, from one thread. The memory is
        used again after the call."""


class TensorReader:
    """Reads a host tensor; its rows lie in dimension `dim`.

    Pages of a memory-mapped file are dropped after use.
    """

    def __init__(self, x: Tensor, dim: int = 1) -> None:
        self._rows = x.detach().movedim(dim, 1)
        self.shape, self.dtype = tuple(self._rows.shape), x.dtype
        self._pinned = _is_direct(x, self._rows)
        self._mapped = not x.is_pinned() and pages.in_shared_file(x)

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        """Fills `out` `(B, stop - start, ...)`."""
        out.copy_(self._rows[:, start:stop])
        self._release(start, stop)

    def gather_into(self, branch: CompactBranch, start: int, stop: int, out: Tensor) -> None:
        """Fills `out` with the rows that a branch keeps in `[start, stop)`."""
        branch.gather(self._rows, 0, start, stop, out)
        self._release(start, stop)

    def pinned(self, start: int, stop: int) -> Tensor | None:
        """The rows themselves where the device can copy from them without staging."""
        return self._rows[:, start:stop] if self._pinned else None

    def _release(self, start: int, stop: int) -> None:
        if self._mapped:
            pages.drop(self._rows[:, start:stop])


class SourceReader:
    """Reads a range source; the rows of what it gives lie in dimension `dim`."""

    def __init__(self, name: str, source: RangeSource, dim: int = 1) -> None:
        self._name, self._source, self._dim = name, source, dim
        self._given = tuple(source.shape)
        shape = list(self._given)
        shape.insert(1, shape.pop(dim))
        self.shape, self.dtype = tuple(shape), source.dtype
        self._into: Callable[[int, int, Tensor], None] | None = getattr(source, "read_into", None)

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        """As `TensorReader.read_into`."""
        if self._into is not None and self._dim == 1:
            self._into(start, stop, out)
        else:
            out.copy_(self._read(start, stop))

    def gather_into(self, branch: CompactBranch, start: int, stop: int, out: Tensor) -> None:
        """As `TensorReader.gather_into`; the source is asked for all positions, a few at a time."""
        first = branch.index(start)
        for low in range(start, stop, _PICKED):
            high = min(low + _PICKED, stop)
            rows = out[:, branch.index(low) - first : branch.index(high) - first]
            if rows.shape[1]:
                branch.gather(self._read(low, high), low, low, high, rows)

    def pinned(self, start: int, stop: int) -> Tensor | None:
        """A source has no memory to copy from."""
        return None

    def _read(self, start: int, stop: int) -> Tensor:
        rows = self._source.read(start, stop)
        want = (*self._given[: self._dim], stop - start, *self._given[self._dim + 1 :])
        if not isinstance(rows, Tensor):
            raise TypeError(f"expected {self._name}.read({start}, {stop}) to give a Tensor, got {type(rows).__name__}")
        if tuple(rows.shape) != want or rows.dtype != self.dtype or rows.device.type != "cpu":
            raise ValueError(
                f"expected {self._name}.read({start}, {stop}) to give {self.dtype} {want} on the CPU, "
                f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
            )
        return rows.detach().movedim(self._dim, 1)


Reader = TensorReader | SourceReader


class TensorWriter:
    """Writes a host tensor whose rows lie in dimension `dim`.

    Its first position is NaN until the last row is in place, so that what an interruption leaves behind is never taken
    for a result.
    """

    def __init__(self, x: Tensor, dim: int = 1) -> None:
        self._rows = x.detach().movedim(dim, 1)
        self._pinned = _is_direct(x, self._rows)
        self._mapped = not x.is_pinned() and pages.in_shared_file(x)
        self._first: Tensor | None = None

    def begin(self) -> None:
        """From here on it is written to."""
        self._rows[:, :1] = torch.nan

    def write(self, start: int, rows: Tensor) -> None:
        """Takes rows `(B, n, ...)`."""
        self._rows[:, start : start + rows.shape[1]].copy_(rows)
        self.landed(start, start + rows.shape[1])

    def landed(self, start: int, stop: int) -> None:
        """Rows have been put in place, by `write` or by the device itself."""
        if start == 0:
            self._first = self._rows[:, :1].clone()
            self._rows[:, :1] = torch.nan
        if self._mapped:
            pages.drop(self._rows[:, start:stop])

    def commit(self) -> None:
        """Everything is written."""
        if self._first is not None:
            self._rows[:, :1] = self._first

    def pinned(self, start: int, stop: int) -> Tensor | None:
        """The rows themselves where the device can copy to them without staging."""
        return self._rows[:, start:stop] if self._pinned else None


class SinkWriter:
    """Writes to a range sink, rows in dimension `dim`."""

    def __init__(self, sink: RangeSink, dim: int = 1) -> None:
        self._sink, self._dim = sink, dim

    def begin(self) -> None:
        """A sink learns of its first rows by getting them."""

    def write(self, start: int, rows: Tensor) -> None:
        """As `TensorWriter.write`."""
        self._sink.write(start, rows.movedim(1, self._dim))

    def landed(self, start: int, stop: int) -> None:
        """Nothing lands in a sink unseen."""

    def commit(self) -> None:
        """As `TensorWriter.commit`."""
        finish = getattr(self._sink, "commit", None)
        if finish is not None:
            finish()

    def pinned(self, start: int, stop: int) -> Tensor | None:
        """A sink has no memory to copy to."""
        return None


Writer = TensorWriter | SinkWriter


def reader(name: str, x: Tensor | RangeSource, dim: int = 1) -> Reader:
    """A reader of what a user passed as argument `name`."""
    return TensorReader(x, dim) if isinstance(x, Tensor) else SourceReader(name, x, dim)


def writer(x: Tensor | RangeSink, dim: int = 1) -> Writer:
    """A writer of what a user passed."""
    return TensorWriter(x, dim) if isinstance(x, Tensor) else SinkWriter(x, dim)


def _is_direct(x: Tensor, rows: Tensor) -> bool:
    """Whether a range of the rows is one piece of pinned memory a batch row, for the device to copy from or to."""
    return x.is_pinned() and (x.shape[0] == 0 or rows[0].is_contiguous())
