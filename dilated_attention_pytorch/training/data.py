"""The stretches of the corpus that each step reads.

An *excerpt* is `context + 1` consecutive bytes: `context` inputs and the byte after each. The excerpts of a step are a
pure function of seed and step, a rank's share of them one of the rank: a run that is resumed, or spread over another
number of ranks, reads the same bytes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def training_excerpts(
    stream: NDArray[np.uint8], *, context: int, seed: int, step: int, batch_size: int, first: int = 0, count: int = -1
) -> Tensor:
    """Some of the excerpts of one step.

    An epoch cuts the stream, from a random start, into excerpts whose inputs do not overlap, and takes each once in
    random order. So the excerpts of a step share no bytes, unless it ends an epoch and begins the next.

    Args:
        stream: uint8 `(bytes,)`.
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
    if stream.size < 2 * context + 1:
        raise ValueError(
            f"expected at least {2 * context + 1} bytes of training text for a context of {context}, got {stream.size}"
        )
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


def held_out_excerpts(stream: NDArray[np.uint8], *, context: int, limit: int = 0) -> list[NDArray[np.uint8]]:
    """The fixed excerpts of every evaluation; their inputs do not overlap.

    Args:
        stream: uint8 `(bytes,)`.
        context: inputs per excerpt.
        limit: the most excerpts, spread evenly over the stream; 0 for all, the shorter last one included.

    Raises:
        ValueError: a stream without an excerpt.
    """
    if stream.size < 2:
        raise ValueError(f"expected at least 2 bytes of validation text, got {stream.size}")
    whole = (stream.size - 1) // context
    if limit <= 0 or limit >= whole:
        return [stream[begin : begin + context + 1] for begin in range(0, stream.size - 1, context)]
    begins = [index * whole // limit * context for index in range(limit)]
    return [stream[begin : begin + context + 1] for begin in begins]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_excerpts: int, context: int) -> tuple[int, NDArray[np.int64]]:
    # Keyed by both numbers: a later epoch needs no draw of the earlier ones.
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(context)), random.permutation(num_excerpts)
