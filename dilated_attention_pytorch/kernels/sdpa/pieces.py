"""Cuts a problem into pieces: each is plain attention between rows that lie at fixed strides in the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from dilated_attention_pytorch.core import zero_keys
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.spans import Span


class SlotRows(NamedTuple):
    """Rows `start + s * segment_stride + j * slot_stride` of a tensor, for segments s and slots j."""

    start: int
    num_segments: int
    segment_stride: int
    num_slots: int
    slot_stride: int

    def of(self, x: Tensor, heads: slice) -> Tensor:
        """The view `(B, num_segments, num_slots, heads, D)` of x `(B, N, H, D)`."""
        x = x[:, :, heads]
        batch, row, head, width = x.stride()
        # With one segment (slot) the stride is unused and may be near 2**63; times the row stride it would overflow.
        segment = self.segment_stride * row if self.num_segments > 1 else row
        slot = self.slot_stride * row if self.num_slots > 1 else row
        return x.as_strided(
            (x.shape[0], self.num_segments, self.num_slots, x.shape[2], x.shape[3]),
            (batch, segment, slot, head, width),
            x.storage_offset() + self.start * row,
        )


class Piece(NamedTuple):
    """Attention of some query rows over some key rows, the same in each of several segments.

    Attributes:
        branch: the branch it belongs to.
        heads: key/value heads that share the rows.
        queries: rows of q, or None for a query of zeros (docs/spec.md, 5).
        keys: rows of k and v; may hold no slot.
        outputs: rows of out and lse that the queries' results belong to.
        is_causal: query slot j sees key slots up to j; then there are as many of one as of the other.
        num_zero_keys: keys of logit 0 and value 0 beside the real ones (docs/spec.md, 5).
        is_first: no earlier piece writes these outputs.
    """

    branch: int
    heads: slice
    queries: SlotRows | None
    keys: SlotRows
    outputs: SlotRows
    is_causal: bool
    num_zero_keys: int
    is_first: bool


# A plan of 64 heads can take 0.2 MiB; a step of packed sequences has one per length, which all layers share.
@lru_cache(maxsize=256)
def pieces(problem: Problem, num_queries: int, num_keys: int) -> tuple[Piece, ...]:
    """The pieces of one sequence (range), branch by branch, the densest branch first."""
    cut = _zero_key_pieces if problem.padding == "zero_keys" else _branch_pieces
    return tuple(
        piece
        for rank, branch in enumerate(problem.branch_order)
        for offset, heads in problem.pattern.head_groups(branch)
        for piece in cut(problem, branch, offset, heads, num_queries, num_keys, rank == 0)
    )


def _branch_pieces(
    problem: Problem, branch: int, offset: int, heads: slice, num_queries: int, num_keys: int, is_first: bool
) -> Iterator[Piece]:
    length, rate = problem.pattern.branches[branch]
    q_range = (problem.q_start, problem.q_start + num_queries)
    k_range = (problem.k_start, problem.k_start + num_keys)
    for span in problem.pattern.spans(branch, offset, q_range, k_range):
        base = span.first_segment * length + offset
        for q_lo, q_hi, k_lo, k_hi, is_causal, covers in _cut_diagonal(span, problem.is_causal):
            q_base, k_base = base + q_lo * rate - problem.q_start, base + k_lo * rate - problem.k_start
            queries = SlotRows(q_base, span.num_segments, length, q_hi - q_lo, rate)
            keys = SlotRows(k_base, span.num_segments, length, k_hi - k_lo, rate)
            yield Piece(branch, heads, queries, keys, queries, is_causal, 0, is_first and covers)


def _cut_diagonal(span: Span, is_causal: bool) -> Iterator[tuple[int, int, int, int, bool, bool]]:
    """Cuts a span into rectangles without a mask and at most one causal square: torch's kernels agree on the meaning
    of causal only where queries and keys are the same slots. The last flag: these queries were not yielded before."""
    q_lo, q_hi, k_lo, k_hi = span[2:]
    if not is_causal:
        yield q_lo, q_hi, k_lo, k_hi, False, True
        return
    if q_hi - q_lo == 1:  # decoding: one row that sees every key up to its own
        if k_lo <= q_lo:
            yield q_lo, q_hi, k_lo, min(k_hi, q_lo + 1), False, True
        return
    before = k_lo < q_lo
    if before:
        yield q_lo, q_hi, k_lo, min(k_hi, q_lo), False, True
    start, stop = max(q_lo, k_lo), min(q_hi, k_hi)
    if start < stop:
        yield start, stop, start, stop, True, not before
        if q_hi > k_hi:
            yield k_hi, q_hi, start, k_hi, False, not before


def _zero_key_pieces(
    problem: Problem, branch: int, offset: int, heads: slice, num_queries: int, num_keys: int, is_first: bool
) -> Iterator[Piece]:
    length, rate = problem.pattern.branches[branch]
    if num_queries == 0:
        return
    read, written = zero_keys.strides(length, rate, num_queries)
    for segment in zero_keys.segments(length, rate, offset, num_queries):
        first, count, num_slots = segment.first_segment, segment.num_segments, segment.queries
        keys = SlotRows(first * read + offset, count, read, segment.keys, rate)
        if num_slots:
            queries = SlotRows(first * read + offset, count, read, num_slots, rate)
            outputs = SlotRows(first * written + offset, count, written, num_slots, rate)
            yield Piece(branch, heads, queries, keys, outputs, False, segment.num_zero_keys, is_first)
        if segment.zero_query >= 0:
            row = first * written + offset + segment.zero_query * rate
            outputs = SlotRows(row, count, written, 1, rate)
            yield Piece(branch, heads, None, keys, outputs, False, segment.num_zero_keys, is_first)
