"""One attention call with its tensors taken away: everything about it that is not data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.types import MixingGradient, Padding


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
        padding: "none", or "zero_keys" for the official code's filled-up segments (SPEC 5).
    """

    pattern: DilatedPattern
    is_causal: bool
    scale: float
    dropout_p: float
    q_start: int
    k_start: int
    seq_len: int
    mixing_gradient: MixingGradient
    padding: Padding

    @staticmethod
    @lru_cache(maxsize=1024)  # an op's call rebuilds it in each pass
    def of(
        num_kv_heads: int,
        segment_lengths: tuple[int, ...],
        dilation_rates: tuple[int, ...],
        offsets: Any,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        q_start: int,
        k_start: int,
        seq_len: int,
        mixing_gradient: Any,
        padding: Any,
    ) -> Problem:
        """From the plain values that an op's schema can hold, in its order."""
        pattern = DilatedPattern(segment_lengths, dilation_rates, num_kv_heads, offsets)
        return Problem(pattern, is_causal, scale, dropout_p, q_start, k_start, seq_len, mixing_gradient, padding)

    def counted_from_range(self, num_queries: int, num_keys: int) -> Problem:
        """The same attention with positions counted from the first of both ranges, where no branch can tell.

        Dropout can: its mask follows positions.
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
