"""Spans: the segments in which queries of one range meet keys of another, grouped where they look alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dilated_attention_pytorch.core.members import ceil_div


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


def slot_range(start: int, stop: int, base: int, rate: int, slots: int) -> tuple[int, int]:
    """The slots j in `[0, slots)` whose position `base + j * rate` lies in `[start, stop)`."""
    lo = min(max(0, ceil_div(start - base, rate)), slots)
    hi = min(max(lo, ceil_div(stop - base, rate)), slots)
    return lo, hi


def group_spans(rows: Iterable[tuple[int, int, Sequence[int]]]) -> tuple[Span, ...]:
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
