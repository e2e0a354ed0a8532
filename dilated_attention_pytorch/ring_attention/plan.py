"""Which rows travel between which ranks, and where each remote branch finds them on arrival.

A *unit* is one (position, key/value head): K and V of it, for the whole batch, travel together. A rank needs the units
that its queries' segments show and that it does not hold; a unit that several branches show travels once. The plan
follows from the pattern, the shard bounds, the rank and causality alone, so every rank knows every message's length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import zero_keys
from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern


class Meeting(NamedTuple):
    """The queries of one shard and the remote keys that meet in one segment of a branch, as positions."""

    segment: int
    queries: range
    keys: tuple[range, ...]


@dataclass(frozen=True, eq=False)
class Units:
    """Units that travel between two ranks, ordered by head and then by position."""

    # For each key/value head its positions, int64 ascending; heads that keep the same share a tensor.
    positions: tuple[Tensor, ...]
    starts: tuple[int, ...]  # where each head's units start in the message; one more entry holds the total

    @property
    def count(self) -> int:
        """How many units the message holds."""
        return self.starts[-1]

    def index(self) -> tuple[Tensor, Tensor]:
        """The position and the head of each unit."""
        counts = torch.tensor([len(p) for p in self.positions], device="cpu")
        return torch.cat(self.positions), torch.repeat_interleave(counts)


class Rectangle(NamedTuple):
    """Plain attention: queries of one segment over its remote keys, for heads with equally many of both."""

    branch: int
    heads: Tensor  # (h,), key/value heads
    queries: Tensor  # (h, Lq), rows of this rank's shard
    keys: Tensor  # (h, Lk), units of what arrived


@dataclass(frozen=True)
class RingPlan:
    """The plan of one rank.

    Args:
        pattern: the branches, for the key/value heads.
        bounds: where the shards start, the first one at 0 or at a segment shift; one more entry holds the sequence's
            end.
        rank: whose plan it is.
        is_causal: queries see no later keys, so nothing travels to an earlier rank.
        device: where index tensors live; the CPU by default.
    """

    pattern: DilatedPattern
    bounds: tuple[int, ...]
    rank: int
    is_causal: bool
    device: torch.device | None = None

    @property
    def world_size(self) -> int:
        """How many ranks share the sequence."""
        return len(self.bounds) - 1

    @property
    def seq_len(self) -> int:
        """Where the sequence ends: N behind its first position."""
        return self.bounds[-1]

    @property
    def shard(self) -> tuple[int, int]:
        """The positions `[start, stop)` of this rank."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many positions each rank has."""
        return tuple(b - a for a, b in itertools.pairwise(self.bounds))

    @property
    def peers(self) -> tuple[int, ...]:
        """The other ranks, ascending."""
        return tuple(p for p in range(self.world_size) if p != self.rank)

    @cached_property
    def arriving(self) -> dict[int, Units]:
        """The units that come from each peer."""
        return {peer: travelling(self.pattern, self.bounds, self.rank, peer, self.is_causal) for peer in self.peers}

    @cached_property
    def leaving(self) -> dict[int, Units]:
        """The units that go to each peer."""
        return {peer: travelling(self.pattern, self.bounds, peer, self.rank, self.is_causal) for peer in self.peers}

    def counts(self, units: dict[int, Units], peers: tuple[int, ...]) -> list[int]:
        """How many of the units belong to each rank of the group, if only those of some peers travel."""
        return [units[p].count if p in peers else 0 for p in range(self.world_size)]

    @cached_property
    def leaving_index(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Row of the shard and head of each unit that goes to each peer, on the device."""
        # (U,) and (U,)
        found = {peer: units.index() for peer, units in self.leaving.items()}
        return {p: ((at - self.shard[0]).to(self.device), heads.to(self.device)) for p, (at, heads) in found.items()}

    @cached_property
    def num_zero_keys(self) -> Tensor:
        """How many zero keys (docs/spec.md, 5) each position of the shard sees, float `(H_kv, n)`, on the device."""
        return zero_keys.counts(self.pattern, *self.shard, self.seq_len, self.device)

    @cached_property
    def arriving_positions(self) -> dict[int, Tensor]:
        """Position of each unit that comes from each peer, on the device; masks and dropout ask for it."""
        return {peer: units.index()[0].to(self.device) for peer, units in self.arriving.items()}

    @cached_property
    def receives(self) -> bool:
        """Whether this rank needs any unit of another."""
        return any(units.count for units in self.arriving.values())

    @cached_property
    def gives(self) -> bool:
        """Whether another rank needs any unit of this one."""
        return any(units.count for units in self.leaving.values())

    @cached_property
    def anything_moves(self) -> bool:
        """Whether any rank needs anything of another: the same answer on every rank."""
        return any(
            next(_meetings(self.pattern, self.bounds, rank, i, offset, self.is_causal), None) is not None
            for rank in range(self.world_size)
            for i in range(len(self.pattern.branches))
            for offset, _ in self.pattern.head_groups(i)
        )

    @cached_property
    def largest_arrival(self) -> int:
        """Units that come to the rank to which most come: the same answer on every rank."""
        plans = (replace(self, rank=rank) for rank in range(self.world_size))
        return max(sum(units.count for units in plan.arriving.values()) for plan in plans)

    def received_bytes(self, batch: int, head_dim: int, element_size: int) -> int:
        """Bytes of K and V that come to this rank in a forward; gradients go the other way, at their own width."""
        return sum(u.count for u in self.arriving.values()) * unit_bytes(batch, head_dim, element_size)

    def sent_bytes(self, batch: int, head_dim: int, element_size: int) -> int:
        """Bytes of K and V that leave this rank in a forward."""
        return sum(u.count for u in self.leaving.values()) * unit_bytes(batch, head_dim, element_size)

    @cached_property
    def rectangles(self) -> Callable[[tuple[int, ...]], tuple[Rectangle, ...]]:
        """The attention over the units of some peers, which lie one peer after another in what arrived; found once."""
        return cache(lambda owners: tuple(self._find_rectangles(owners)))

    def _find_rectangles(self, owners: tuple[int, ...]) -> Iterator[Rectangle]:
        # Where each owner's units begin.
        starts = itertools.accumulate((self.arriving[o].count for o in owners), initial=0)
        firsts = dict(zip(owners, starts, strict=False))
        for branch in range(len(self.pattern.branches)):
            # Heads of other offsets may keep one row more or less; those alike share a call.
            alike: dict[tuple[int, int, int], list[tuple[int, Tensor, Tensor]]] = {}
            for offset, heads in self.pattern.head_groups(branch):
                for meeting in _meetings(self.pattern, self.bounds, self.rank, branch, offset, self.is_causal):
                    queries = _tensor(meeting.queries) - self.shard[0]
                    for head in range(*heads.indices(self.pattern.num_heads)):
                        keys = self._find_keys(meeting.keys, head, firsts)
                        if len(keys):
                            kind = meeting.segment, len(queries), len(keys)
                            alike.setdefault(kind, []).append((head, queries, keys))
            for same in alike.values():
                numbers, rows, units = zip(*same, strict=True)
                # (h,), (h, Lq), (h, Lk)
                index = torch.tensor(numbers, device="cpu"), torch.stack(rows), torch.stack(units)
                yield Rectangle(branch, *(x.to(self.device) for x in index))

    def _find_keys(self, keys: tuple[range, ...], head: int, firsts: dict[int, int]) -> Tensor:
        """Where a head's keys lie among the units of the owners."""
        found = []
        for owner, first in firsts.items():
            units = self.arriving[owner]
            for part in keys:
                # A segment may reach over several shards: this owner has the part inside its own.
                inside = _clip(part, self.bounds[owner], self.bounds[owner + 1])
                if len(inside):
                    at = torch.searchsorted(units.positions[head], _tensor(inside))
                    found.append(at + (first + units.starts[head]))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")


# Each holds index tensors on the device.
@lru_cache(maxsize=8)
def plan_for(
    pattern: DilatedPattern, bounds: tuple[int, ...], rank: int, is_causal: bool, device: torch.device
) -> RingPlan:
    """The plan, computed once; a layer's index tensors are its neighbours' too."""
    return RingPlan(pattern, bounds, rank, is_causal, device)


@lru_cache(maxsize=128)
def travelling(pattern: DilatedPattern, bounds: tuple[int, ...], receiver: int, owner: int, is_causal: bool) -> Units:
    """The units that one rank needs of another."""
    start, stop = bounds[owner], bounds[owner + 1]

    @cache
    def needed(branch: int, offset: int) -> list[range]:
        meetings = _meetings(pattern, bounds, receiver, branch, offset, is_causal)
        parts = (_clip(part, start, stop) for meeting in meetings for part in meeting.keys)
        return [part for part in parts if len(part)]

    # Heads that keep the same share a tensor.
    @cache
    def union(kept: tuple[tuple[int, int], ...]) -> Tensor:
        marks = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
        for part in itertools.chain.from_iterable(needed(*key) for key in kept):
            marks[part.start - start : part.stop - start : part.step] = True
        return marks.nonzero().flatten() + start

    positions = []
    for head in range(pattern.num_heads):
        keys = ((i, pattern.offset(i, head)) for i in range(len(pattern.branches)))
        positions.append(union(tuple(key for key in keys if needed(*key))))
    return Units(tuple(positions), tuple(itertools.accumulate((len(p) for p in positions), initial=0)))


def _meetings(
    pattern: DilatedPattern, bounds: tuple[int, ...], rank: int, branch: int, offset: int, is_causal: bool
) -> Iterator[Meeting]:
    """Where a rank's queries meet remote keys: only a segment that an end of the shard cuts has any, so two at most."""
    (length, rate), shard = pattern.branches[branch], (bounds[rank], bounds[rank + 1])
    found: dict[int, tuple[range, list[range]]] = {}
    # Before the shard, after it.
    for keys in ((bounds[0], shard[0]), (shard[1], bounds[-1])):
        if is_causal and keys[0] >= shard[1]:
            continue
        # Slots of the segments that hold both queries of the shard and keys outside it.
        for span in pattern.spans(branch, offset, shard, keys):
            assert span.num_segments == 1
            # Slots of the span, counted from the segment's first member, as positions.
            base = span.first_segment * length + offset
            queries = range(base + span.q_lo * rate, base + span.q_hi * rate, rate)
            parts = found.setdefault(span.first_segment, (queries, []))[1]
            parts.append(range(base + span.k_lo * rate, base + span.k_hi * rate, rate))
    for segment, (queries, parts) in found.items():
        yield Meeting(segment, queries, tuple(parts))


def _clip(part: range, start: int, stop: int) -> range:
    """The positions of a range that lie in `[start, stop)`."""
    # The first member at or after `start`: the range's own step, counted down from its first.
    first = max(part.start, part.start - (part.start - start) // part.step * part.step)
    return range(first, max(first, min(part.stop, stop)), part.step)


def _tensor(part: range) -> Tensor:
    return torch.arange(part.start, part.stop, part.step, device="cpu")


def unit_bytes(batch: int, head_dim: int, element_size: int) -> int:
    """Bytes of a unit: a row of K and a row of V for every sequence of the batch."""
    return 2 * batch * head_dim * element_size


def closed_form_units(pattern: DilatedPattern, seq_len: int, world_size: int) -> int | None:
    """Units that come to each rank without causality, by `H * sum (w_i - w_{i-1}) / r_i` over the remote branches.

    `w_{-1}` is the shard's length n. None where the formula does not hold; `closed_form_needs` says why.
    """
    if closed_form_needs(pattern, seq_len, world_size) is not None:
        return None
    lengths, rates, _ = _remote(pattern, seq_len, seq_len // world_size)
    return pattern.num_heads * sum((b - a) // r for (a, b), r in zip(itertools.pairwise(lengths), rates, strict=True))


def closed_form_needs(pattern: DilatedPattern, seq_len: int, world_size: int) -> str | None:
    """What `closed_form_units` takes and the pattern does not have: each segment then adds to the one before it what
    lies between them, at its own rate. None where the formula holds."""
    shard, rest = divmod(seq_len, world_size)
    lengths, rates, local = _remote(pattern, seq_len, shard)
    needs = {
        "shards of equal length": rest == 0 and shard > 0,
        "modulo offsets": pattern.offsets == "modulo" or not rates,
        "shards of whole segments": all(shard % w == 0 for w in local),
        "segments of whole shards, each a multiple of the one before": all(
            b % a == 0 and b > a for a, b in itertools.pairwise(lengths)
        ),
        "rates that are multiples of the one before": all(b % a == 0 for a, b in itertools.pairwise(rates)),
        "shards that are multiples of the rates": all(shard % r == 0 for r in rates),
        "a sequence of whole segments": seq_len % lengths[-1] == 0,
    }
    return next((need for need, is_met in needs.items() if not is_met), None)


def _remote(pattern: DilatedPattern, seq_len: int, shard: int) -> tuple[list[int], list[int], list[int]]:
    """The shard's length and those of longer, so remote, segments; the latter's rates; the lengths of the others."""
    branches = sorted({(min(w, seq_len), r) for w, r in pattern.branches if min(w, seq_len) > shard})
    local = [w for w, _ in pattern.branches if min(w, seq_len) <= shard]
    return [shard, *(w for w, _ in branches)], [r for _, r in branches], local


def equal_bounds(seq_len: int, world_size: int) -> tuple[int, ...]:
    """Bounds of shards as `torch.chunk` cuts them: equally long, the last ones shorter or empty."""
    size = ceil_div(seq_len, world_size)
    return tuple(min(i * size, seq_len) for i in range(world_size + 1))
