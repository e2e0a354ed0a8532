"""The dilated pattern: which positions a branch keeps, and which keys a query sees.

LongNet's rule (arXiv 2307.02486, section 2.2; its arithmetic is in `members.py`): position n belongs to (branch i,
head h) when `(n mod w_i) mod r_i == o_i(h)`; a query sees the members of its own segment in each branch it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from dilated_attention_pytorch.core import reach, torch_private
from dilated_attention_pytorch.core.members import Members, ceil_div
from dilated_attention_pytorch.core.shift import layer_shifts
from dilated_attention_pytorch.core.spans import Span, group_spans, slot_range
from dilated_attention_pytorch.core.validation import (
    check_bool,
    check_choice,
    check_dense,
    check_index,
    check_int,
    check_int_range,
    check_positive_ints,
    listed,
)
from dilated_attention_pytorch.types import Offsets

_MOST_HEADS = 1 << 16  # more than any kernel's grid has room for; every method is linear in them
_MOST_COUNTED = 1 << 36  # (position, head, branch) triples that `coverage` goes through: minutes


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
                f"got {len(lengths)} lengths [{listed(lengths)}] and {len(rates)} rates [{listed(rates)}]"
            )
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)
        object.__setattr__(self, "num_heads", check_int("num_heads", self.num_heads, 1, _MOST_HEADS + 1))
        object.__setattr__(self, "offsets", check_choice("offsets", self.offsets, Offsets))

    @classmethod
    def geometric(
        cls,
        seq_len: int,
        shortest: int = 2048,
        factor: int = 4,
        *,
        num_heads: int,
        max_rate: int | None = None,
        offsets: Offsets = "modulo",
    ) -> Self:
        """LongNet's own rule (arXiv 2307.02486, section 2.2): w_i and r_i grow together until one segment covers all.

        Each branch then keeps `shortest` positions per segment, so that a position sees about
        `shortest * factor / (factor - 1)` keys, however long the sequence is. Segments nest. The last step is the
        smallest divisor of the factor that suffices. Where the factor divides `shortest`, each branch keeps the first
        position of every shorter segment: as many layers as there are branches connect all positions.

        Args:
            seq_len: N, the longest sequence that is to be reached in whole.
            shortest: w_0, whose rate is 1.
            factor: w_{i+1} / w_i = r_{i+1} / r_i, at least 2.
            num_heads, offsets: as in the class.
            max_rate: no rate is larger. Far branches then keep more positions, and cost more.

        Example:
            >>> DilatedPattern.geometric(1_000_000, num_heads=12).branches
            ((2048, 1), (8192, 4), (32768, 16), (131072, 64), (524288, 256), (1048576, 512))
        """
        seq_len, factor = check_int("seq_len", seq_len, 1), check_int("factor", factor, 2)
        lengths = [check_int("shortest", shortest, 1)]
        most = lengths[0] if max_rate is None else check_int("max_rate", max_rate, 1)
        divisors = [d for d in range(2, min(factor, 1 << 16) + 1) if factor % d == 0] or [factor]
        while (length := lengths[-1]) < seq_len:
            lengths.append(length * next((d for d in divisors if length * d >= seq_len), factor))
        if lengths[-1] >= 1 << 63:
            raise ValueError(f"expected seq_len to fit into segments below 2**63, got {seq_len}, factor {factor}")
        rates = [w // lengths[0] if max_rate is None else min(w // lengths[0], most) for w in lengths]
        return cls(tuple(lengths), tuple(rates), num_heads, offsets)

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The (segment length, dilation rate) of each branch."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def offset(self, branch: int, head: int) -> int:
        """The residue that key/value head `head` keeps in branch `branch`."""
        rate = self.dilation_rates[self._checked(branch)]
        head = check_index("head", head, self.num_heads)
        return head % rate if self.offsets == "modulo" else head // ceil_div(self.num_heads, rate)

    def offsets_of(self, branch: int, heads: Tensor) -> Tensor:
        """The residues that some key/value heads keep, int64 like `heads`; nothing is looked at."""
        rate = self.dilation_rates[self._checked(branch)]
        return heads % rate if self.offsets == "modulo" else heads // ceil_div(self.num_heads, rate)

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
            At most three spans, however long the ranges: all segments but the first and the last are whole.
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
        parts = (torch.arange(at, min(at + step, stop), device="cpu") for at in range(start, stop, step))
        with torch_private.outside_modes():
            return sum(int(self.membership(positions).any(0).sum()) for positions in parts)

    def reach(self, num_layers: int, seq_len: int, *, is_causal: bool = True, segment_shift: object = 0) -> reach.Reach:
        """How far information travels through so many layers of this pattern, exactly.

        Args:
            num_layers: L; a layer passes on its own position too (the residual), and mixes heads.
            seq_len: N.
            is_causal: whether queries see no later keys.
            segment_shift: of all layers, one per layer, or `"alternate"`.

        Returns:
            `Reach`: the distance to the farthest input of the worst, the median and the best position, what is out of
            reach, and the fewest keys that a position at the start of a segment sees.

        Raises:
            ValueError: an argument out of range; more than 2^27 positions of which none repeat others.

        Example:
            >>> pattern = DilatedPattern((64, 256), (1, 4), num_heads=4)
            >>> pattern.reach(12, 1024)[:4]
            (0, 127, 255, 768)
            >>> DilatedPattern.geometric(1024, 64, num_heads=4).reach(12, 1024).out_of_reach
            0
        """
        shifts = layer_shifts(segment_shift, self.segment_lengths, check_int("num_layers", num_layers, 1, 1 << 16))
        branches = [
            [(self.members(i, o), len(range(*heads.indices(self.num_heads)))) for o, heads in self.head_groups(i)]
            for i in range(len(self.branches))
        ]
        seq_len = check_int("seq_len", seq_len, 0)
        with torch_private.outside_modes():
            return reach.find(branches, shifts, seq_len, is_causal=check_bool("is_causal", is_causal))

    @property
    def keys_per_query(self) -> float:
        """About how many keys one covered query sees in a long sequence: the sum of w_i / r_i^2 over the branches.

        A position belongs to branch i with probability 1 / r_i and then sees w_i / r_i keys.
        """
        return sum(length / rate**2 for length, rate in self.branches)


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
    if first > last:
        return ()

    def cut(s: int) -> tuple[int, int, Sequence[int]]:
        base = s * length + offset
        q_slots = slot_range(q_start, q_stop, base, rate, slots)
        return s, 1, (*q_slots, *slot_range(k_start, k_stop, base, rate, slots))

    # The ends of the ranges lie in the first segment, in the last or beyond them; between those all are whole.
    between = first + 1, last - first - 1, (0, slots, 0, slots)
    return group_spans([cut(first), between, cut(last)] if first < last else [cut(first)])
