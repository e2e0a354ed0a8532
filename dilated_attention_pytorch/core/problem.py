"""One attention call with its tensors taken away: everything about it that is not data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.types import MixingGradient, Padding

# What `pack` gives, as an op's schema names it.
SCHEMA = (
    "SymInt[] segment_lengths, SymInt[] dilation_rates, str offsets, bool is_causal, float scale, float dropout_p, "
    "SymInt q_start, SymInt k_start, SymInt seq_len, str mixing_gradient, str padding"
)


@dataclass(frozen=True)
class Problem:
    """The validated settings that every backend takes beside the tensors.

    Attributes:
        pattern: the branches, for the key/value heads.
        is_causal: hide later positions.
        scale: the factor on q . k.
        dropout_p: probability that an attention weight is dropped.
        q_start: position of the first query.
        k_start: position of the first key.
        seq_len: N, the length of the whole sequence.
        mixing_gradient: differentiate through the branch weights ("exact") or not ("detached").
        padding: "none", or "zero_keys" for the official code's filled-up segments (docs/spec.md, 5).
    """

    pattern: DilatedPattern
    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    q_start: int = 0
    k_start: int = 0
    seq_len: int = 0
    mixing_gradient: MixingGradient = "exact"
    padding: Padding = "none"

    def pack(self) -> tuple[Any, ...]:
        """The settings as the plain values of `SCHEMA`; the number of heads is k's."""
        pattern = self.pattern
        lengths, rates = list(pattern.segment_lengths), list(pattern.dilation_rates)
        return (
            lengths, rates, pattern.offsets, self.is_causal, self.scale, self.dropout_p,
            self.q_start, self.k_start, self.seq_len, self.mixing_gradient, self.padding,
        )  # fmt: skip

    @staticmethod
    def unpack(num_kv_heads: int, values: Sequence[Any]) -> Problem:
        """The problem that `pack` took apart."""
        lengths, rates, *rest = values
        known = all(isinstance(x, int) for x in (num_kv_heads, *lengths, *rates, *rest[4:7]))
        unpacked = _unpacked if known else _unpacked.__wrapped__  # a tracer's symbol is no key
        return unpacked(num_kv_heads, tuple(lengths), tuple(rates), *rest)

    @cached_property
    def branch_order(self) -> tuple[int, ...]:
        """The branches, the densest first: it writes what the others add to."""
        rates = self.pattern.dilation_rates
        return tuple(sorted(range(len(rates)), key=lambda i: rates[i]))

    def rebased(self, num_queries: int, num_keys: int) -> Problem:
        """Shift positions so that the earlier range starts at 0, if that changes no branch; never with dropout.

        Dropout's mask follows positions.
        """
        start = min(self.q_start, self.k_start)
        end = max(self.q_start + num_queries, self.k_start + num_keys)
        if start == 0 and end == self.seq_len:
            return self
        if self.dropout_p > 0.0 or not self.pattern.repeats_from(start, end):
            return self
        return self.at(self.q_start - start, self.k_start - start, end - start)

    def at(self, q_start: int, k_start: int, seq_len: int) -> Problem:
        """The same settings for another range of the sequence."""
        return replace(self, q_start=q_start, k_start=k_start, seq_len=seq_len)


@lru_cache(maxsize=1024)  # an op's call rebuilds it in each pass
def _unpacked(
    num_kv_heads: int, lengths: tuple[int, ...], rates: tuple[int, ...], offsets: Any, *settings: Any
) -> Problem:
    return Problem(DilatedPattern(lengths, rates, num_kv_heads, offsets), *settings)


def one_segment(num_queries: int, num_keys: int, num_kv_heads: int, scale: float) -> Problem:
    """Plain attention: a branch of rate 1 whose one segment holds all queries and all keys."""
    length = max(num_queries, num_keys, 1)
    return Problem(DilatedPattern((length,), (1,), num_kv_heads), False, scale, seq_len=length)
