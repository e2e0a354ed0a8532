"""Where rows come from and where they go: host tensors, memory-mapped files, range sources and sinks, all checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.streaming import pages
from dilated_attention_pytorch.streaming.ranges import CompactBranch

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


class Spec(NamedTuple):
    """The shape and dtype that an argument has to have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Those of a tensor."""
        return cls(tuple(x.shape), x.dtype)

    def empty(self, device: str) -> Tensor:
        """A tensor of the kind."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


AnySource = Tensor | RangeSource
AnySink = Tensor | RangeSink


class HostTensor:
    """A host tensor seen as rows `(B, N, ...)`, to read from or to write to."""

    # Pages of a memory-mapped file are dropped after use. While it is written its first position is NaN, so that what
    # an interruption leaves behind is never taken for a result.

    def __init__(self, x: Tensor, dim: int = 1) -> None:
        self._rows = x.detach().movedim(dim, 1)
        self.shape, self.dtype = tuple(self._rows.shape), x.dtype
        # The device copies range by range, so each batch row of a range has to be one piece.
        self._is_direct = x.is_pinned() and (x.shape[0] == 0 or self._rows[0].is_contiguous())
        self._is_mapped = not x.is_pinned() and pages.in_shared_file(x)
        # (B, 1, ...): what the first position will hold.
        self._first: Tensor | None = None

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
        call, want = f"{self._name}.read({start}, {stop})", Spec(shape, self.dtype)
        if not isinstance(rows, Tensor):
            raise TypeError(f"expected {call} to give a Tensor, got {type(rows).__name__}")
        check.check_dense(call, rows)
        if Spec.of(rows) != want or rows.device.type != "cpu":
            raise ValueError(
                f"expected {call} to give {want.dtype} {want.shape} on the CPU, "
                f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
            )
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
        if (finish := getattr(self._sink, "commit", None)) is not None:
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


def check_source(name: str, x: object) -> Spec:
    """The shape and dtype of a tensor in host memory or of a range source."""
    if isinstance(x, Tensor):
        check.check_dense(name, x)
        if x.device.type != "cpu":
            raise ValueError(
                f"expected {name} in host memory, got it on {x.device}: dilated_attention computes what lies there"
            )
        check.check_values(name, x)
        return Spec.of(x)
    if missing := [part for part in ("shape", "dtype", "read") if not hasattr(x, part)]:
        raise TypeError(
            f"expected {name} to be a Tensor or a source with shape, dtype and read(start, stop), "
            f"got {type(x).__name__} without {', '.join(missing)}"
        )
    source: Any = x  # whatever its attributes are
    _check_method(f"{name}.read", source.read)
    _check_method(f"{name}.read_into", getattr(source, "read_into", None), optional=True)
    given, dtype = source.shape, source.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected {name}.dtype to be a torch.dtype, got {type(dtype).__name__} {check.quoted(dtype)}")
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(
            f"expected {name}.shape to be a sequence of ints, got {type(given).__name__} {check.quoted(given)}"
        )
    shape = tuple(check.check_int(f"{name}.shape[{i}]", size, 0) for i, size in enumerate(given))
    if math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"expected {name} of fewer than 2**63 bytes, got {dtype} {shape}")
    return Spec(shape, dtype)


def check_spec(name: str, got: Spec, want: Spec) -> None:
    """The shape and dtype of an argument are those wanted."""
    if got != want:
        raise ValueError(f"expected {name} of {want.dtype} {want.shape}, got {got.dtype} {got.shape}")


def check_target(name: str, x: object, want: Spec, taken: Sequence[object]) -> None:
    """A sink, or a host tensor that can be written to and shares no memory with the tensors already taken."""
    if not isinstance(x, Tensor):
        if not callable(getattr(x, "write", None)):
            raise TypeError(f"expected {name} to be a Tensor or have write(start, rows), got {type(x).__name__}")
        _check_method(f"{name}.commit", getattr(x, "commit", None), optional=True)
        return
    check.check_dense(name, x)
    check_spec(name, Spec.of(x), want)
    if x.device.type == "cpu":
        check.check_values(name, x)
    for is_wrong, words in (
        (x.device.type != "cpu", f"in host memory, got it on {x.device}"),
        (x.requires_grad, "without requires_grad: it is overwritten"),
        (
            x.is_inference() and not torch.is_inference_mode_enabled(),
            "to be writable, got an inference tensor outside inference mode",
        ),
        (_folds(x), f"with memory of its own for each element, got strides {x.stride()} for shape {tuple(x.shape)}"),
    ):
        if is_wrong:
            raise ValueError(f"expected {name} {words}")
    # Results are written while inputs of later ranges have not been read. Memory counts from a tensor's first element
    # to its last: views that interleave are refused although no element is shared.
    if any(isinstance(y, Tensor) and _overlap(x, y) for y in taken):
        raise ValueError(
            f"expected {name} in memory of its own, got a tensor whose memory, from its first element to its last, "
            "overlaps another argument's"
        )


def _check_method(name: str, method: object, *, optional: bool = False) -> None:
    if not callable(method) and not (optional and method is None):
        raise TypeError(f"expected {name} to be a method, got {type(method).__name__}")


def _folds(x: Tensor) -> bool:
    """True if elements may share memory: a stride is below what it has to step over."""
    covered = 1  # elements that the dimensions so far span, from the smallest stride on
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < covered:
            return True
        covered += max(0, size - 1) * stride
    return False


def _overlap(x: Tensor, y: Tensor) -> bool:
    """True if the addresses that two host tensors span have one in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (first, last), (other_first, other_last) = pages.extent(x), pages.extent(y)
    return first < other_last and other_first < last
