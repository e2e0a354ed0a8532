"""Keys and values of earlier positions, kept while a later position can see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check

_SMALLEST = 256  # rows of a first buffer; it doubles from there


def first_visible(position: int, segment_lengths: Iterable[int], shift: int = 0) -> int:
    """The start of the oldest segment at `position`: no query from there on sees an earlier key."""
    return max(0, min((position + shift) // length * length for length in segment_lengths) - shift)


class _Progress:
    """What a cache and its layers share; the layers do not hold the cache, so that its memory goes with it."""

    def __init__(self) -> None:
        self.length = 0
        self.step: _Step | None = None

    def require_step(self) -> _Step:
        if self.step is None:
            raise RuntimeError("expected KeyValueCache.begin before a layer appends; pass the cache to the model")
        return self.step


class _Step(NamedTuple):
    """One forward's work on every layer's buffers; rows of a buffer are counted from its own start."""

    first: int  # position of the first key in sight
    lo: int  # row of that key
    hi: int  # row behind the last key held
    num_new: int  # new positions: one is written behind the others, more of them fill the buffer anew
    capacity: int  # rows the buffer must have, or 0 where it may stay; a new one takes over rows [lo, hi)
    keep: int  # number of keys at the end that stay


class KeyValueCache:
    """The key/value cache of a causal decoder with dilated attention.

    A position sees only its own segment of each branch. Once the oldest of these segments ends, its rows are dropped,
    so at most max(w_i) rows are held however long the sequence grows. New rows go into a buffer with room for more;
    attention reads a view of it.

    Args:
        segment_lengths: w_i of the model.
        num_layers: of the model.
        shifts: segment shifts of the layers; keys are held that any of them can see.
        row_start: int `(B,)`, first real position of each row of a left-padded batch. Its rows stand at different
            positions; keys that no row needs are dropped.

    Raises:
        ValueError, TypeError: no lengths, or none above 0; no layers; shifts below 0; a row_start of another shape.

    Attributes:
        start: first position held.
        layers: one store per layer, for `MultiheadDilatedAttention.forward(cache=...)`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        num_layers: int,
        *,
        shifts: Sequence[int] = (0,),
        row_start: Tensor | None = None,
    ) -> None:
        self.segment_lengths = tuple(dict.fromkeys(check.check_positive_ints("segment_lengths", segment_lengths)))
        check.check_instance("shifts", shifts, list, tuple)
        self.shifts = tuple(dict.fromkeys(check.check_int("shifts", x, 0) for x in shifts)) or (0,)
        check.check_depth("num_layers", num_layers)
        if row_start is not None:
            check.check_values("row_start", row_start)
            check.check_row_start(row_start, row_start.numel())
        self.row_start = row_start
        self._firsts = [0] if row_start is None else sorted(set(row_start.tolist()))
        self.start = self._capacity = 0
        self._base = 0  # position of the buffers' row 0
        self._progress = _Progress()
        longest = max(self.segment_lengths)
        nested = all(longest % length == 0 for length in self.segment_lengths)
        nested = nested and len(self._firsts) == len(self.shifts) == 1
        # Nested segments all end with the longest one, and the buffer starts empty there. Otherwise some rows are left
        # over and have to move to the front now and then; the slack makes that rare: four rows moved a token at most.
        self._limit = longest if nested else longest + max(1, longest // 4)
        self.layers = [_LayerCache(self._progress) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self._progress.length

    @property
    def rows_held(self) -> int:
        """Positions whose keys and values are held; at most max(w_i)."""
        return self.length - self.start

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values) if x is not None)

    def check(self, batch: int, num_layers: int) -> None:
        """Raises a ValueError for a cache of another model, or of a batch of other size."""
        if len(self.layers) != num_layers:
            raise ValueError(f"expected a cache of the model's {num_layers} layers, got one of {len(self.layers)}")
        held = self.layers[0].keys if self.layers else None
        if held is not None and held.shape[0] != batch:
            raise ValueError(f"expected {held.shape[0]} rows of tokens, as the cache has, got {batch}")

    def options(self, x: Tensor) -> dict[str, Any]:
        """What the layers are called with for new rows x `(B, N, d_model)`."""
        return {"start": self.length, "row_start": self.row_start, "caches": self.layers}

    def held_rows(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `(B, rows_held, H_kv, D)` of each layer, from position `start` on."""
        rows = slice(self.start - self._base, self.length - self._base)
        if not all(isinstance(x, Tensor) for layer in self.layers for x in (layer.keys, layer.values)):
            raise ValueError("expected a cache that has seen tokens, got an empty one")
        return [(layer.keys[:, rows], layer.values[:, rows]) for layer in self.layers]  # type: ignore[index]

    def begin(self, num_new: int) -> None:
        """Plans for `num_new` further positions; every layer then appends once, and `commit` ends the step."""
        if self._progress.step is not None:
            raise RuntimeError("expected a cache whose last forward ended, got one cut short by an error; make another")
        lo, hi = self.start - self._base, self.length - self._base
        position = self.length + num_new
        # Rows that have not started need nothing before their own start.
        seen = [
            first + first_visible(max(0, position - first), self.segment_lengths, shift)
            for first in self._firsts
            for shift in self.shifts
        ]
        keep = position - min(*seen, position)
        capacity = 0
        if num_new == 1:
            if hi == self._capacity:  # grow, or move what is held to the front
                capacity = max(min(max(2 * (hi - lo), _SMALLEST), self._limit), hi - lo + 1)
        elif (
            keep > self._capacity or self._capacity == 0
        ):  # a prompt that ends with all segments leaves nothing to keep
            capacity = min(keep + _SMALLEST, self._limit)
        self._progress.step = _Step(self.start, lo, hi, num_new, capacity, keep)

    def commit(self) -> None:
        """Ends the step that `begin` started, when every layer has appended."""
        step = self._progress.require_step()
        self._progress.length += step.num_new
        if step.capacity:
            self._capacity = step.capacity
        self.start = self.length - step.keep
        if step.num_new != 1 or step.keep == 0:
            self._base = self.start
        elif step.capacity:
            self._base = step.first
        self._progress.step = None


class _LayerCache:
    """One layer's buffers; the cache that they belong to plans their use."""

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return self._progress.length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """All keys and values in sight, `(B, rows, H_kv, D)`, with the new ones, and the first one's position."""
        step = self._progress.require_step()
        self.keys, keys = _store(self.keys, key, step)
        self.values, values = _store(self.values, value, step)
        return keys, values, step.first


def _store(buffer: Tensor | None, new: Tensor, step: _Step) -> tuple[Tensor | None, Tensor]:
    """The buffer from now on, and the rows in sight."""
    lo, hi = step.lo, step.hi
    held = None if buffer is None or hi == lo else buffer[:, lo:hi]
    if step.capacity:
        buffer = new.new_empty((new.shape[0], step.capacity, *new.shape[2:]))
    if step.num_new == 1:
        assert buffer is not None
        if step.capacity:
            lo, hi = 0, hi - lo
        if step.capacity and held is not None:
            buffer[:, :hi] = held
        buffer[:, hi] = new[:, 0]
        return buffer, buffer[:, lo : hi + 1]
    rows = new if held is None else torch.cat((held, new), 1)
    if buffer is not None and step.keep:
        buffer[:, : step.keep] = rows[:, rows.shape[1] - step.keep :]
    return buffer, rows
