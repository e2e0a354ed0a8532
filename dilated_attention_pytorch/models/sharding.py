"""One sequence over many ranks: what a model needs to know of the others, and the swap of its attentions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.layers import Layer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dilated_attention_pytorch.ring_attention import RingAttentionConfig


def ring_config(config: LongNetConfig, **options: Any) -> RingAttentionConfig:
    """The ring attention that computes what a model's attention computes.

    Args:
        config: of the model.
        options: further fields of `RingAttentionConfig`, such as `mode`, `timeout` and `backend`.

    Raises:
        ValueError: a setting that ring attention does not have: detached mixing gradients.
        TypeError: an unknown option.
    """
    from dilated_attention_pytorch.ring_attention import RingAttentionConfig

    if config.mixing_gradient != "exact":
        raise ValueError(
            f"expected mixing_gradient='exact' for a sequence over several ranks, got {config.mixing_gradient!r}: "
            "ring attention has no other"
        )
    return RingAttentionConfig(
        segment_lengths=config.segment_lengths,
        dilation_rates=config.dilation_rates,
        offsets=config.offsets,
        padding=config.padding,
        dropout=config.attention_dropout,
        **options,
    )


@dataclass
class ContextShards:
    """A rank's place among those that share a sequence.

    Attributes:
        rank: of this process in the group.
        size: of the group.
        group_name: of the group; the name alone, as in `RingDilatedAttention`, so that a model can be copied.
        seq_len: of the last sequence.
    """

    rank: int
    size: int
    group_name: str
    seq_len: int = -1

    def start(self, length: int, seq_len: int | None) -> int:
        """The first position of this rank's shard.

        Args:
            length: of the shard.
            seq_len: of the whole sequence, cut as `torch.chunk` does; equal shards when absent.

        Raises:
            ValueError: a shard of another length than the cut gives.
        """
        from dilated_attention_pytorch.ring_attention.plan import equal_bounds

        seq_len = length * self.size if seq_len is None else seq_len
        start, stop = equal_bounds(seq_len, self.size)[self.rank : self.rank + 2]
        if stop - start != length:
            raise ValueError(
                f"expected {stop - start} tokens on rank {self.rank} of {self.size}, its shard [{start}, {stop}) of a "
                f"sequence of {seq_len}, got {length}"
            )
        if seq_len != self.seq_len:
            self.compare_again()
            self.seq_len = seq_len
        return start

    def compare_again(self) -> None:
        """Makes the next attention compare plans on every rank.

        Another length of the whole may change some shards and leave others as long as they were. Ranks compare plans
        when their own call changes, so those that see no change would not come: all are made to.
        """
        from dilated_attention_pytorch.ring_attention.utils import handshake

        if self.size > 1:
            handshake.state_of(self.group()).previous = ""

    def group(self) -> ProcessGroup:
        """The group itself."""
        return torch_private.process_group(self.group_name)


def sum_over_ranks(x: Tensor, shards: ContextShards) -> Tensor:
    """The sum of every rank's x, on every rank.

    Where each rank computes the same loss from the sum, the gradient of a rank's own x is the loss's, as it is: nothing
    is summed on the way back, or it would count once a rank.
    """
    out: Tensor = _SumOverRanks.apply(x, shards)  # type: ignore[no-untyped-call]
    return out


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ContextShards) -> Tensor:
        import torch.distributed as dist

        total = x.clone()
        if shards.size > 1:
            dist.all_reduce(total, group=shards.group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def shard_layers(
    layers: Iterable[nn.Module], config: RingAttentionConfig, group: ProcessGroup | DeviceMesh, mesh_dim: str | None
) -> ContextShards:
    """Puts ring attention in the place of every layer's self-attention, and returns where this rank stands."""
    from dilated_attention_pytorch.ring_attention import RingDilatedAttention

    attention = RingDilatedAttention(config, group, mesh_dim=mesh_dim)
    for layer in layers:
        assert isinstance(layer, Layer) and layer.encoder_attn is None
        if getattr(layer.self_attn.attention, "head_groups", False):
            raise ValueError(
                "expected layers with head_groups=False, got True: ring attention gives a head all branches"
            )
        mine = RingDilatedAttention(config, group, mesh_dim=mesh_dim).train(layer.training)
        layer.self_attn.attention = mine  # type: ignore[assignment]  # it takes and gives the same
    return ContextShards(attention.rank, attention.world_size, attention.group_name)
