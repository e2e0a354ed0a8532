"""Where rows come from and where they go: host tensors, memory-mapped files, range sources and range sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dilated_attention_pytorch.streaming import pages
from dilated_attention_pytorch.streaming.checks import Spec, check_read
from dilated_attention_pytorch.streaming.compact import CompactBranch

_PICKED = 1 << 16  # positions per read of a source from which a branch picks single rows


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
        """Takes rows `(B, n, H, D)` from position `start` on, in ascending order, from one thread.

        The memory is used again after the call. No call follows one that raised.
        """


AnySource = Tensor | RangeSource
AnySink = Tensor | RangeSink


class HostTensor:
    """A host tensor seen as rows `(B, N, ...)`, to read from or to write to.

    Pages of a memory-mapped file are dropped after use. While it is written its first position is NaN, so that what an
    interruption leaves behind is never taken for a result.
    """

    def __init__(self, x: Tensor, dim: int = 1) -> None:
        self._rows = x.detach().movedim(dim, 1)
        self.shape, self.dtype = tuple(self._rows.shape), x.dtype
        # The device copies range by range, so each batch row of a range has to be one piece.
        self._is_direct = x.is_pinned() and (x.shape[0] == 0 or self._rows[0].is_contiguous())
        self._is_mapped = not x.is_pinned() and pages.in_shared_file(x)
        self._first: Tensor | None = None  # (B, 1, ...): what the first position will hold

    def pinned(self, start: int, stop: int) -> Tensor | None:
        """The rows themselves if the device can copy from or to them without staging."""
        return self._rows[:, start:stop] if self._is_direct else None

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        """Fills `out` `(B, stop - start, ...)`."""
        out.copy_(self._rows[:, start:stop])
        self._release(start, stop)

    def gather_into(self, branch: CompactBranch, start: int, stop: int, out: Tensor) -> None:
        """Fills `out` `(B, L, ...)` with the rows that a branch keeps in `[start, stop)`."""
        branch.gather(self._rows, 0, start, stop, out)
        self._release(start, stop)

    def begin(self) -> None:
        """Marks it as unfinished."""
        self._rows[:, :1] = torch.nan

    def write(self, start: int, rows: Tensor) -> None:
        """Puts rows `(B, n, ...)` in place."""
        stop = start + rows.shape[1]
        self._rows[:, start:stop].copy_(rows)
        self.landed(start, stop)

    def landed(self, start: int, stop: int) -> None:
        """Takes note of rows that are in place, put there by `write` or by the device itself."""
        # The first row goes back in place when all others are there.
        if start == 0:
            self._first = self._rows[:, :1].clone()
            self._rows[:, :1] = torch.nan
        self._release(start, stop)

    def commit(self) -> None:
        """Marks it as finished, after the last row."""
        if self._first is not None:
            self._rows[:, :1] = self._first

    def _release(self, start: int, stop: int) -> None:
        if self._is_mapped:
            pages.drop(self._rows[:, start:stop])


class SourceReader:
    """Reads a range source, whose rows lie in dimension `dim`."""

    def __init__(self, name: str, source: RangeSource, dim: int = 1) -> None:
        self._name, self._source, self._dim = name, source, dim
        self._given = tuple(source.shape)
        # (B, ..., N, ...) -> (B, N, ...)
        others = self._given[1:dim] + self._given[dim + 1 :]
        self.shape, self.dtype = (self._given[0], self._given[dim], *others), source.dtype

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        """Fills `out`, or has the source fill it."""
        fill = getattr(self._source, "read_into", None)
        # Staging memory has rows in dimension 1: a source that has them elsewhere cannot fill it.
        if fill is not None and self._dim == 1:
            fill(start, stop, out)
        else:
            out.copy_(self._read(start, stop))

    def gather_into(self, branch: CompactBranch, start: int, stop: int, out: Tensor) -> None:
        """Fills `out` from all positions, read a few at a time: a source knows whole ranges only."""
        for low in range(start, stop, _PICKED):
            high = min(low + _PICKED, stop)
            rows = out[:, branch.count(start, low) : branch.count(start, high)]
            if rows.shape[1]:
                branch.gather(self._read(low, high), low, low, high, rows)

    def _read(self, start: int, stop: int) -> Tensor:
        rows = self._source.read(start, stop)
        shape = (*self._given[: self._dim], stop - start, *self._given[self._dim + 1 :])
        check_read(f"{self._name}.read({start}, {stop})", rows, Spec(shape, self.dtype))
        return rows.detach().movedim(self._dim, 1)  # (B, stop - start, ...)


class SinkWriter:
    """Writes to a range sink, rows in dimension `dim`."""

    def __init__(self, sink: RangeSink, dim: int = 1) -> None:
        self._sink, self._dim = sink, dim

    def write(self, start: int, rows: Tensor) -> None:
        """Hands rows `(B, n, ...)` on."""
        self._sink.write(start, rows.movedim(1, self._dim))

    def commit(self) -> None:
        """Tells a sink that asks for it that all rows are there."""
        finish = getattr(self._sink, "commit", None)
        if finish is not None:
            finish()


Reader = HostTensor | SourceReader
Writer = HostTensor | SinkWriter


def reader(name: str, x: AnySource) -> Reader:
    """A reader of what a user passed as argument `name`; lse has its positions in the last dimension."""
    dim = 2 if name == "lse" else 1
    return HostTensor(x, dim) if isinstance(x, Tensor) else SourceReader(name, x, dim)


def writer(name: str, x: AnySink) -> Writer:
    """A writer of what a user passed as argument `name`."""
    dim = 2 if name == "lse" else 1
    return HostTensor(x, dim) if isinstance(x, Tensor) else SinkWriter(x, dim)


def pinned(x: Reader | Writer, start: int, stop: int) -> Tensor | None:
    """Host memory of the rows that the device can copy from or to without staging, if there is such memory."""
    return x.pinned(start, stop) if isinstance(x, HostTensor) else None
