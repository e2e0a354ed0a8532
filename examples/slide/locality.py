"""How near in space a pattern's keys are when tokens stand in an order: counted, pair by pair, not sampled."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.kernels.hilbert import CurveOrder


class Locality(NamedTuple):
    """How local attention is.

    Attributes:
        distance: mean Euclidean distance of a query from a key, in tiles, over all pairs of all branches and heads.
        neighbours: share of the up to 8 (26 in 3-D) adjacent tiles that some head of one layer shows to a tile.
        neighbours_per_head: the same for one head, the mean over heads.
    """

    distance: float
    neighbours: float
    neighbours_per_head: float


def locality(pattern: DilatedPattern, order: CurveOrder, coords: Tensor) -> Locality:
    """The locality of a pattern over tokens at coords `(N, D)` in an order."""
    along = coords[order.order].double()
    total, pairs = 0.0, 0
    for i, (length, rate) in enumerate(pattern.branches):
        for offset, heads in pattern.head_groups(i):
            count = len(range(*heads.indices(pattern.num_heads)))
            for start in range(0, len(along), length):
                members = along[start : start + length][offset::rate]
                total += count * float(torch.cdist(members, members).sum())
                pairs += count * len(members) ** 2
    first, second = neighbour_pairs(coords)
    p, q = order.inverse[first], order.inverse[second]
    member_p, member_q = pattern.membership(p), pattern.membership(q)
    together = torch.stack([p // length == q // length for length, _ in pattern.branches])[:, None]
    reached = (member_p & member_q & together).any(0)
    return Locality(total / pairs, float(reached.any(0).double().mean()), float(reached.double().mean()))


def neighbour_pairs(coords: Tensor) -> tuple[Tensor, Tensor]:
    """All (token, token) whose cells touch, by a side or a corner; int64 coords, no cell twice."""
    sides = coords.amax(0) + 3  # room for a step beyond either end
    weights = torch.tensor([int(sides[a + 1 :].prod()) for a in range(coords.shape[1])])
    keys = ((coords + 1) * weights).sum(1)
    by_key = keys.argsort()
    found_first, found_second = [], []
    for step in itertools.product((-1, 0, 1), repeat=coords.shape[1]):
        if not any(step):
            continue
        wanted = keys + int((torch.tensor(step) * weights).sum())
        at = torch.searchsorted(keys[by_key], wanted).clamp(max=len(keys) - 1)
        hit = keys[by_key][at] == wanted
        found_first.append(hit.nonzero().flatten())
        found_second.append(by_key[at[hit]])
    return torch.cat(found_first), torch.cat(found_second)
