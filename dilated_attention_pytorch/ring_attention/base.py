"""What every ring attention is: a configuration, and one method that attends on this rank's shard."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from typing_extensions import override

from dilated_attention_pytorch.core import validation
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.types import QKV, AttentionOutput, Seed


class BaseRingAttention(nn.Module, ABC):
    """Dilated attention on one rank's contiguous shard of a sequence.

    A subclass says how the rows of other ranks are reached, in `attend`; what users pass is checked here.

    Args:
        config: see `RingAttentionConfig`.
    """

    def __init__(self, config: RingAttentionConfig) -> None:
        super().__init__()
        if not isinstance(config, RingAttentionConfig):
            raise TypeError(f"expected config to be a RingAttentionConfig, got {type(config).__name__}")
        self.config = config

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, key_padding_mask: Tensor | None, seed: Seed
    ) -> AttentionOutput:
        """Attention of this rank's queries over the whole sequence's keys; arguments as in `forward`, checked."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        *,
        seed: Seed = None,
        row_start: None = None,
        cu_seqlens: None = None,
        q_start: int = 0,
        k_start: int = 0,
    ) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks.

        Takes what `DilatedAttention` takes, so that it can stand in its place in a `MultiheadDilatedAttention`.

        Args:
            query: `(B, n, H, D)`, this rank's positions; the ranks' shards follow one another in rank order.
            key: `(B, n, H_kv, D)`, H a multiple of H_kv.
            value: like key.
            is_causal: hide keys later than the query in the whole sequence.
            key_padding_mask: bool `(B, n)` for this rank's positions, True = real.
            seed: of the dropout mask, the same on every rank; drawn on the first rank when absent.
            row_start, cu_seqlens: only None: neither left-padded nor packed rows are sharded.
            q_start, k_start: only 0: where a shard starts follows from the ranks before it.

        Returns:
            `(B, n, H, D)` in the query's dtype: what one device would give for these positions.

        Raises:
            ValueError: shapes, devices or options that do not fit.
            TypeError: an argument of the wrong type or dtype.
            RingError: ranks that disagree, died or came too late.
        """
        if row_start is not None or cu_seqlens is not None or q_start != 0 or k_start != 0:
            raise ValueError(
                "expected no row_start, cu_seqlens, q_start or k_start in ring attention: it takes whole rows of one "
                "sequence each, right-padded through key_padding_mask, of which every rank holds a shard"
            )
        return self.with_lse(query, key, value, is_causal, key_padding_mask, seed=seed).out

    def with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        *,
        seed: Seed = None,
    ) -> AttentionOutput:
        """`forward` together with the log-sum-exp `(B, H, n)`; both are differentiable."""
        # What a rank can check alone; the ranks compare the rest in a handshake.
        validation.check_qkv(QKV(query, key, value))
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                "expected query, key and value of the same positions, got "
                f"{query.shape[1]} queries and {key.shape[1]} keys"
            )
        validation.check_bool("is_causal", is_causal)
        if key_padding_mask is not None:
            validation.check_key_padding_mask(key_padding_mask, query.shape[0], query.shape[1], query.device)
        validation.check_seed(seed)
        if self.config.padding == "zero_keys" and (is_causal or key_padding_mask is not None):
            raise ValueError(
                "expected is_causal=False and no key_padding_mask with padding='zero_keys', got "
                f"is_causal={is_causal} and {'no' if key_padding_mask is None else 'a'} mask: the official code's "
                "numbers know neither"
            )
        return self.attend(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask, seed=seed)

    def dropout_p(self) -> float:
        """The probability in force: the configuration's in training mode, else 0."""
        return self.config.dropout if self.training else 0.0

    @override
    def extra_repr(self) -> str:
        config = self.config
        return (
            f"segment_lengths={list(config.segment_lengths)}, dilation_rates={list(config.dilation_rates)}, "
            f"mode={config.mode!r}"
        )
