"""Which stretches of the corpus are read at which step.

An *excerpt* is `context + 1` consecutive bytes: `context` inputs and the byte after each. Which excerpts a step takes
is a pure function of the seed and the step, and which of them a rank takes a function of the rank, so a run that is
resumed, or spread over another number of ranks, reads the same bytes.
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

    An epoch cuts the stream, from a random start, into excerpts whose inputs do not overlap and takes each once, in
    random order; so no two of a step, and no two ranks, train on the same bytes (but for a step that ends an epoch and
    begins the next).

    Args:
        stream: uint8 `(bytes,)`.
        context: inputs of an excerpt.
        seed: of the order.
        step: from 0.
        batch_size: excerpts of a whole step, over all ranks.
        first: the first of them to return.
        count: how many to return; the rest of the step by default.

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
    # Whatever the start, below `context`, each excerpt lies within the stream.
    num_excerpts = (stream.size - 1) // context - 1
    rows = []
    for index in range(step * batch_size + first, step * batch_size + first + count):
        epoch, place = divmod(index, num_excerpts)
        start, order = _epoch(seed, epoch, num_excerpts, context)
        begin = start + int(order[place]) * context
        rows.append(stream[begin : begin + context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_excerpts(stream: NDArray[np.uint8], *, context: int, limit: int = 0) -> list[NDArray[np.uint8]]:
    """The fixed excerpts that an evaluation reads: their inputs do not overlap, and all runs read the same.

    Args:
        stream: uint8 `(bytes,)`.
        context: inputs of an excerpt.
        limit: at most so many, spread evenly over the stream; 0 for all, the shorter last one included.

    Raises:
        ValueError: a stream that holds no excerpt.
    """
    if stream.size < 2:
        raise ValueError(f"expected at least 2 bytes of held-out text, got {stream.size}")
    whole = (stream.size - 1) // context
    if limit <= 0 or limit >= whole:
        return [stream[begin : begin + context + 1] for begin in range(0, stream.size - 1, context)]
    chosen = [index * whole // limit for index in range(limit)]
    return [stream[index * context : (index + 1) * context + 1] for index in chosen]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_excerpts: int, context: int) -> tuple[int, NDArray[np.int64]]:
    # Keyed by both numbers, so that no epoch has to be drawn to reach a later one.
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(context)), random.permutation(num_excerpts)
