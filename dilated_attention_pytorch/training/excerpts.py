"""The excerpts of a stream of tokens that training and evaluation read.

An *excerpt* is `context + 1` consecutive tokens: `context` inputs and the token after each. The excerpts of a step are
a pure function of seed and step, a rank's share of them one of the rank: a run that is resumed, or spread over another
number of ranks, reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class TokenStream:
    """Pieces of consecutive shards as one array `(tokens,)`, of which slices are read.

    Args:
        shards: tokens, memory-mapped.
        pieces: int64 `(pieces, 2)`: begins and ends, counted over all shards; in order, none overlapping.
    """

    def __init__(self, shards: Sequence[NDArray[Any]], pieces: NDArray[np.int64]) -> None:
        self._shards = list(shards)
        self._borders = np.cumsum([0, *(shard.size for shard in shards)])
        # An edge that two pieces share, or that an empty one has twice, is none: neighbours become one.
        edges, count = np.unique(pieces, return_counts=True)
        edges = edges[count % 2 == 1]
        # Borders of shards within a piece end it and begin the next.
        borders = np.setdiff1d(self._borders, edges)
        borders = borders[np.searchsorted(edges, borders) % 2 == 1]
        edges = np.sort(np.r_[edges, borders, borders])
        self._begins = edges[::2]
        self._places = np.cumsum(np.r_[0, edges[1::2] - edges[::2]])

    @property
    def size(self) -> int:
        """The number of tokens."""
        return int(self._places[-1])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice) -> NDArray[Any]:
        start, stop, step = place.indices(self.size)
        if step != 1:
            raise ValueError(f"expected a slice of step 1, got {step}")
        found = []
        piece = int(np.searchsorted(self._places, start, "right")) - 1
        while start < stop:
            count = min(stop, int(self._places[piece + 1])) - start
            at = int(self._begins[piece]) + start - int(self._places[piece])
            shard = int(np.searchsorted(self._borders, at, "right")) - 1
            at -= int(self._borders[shard])
            found.append(self._shards[shard][at : at + count])
            start, piece = start + count, piece + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, self._shards[0].dtype if self._shards else np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self[:], dtype=dtype)


Stream = TokenStream | NDArray[Any]


def check_length(stream: Stream, context: int) -> None:
    """Raises a ValueError for training text `(tokens,)` that is shorter than two excerpts."""
    if stream.size < 2 * context + 1:
        raise ValueError(
            f"expected at least {2 * context + 1} tokens of training text for a context of {context}, got {stream.size}"
        )


def training_excerpts(
    stream: Stream, *, context: int, seed: int, step: int, batch_size: int, first: int = 0, count: int = -1
) -> Tensor:
    """Some of the excerpts of one step.

    An epoch cuts the stream, from a random start, into excerpts whose inputs do not overlap, and takes each once in
    random order. So the excerpts of a step share no tokens, unless it ends an epoch and begins the next.

    Args:
        stream: `(tokens,)`.
        context: inputs per excerpt.
        seed: of the order.
        step: from 0.
        batch_size: excerpts per step, over all ranks.
        first: number of the first excerpt to return.
        count: number of excerpts; the rest of the step by default.

    Returns:
        int64 `(count, context + 1)`.

    Raises:
        ValueError: a stream shorter than two excerpts.
    """
    check_length(stream, context)
    count = batch_size - first if count < 0 else count
    # One less than fit: the start may be any number below `context`.
    num_excerpts = (stream.size - 1) // context - 1
    rows, begin = [], step * batch_size + first
    for index in range(begin, begin + count):
        epoch, place = divmod(index, num_excerpts)
        start, order = _epoch(seed, epoch, num_excerpts, context)
        at = start + int(order[place]) * context
        rows.append(stream[at : at + context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def validation_excerpts(stream: Stream, *, context: int, limit: int = 0) -> list[NDArray[Any]]:
    """The fixed excerpts of every evaluation; their inputs do not overlap.

    Args:
        stream: `(tokens,)`.
        context: inputs per excerpt.
        limit: the most excerpts, spread evenly over the stream; 0 for all, the shorter last one included.

    Raises:
        ValueError: a stream without an excerpt.
    """
    if stream.size < 2:
        raise ValueError(f"expected at least 2 tokens of validation text, got {stream.size}")
    whole = (stream.size - 1) // context
    if limit <= 0 or limit >= whole:
        return [stream[begin : begin + context + 1] for begin in range(0, stream.size - 1, context)]
    begins = [index * whole // limit * context for index in range(limit)]
    return [stream[begin : begin + context + 1] for begin in begins]


def document_bounds(inputs: Tensor, end_token: int) -> Tensor:
    """`cu_seqlens`, int32 `(documents + 1,)`, of inputs `(B, N)` in one row: a document begins after each end."""
    begins = torch.ones_like(inputs, dtype=torch.bool)
    begins[:, 1:] = inputs[:, :-1] == end_token
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=inputs.numel()).int()


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_excerpts: int, context: int) -> tuple[int, NDArray[np.int64]]:
    # Keyed by both numbers: a later epoch needs no draw of the earlier ones.
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(context)), random.permutation(num_excerpts)
