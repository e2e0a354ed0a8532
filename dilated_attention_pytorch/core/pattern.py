"""The dilated pattern: which positions a branch keeps, and which keys a query sees.

LongNet's rule (arXiv 2307.02486, section 2.2; its arithmetic is in `members.py`): position n belongs to (branch i,
head h) when `(n mod w_i) mod r_i == o_i(h)`; a query sees the members of its own segment in each branch it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import Members, ceil_div
from dilated_attention_pytorch.core.validation import (
    check_bool,
    check_choice,
    check_dense,
    check_index,
    check_int,
    check_int_range,
    check_positive_ints,
)
from dilated_attention_pytorch.types import Offsets

_MOST_HEADS = 1 << 16  # more than any kernel's grid has room for; every method is linear in them
_MOST_COUNTED = 1 << 36  # (position, head, branch) triples that `coverage` goes through: minutes


class Span(NamedTuple):
    """Consecutive segments whose queries and keys fill the same slots.

    Slot j of segment s is position `s * w + offset + j * r`. Queries are slots `[q_lo, q_hi)` and keys are slots
    `[k_lo, k_hi)` of each of the `num_segments` segments from `first_segment` on.
    """

    first_segment: int
    num_segments: int
    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int

    def pairs(self, is_causal: bool) -> int:
        """How many (query, key) pairs the span holds; a causal query at slot j sees the keys at slots up to j."""
        num_q, num_k = self.q_hi - self.q_lo, self.k_hi - self.k_lo
        if not is_causal:
            return self.num_segments * num_q * num_k
        # Queries before the last key see j + 1 - k_lo keys each, the later ones see all of them.
        first, last = max(self.q_lo, self.k_lo), min(self.q_hi, self.k_hi)
        climbing = max(0, last - first)
        ramp = climbing * (first + 1 - self.k_lo) + climbing * (climbing - 1) // 2
        saturated = max(0, self.q_hi - max(self.q_lo, self.k_hi)) * num_k
        return self.num_segments * (ramp + saturated)


@dataclass(frozen=True)
class DilatedPattern:
    """Branches of (segment length, dilation rate) and the residue each head keeps in each of them.

    Args:
        segment_lengths: w_i, one positive int per branch. They need not divide the sequence, nor nest.
        dilation_rates: r_i, as many positive ints. They need not divide w_i.
        num_heads: number of key/value heads; a group of query heads shares its key head's rows.
        offsets: `"modulo"`, the paper's `h mod r`, or `"blocked"`, the official code's `h // ceil(H / r)`.

    Raises:
        ValueError: empty or unequal lists, a length or rate below 1, more than 65,536 heads, an unknown rule.
        TypeError: a length, rate or head count that is not an int.

    Example:
        >>> pattern = DilatedPattern((4, 8), (1, 2), num_heads=2)
        >>> pattern.keys_of(5, head=1, seq_len=8)
        [range(4, 8), range(1, 8, 2)]
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    num_heads: int
    offsets: Offsets = "modulo"

    def __post_init__(self) -> None:
        lengths = check_positive_ints("segment_lengths", self.segment_lengths)
        rates = check_positive_ints("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                "expected segment_lengths and dilation_rates of equal length, "
                f"got {len(lengths)} lengths {list(lengths)} and {len(rates)} rates {list(rates)}"
            )
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)
        object.__setattr__(self, "num_heads", check_int("num_heads", self.num_heads, 1, _MOST_HEADS + 1))
        object.__setattr__(self, "offsets", check_choice("offsets", self.offsets, Offsets))

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The (segment length, dilation rate) of each branch."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def offset(self, branch: int, head: int) -> int:
        """The residue that key/value head `head` keeps in branch `branch`."""
        rate = self.dilation_rates[self._checked(branch)]
        head = check_index("head", head, self.num_heads)
        return head % rate if self.offsets == "modulo" else head // ceil_div(self.num_heads, rate)

    def head_groups(self, branch: int) -> list[tuple[int, slice]]:
        """The heads of a branch by the offset they share, as (offset, slice of heads)."""
        rate = self.dilation_rates[self._checked(branch)]
        if self.offsets == "modulo":
            step = min(rate, self.num_heads)  # a step beyond the heads may be near 2**63, and strides multiply it
            return [(o, slice(o, self.num_heads, step)) for o in range(step)]
        size = ceil_div(self.num_heads, rate)
        starts = range(0, self.num_heads, size)
        return [(start // size, slice(start, min(start + size, self.num_heads), 1)) for start in starts]

    def members(self, branch: int, offset: int) -> Members:
        """The positions that the heads of one offset keep in a branch."""
        length, rate = self.branches[self._checked(branch)]
        return Members(length, rate, check_index("offset", offset, rate))

    def _checked(self, branch: int) -> int:
        return check_index("branch", branch, len(self.segment_lengths))

    def membership(self, positions: Tensor) -> Tensor:
        """Which positions each (branch, head) keeps.

        Args:
            positions: int64 of any shape; negative positions (left padding) belong to nothing.

        Returns:
            Bool `(num_branches, num_heads, *positions.shape)`.
        """
        check_dense("positions", positions)
        if positions.dtype != torch.int64:
            raise TypeError(f"expected positions of dtype int64, got {positions.dtype}")
        rows = []
        for i in range(len(self.branches)):
            rows.append(torch.stack([self.members(i, self.offset(i, h)).of(positions) for h in range(self.num_heads)]))
        return torch.stack(rows)

    def slots(self, branch: int, offset: int) -> int:
        """How many positions a whole segment of the branch keeps for this offset."""
        return self.members(branch, offset).slots

    def keys_of(self, position: int, head: int, seq_len: int, *, is_causal: bool = False) -> list[range]:
        """The key positions that one query sees, a range for each branch it belongs to.

        Args:
            position: the query, in `[0, seq_len)`.
            head: key/value head.
            seq_len: N.
            is_causal: leave out later positions.
        """
        seq_len = check_int("seq_len", seq_len, 0)
        position = check_index("position", position, seq_len)
        check_bool("is_causal", is_causal)
        found = []
        for i, (length, rate) in enumerate(self.branches):
            offset, start = self.offset(i, head), position // length * length
            if (position - start) % rate == offset:
                stop = min(start + length, seq_len, position + 1 if is_causal else seq_len)
                found.append(range(start + offset, stop, rate))
        return found

    def spans(self, branch: int, offset: int, q_range: tuple[int, int], k_range: tuple[int, int]) -> tuple[Span, ...]:
        """The segments in which queries of one range meet keys of another, grouped where they look alike.

        Args:
            branch: branch index.
            offset: the offset of the heads in question.
            q_range: positions `[start, stop)` of the queries.
            k_range: positions `[start, stop)` of the keys.

        Returns:
            At most nine spans, however long the ranges: all segments but those that a range's end cuts are alike.
        """
        offset = self.members(branch, offset).offset
        q_range, k_range = check_int_range("q_range", q_range), check_int_range("k_range", k_range)
        return _spans(self, int(branch), offset, q_range, k_range)

    def repeats_from(self, start: int, stop: int) -> bool:
        """Whether the positions `[start, stop)`, counted from start, have the same segments and members.

        So it is where start begins a segment of each branch, or the range lies within one segment and start at a
        whole number of its rates.
        """
        start, stop = check_int("start", start, 0), check_int("stop", stop, 0)
        return all(start % w == 0 or (start // w == (stop - 1) // w and start % w % r == 0) for w, r in self.branches)

    def pairs(
        self,
        seq_len: int,
        *,
        is_causal: bool = False,
        q_range: tuple[int, int] | None = None,
        k_range: tuple[int, int] | None = None,
    ) -> int:
        """Number of (query, key) pairs over all branches and key/value heads, a key counted once per branch.

        Args:
            seq_len: N.
            is_causal: count only keys that are not later than the query.
            q_range: positions `[start, stop)` of the queries, all of them by default.
            k_range: likewise for the keys.
        """
        whole = (0, check_int("seq_len", seq_len, 0))
        check_bool("is_causal", is_causal)
        q_range, k_range = (whole if x is None else x for x in (q_range, k_range))
        return sum(
            len(range(*heads.indices(self.num_heads))) * span.pairs(is_causal)
            for i in range(len(self.branches))
            for offset, heads in self.head_groups(i)
            for span in self.spans(i, offset, q_range, k_range)
        )

    def coverage(self, seq_len: int) -> float:
        """The share of (position, head) pairs that belong to at least one branch.

        Positions are counted one by one, up to the least common multiple of the segment lengths.
        """
        seq_len = check_int("seq_len", seq_len, 0)
        if seq_len == 0 or 1 in self.dilation_rates:
            return 1.0
        # Wherever all branches start a segment together, the pattern starts anew.
        period = min(seq_len, math.lcm(*self.segment_lengths))
        most = _MOST_COUNTED // (self.num_heads * len(self.branches))
        if period > most:
            raise ValueError(
                f"expected seq_len of at most {most}, or segments whose least common multiple is, got {seq_len}: every "
                "position up to there is looked at"
            )
        rest = seq_len % period
        whole_and_rest = self._covered(0, rest), self._covered(rest, period)
        covered = seq_len // period * sum(whole_and_rest) + whole_and_rest[0]
        return covered / (seq_len * self.num_heads)

    def _covered(self, start: int, stop: int) -> int:
        """How many (position, head) pairs of a range belong to a branch."""
        step = 1 << 20  # bounds the memory at any length
        parts = (torch.arange(at, min(at + step, stop)) for at in range(start, stop, step))
        return sum(int(self.membership(positions).any(0).sum()) for positions in parts)

    @property
    def keys_per_query(self) -> float:
        """About how many keys one covered query sees in a long sequence: the sum of w_i / r_i^2 over the branches.

        A position belongs to branch i with probability 1 / r_i and then sees w_i / r_i keys.
        """
        return sum(length / rate**2 for length, rate in self.branches)


def slot_range(start: int, stop: int, base: int, rate: int, slots: int) -> tuple[int, int]:
    """The slots j in `[0, slots)` whose position `base + j * rate` lies in `[start, stop)`."""
    lo = min(max(0, ceil_div(start - base, rate)), slots)
    hi = min(max(lo, ceil_div(stop - base, rate)), slots)
    return lo, hi


def group_spans(rows: Iterator[tuple[int, int, Sequence[int]]]) -> tuple[Span, ...]:
    """Joins neighbouring (first segment, number of segments, slots) that fill the same slots."""
    spans: list[Span] = []
    for first, count, slots in rows:
        q_lo, q_hi, k_lo, k_hi = slots
        if q_lo >= q_hi or k_lo >= k_hi or count <= 0:
            continue
        if spans and spans[-1].first_segment + spans[-1].num_segments == first and spans[-1][2:] == tuple(slots):
            spans[-1] = spans[-1]._replace(num_segments=spans[-1].num_segments + count)
        else:
            spans.append(Span(first, count, q_lo, q_hi, k_lo, k_hi))
    return tuple(spans)


@lru_cache(maxsize=4096)
def _spans(
    pattern: DilatedPattern, branch: int, offset: int, q_range: tuple[int, int], k_range: tuple[int, int]
) -> tuple[Span, ...]:
    length, rate = pattern.branches[branch]
    slots = pattern.slots(branch, offset)
    (q_start, q_stop), (k_start, k_stop) = q_range, k_range
    if q_start >= q_stop or k_start >= k_stop or slots == 0:
        return ()
    first = max(q_start // length, k_start // length)
    last = min((q_stop - 1) // length, (k_stop - 1) // length)
    # Only a segment that holds an end of a range can be cut; between those all are whole and alike.
    cut = sorted({first, last, *(p // length for p in (q_start, q_stop - 1, k_start, k_stop - 1))})

    def rows() -> Iterator[tuple[int, int, Sequence[int]]]:
        following = first
        for s in (s for s in cut if first <= s <= last):
            yield following, s - following, (0, slots, 0, slots)
            base = s * length + offset
            q_slots = slot_range(q_start, q_stop, base, rate, slots)
            k_slots = slot_range(k_start, k_stop, base, rate, slots)
            yield s, 1, (*q_slots, *k_slots)
            following = s + 1

    return group_spans(rows())
