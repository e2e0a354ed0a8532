"""What a ring will move and compute, rank by rank, before anything runs; and shards that share the work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.validation import check_bool, check_instance, check_int, check_positive_int
from dilated_attention_pytorch.ring_attention.plan import RingPlan, unit_bytes


class Share(NamedTuple):
    """One rank's part of one layer's forward: positions `[start, stop)`, and bytes of K and V."""

    start: int
    stop: int
    received: int  # the backward sends as many gradients back, at their own width
    sent: int
    dense: int  # what would arrive if every rank fetched all K and V
    pairs: int  # of queries and keys, which the rank computes


def forecast(
    pattern: DilatedPattern, bounds: Sequence[int], head_dim: int, *, batch: int = 1, element_size: int = 2,
    is_causal: bool = False,
) -> list[Share]:  # fmt: skip
    """Each rank's part of a forward over shards with these bounds; pattern and bounds as in `RingPlan`."""
    size, seq_len, shares = (batch, head_dim, element_size), bounds[-1], []
    for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
        plan = RingPlan(pattern, tuple(bounds), rank, is_causal)
        dense = (seq_len - stop + start) * pattern.num_heads * unit_bytes(*size)
        pairs = pattern.pairs(seq_len, is_causal=is_causal, q_range=(start, stop))
        shares.append(Share(start, stop, plan.received_bytes(*size), plan.sent_bytes(*size), dense, pairs))
    return shares


def balanced_bounds(
    pattern: DilatedPattern, seq_len: int, world_size: int, *, is_causal: bool = True, multiple: int | None = None
) -> tuple[int, ...]:
    """Bounds of contiguous shards whose ranks have as equal work as such bounds allow.

    Under causality a later query sees more keys: over equal shards the last rank has most of the work, and the others
    wait for it. A shard that does not repeat the pattern from its start (`DilatedPattern.repeats_from`)
    takes the slower kernels and is counted with half its work again.

    Args:
        pattern: the branches, for the key/value heads.
        seq_len: N.
        world_size: how many ranks share the sequence.
        is_causal: whether queries see no later keys.
        multiple: bounds are multiples of it; by default the longest segment that gives a rank eight, or a sixteenth
            of an equal shard.

    Returns:
        `world_size + 1` ascending positions, from 0 to seq_len, as `RingPlan` takes them.

    Raises:
        ValueError: a negative length, no ranks, a multiple below 1.
        TypeError: one of them is no int; no pattern; a flag that is no bool.

    Example:
        >>> from dilated_attention_pytorch import DilatedPattern
        >>> balanced_bounds(DilatedPattern((64, 1024), (1, 1), 4), 1024, 2)
        (0, 704, 1024)
    """
    check_instance("pattern", pattern, DilatedPattern)
    check_bool("is_causal", is_causal)
    seq_len = check_int("seq_len", seq_len, 0)
    world_size = check_positive_int("world_size", world_size)
    if multiple is not None:
        multiple = check_positive_int("multiple", multiple)
    else:
        fitting = [w for w in pattern.segment_lengths if w * 8 * world_size <= seq_len]
        multiple = max(fitting, default=max(1, seq_len // (16 * world_size)))
    ends = [*range(0, seq_len, multiple), seq_len]
    before = [pattern.pairs(seq_len, is_causal=is_causal, q_range=(0, end)) for end in ends]

    # Prefix sums: the pairs of a shard [ends[i], ends[j]) are a difference.
    def cost(i: int, j: int) -> float:
        if i >= j:
            return 0.0 if i == j else float("inf")
        return (before[j] - before[i]) * (1.0 if pattern.repeats_from(ends[i], ends[j]) else 1.5)

    # Once for all ranks, as that is a step of Python per pair of ends.
    costs = [[cost(i, j) for j in range(len(ends))] for i in range(len(ends))]
    work = torch.tensor(costs, dtype=torch.float64, device="cpu")
    # best[j]: minimal maximum work per rank when the ranks so far share [0, ends[j]).
    best, index, choices = work[0].clone(), torch.arange(len(ends), device="cpu")[:, None], []
    best[1:] = torch.inf
    for _ in range(world_size):
        heaviest = torch.maximum(best[:, None], work)
        best = heaviest.amin(0)
        choices.append(torch.where(heaviest == best, index, -1).amax(0).tolist())  # of equal ones the latest start
    bounds = [len(ends) - 1]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return tuple(ends[i] for i in reversed(bounds))
