"""One call of ring attention on one rank, tensors taken away: what the op builds and the exchange follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.ring_attention.plan import RingPlan
from dilated_attention_pytorch.ring_attention.utils.communication import Channel

# Of all remote rows: from there on, fetching everything spares the packing.
_DENSE_ENOUGH = 0.8
# Times the longest shard: from there on, rows come one peer at a time.
_TOO_MUCH = 4.0


class Hop(NamedTuple):
    """One exchange: rows come from the owners and go to the receivers; their gradients take the way back."""

    owners: tuple[int, ...]
    receivers: tuple[int, ...]
    # Units from and to each rank of the group: 0 but from owners and to receivers.
    received: list[int]
    sent: list[int]


@dataclass(frozen=True)
class RingCall:
    """What one rank does in one call."""

    plan: RingPlan  # which rows travel
    problem: Problem  # the settings, with this rank's range
    mode: str  # "sparse", "ring" or "gather"
    backend: Backend  # what computes, the rank's own keys and the rows that arrive
    channel: Channel  # what exchanges go through
    wire_dtype: torch.dtype  # what gradients travel in
    keep: bool  # the forward gives back what arrived, for the backward
    # Softmaxes count the official code's zero keys. The backward does not ask: their values and gradients are 0, and
    # the lse that it is given counts them.
    zero_keys: bool

    def hops(self) -> list[Hop]:
        """The exchanges of a forward: none if no rank needs anything of another."""
        plan, size = self.plan, self.plan.world_size
        if not plan.anything_moves:
            return []
        # Mode "sparse": everything at once. Mode "ring": from the rank before and to the rank after, then one further.
        ways = [((plan.rank - hop) % size, (plan.rank + hop) % size) for hop in range(1, size)]
        peers = [(plan.peers, plan.peers)] if self.mode == "sparse" else [((a,), (b,)) for a, b in ways]
        return [Hop(*way, plan.counts(plan.arriving, way[0]), plan.counts(plan.leaving, way[1])) for way in peers]

    def keeps_rows(self) -> bool:
        """Whether what arrived is kept: never in mode "ring", which is there to hold no more than two peers' rows."""
        return self.keep and self.mode == "sparse" and self.plan.anything_moves


def choose_mode(plan: RingPlan) -> str:
    """The mode that `"auto"` takes, the same on every rank.

    Nearly all rows needed: gather them, without packing. Several shards' worth of rows to hold: one peer after
    another. Else one exchange.
    """
    # Units of everybody else, at most.
    dense = plan.pattern.num_heads * (sum(plan.lengths) - min(plan.lengths))
    if plan.anything_moves and plan.largest_arrival > _DENSE_ENOUGH * dense:
        return "gather"
    if plan.largest_arrival > _TOO_MUCH * plan.pattern.num_heads * max(plan.lengths):
        return "ring"
    return "sparse"
