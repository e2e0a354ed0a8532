"""One sequence over many ranks: a rank's place among them, and ring attention in place of a model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.models.config import Config, LongNetConfig, Model
from dilated_attention_pytorch.models.layers import Layer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dilated_attention_pytorch.ring_attention import RingAttentionConfig


def ring_config(config: LongNetConfig, **options: Any) -> RingAttentionConfig:
    """The config of the ring attention that computes a model's attention; `options` are further fields of it."""
    from dilated_attention_pytorch.ring_attention import RingAttentionConfig

    if config.mixing_gradient != "exact":
        raise ValueError(
            "expected mixing_gradient='exact' for a sequence over several ranks, got "
            f"{quoted(config.mixing_gradient)}: ring attention has no other"
        )
    shared = {name: getattr(config, name) for name in ("segment_lengths", "dilation_rates", "offsets", "padding")}
    return RingAttentionConfig(**shared, dropout=config.attention_dropout, **options)


@dataclass
class ContextShards:
    """A rank's place among those that share a sequence."""

    rank: int
    size: int  # of the group
    group_name: Any  # the name alone, so that a model can be copied; torch's type for it is younger than torch 2.11
    seq_len: int = -1  # of the last sequence

    def start(self, length: int, seq_len: int | None) -> int:
        """The first position of this rank's shard of `length` tokens; a ValueError for a shard of another length.
        The whole of `seq_len` tokens is cut as `torch.chunk` does; without it shards are equal."""
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
        """Makes the next attention compare plans on every rank."""
        from dilated_attention_pytorch.ring_attention.utils import handshake

        # Ranks compare when their own call changes. Another length of the whole may leave some shards as they were, and
        # those ranks would not come to the comparison.
        if self.size > 1:
            handshake.state_of(self.group()).previous = ""

    def group(self) -> ProcessGroup:
        """The group itself."""
        return torch_private.process_group(self.group_name)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's x, on every rank.

    Every rank computes the same loss from the sum, so the gradient of its own x is the loss's as it stands. Summed on
    the way back it would count once per rank.
    """

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


sum_over_ranks: Callable[[Tensor, ContextShards], Tensor] = _SumOverRanks.apply


class ShardedModel(Model[Config]):
    """The base of models whose sequences can be sharded over ranks."""

    _shards: ContextShards | None = None

    def shard_context(self, group: ProcessGroup | DeviceMesh, *, mesh_dim: str | None = None, **ring: Any) -> None:
        """From now on each rank of a group holds its part of every sequence, in rank order.

        All attention becomes ring attention with the model's own settings; parameters and their names stay. Their
        gradients are then this rank's share, to be summed over the group. The class says what a rank takes and gives.

        Args:
            group: a ProcessGroup; or a DeviceMesh, of one dimension or with `mesh_dim`.
            mesh_dim: name of the mesh's dimension over which sequences are sharded.
            ring: further fields of `RingAttentionConfig`, such as `mode` and `timeout`.

        Raises:
            ValueError: a setting that ring attention does not have: `mixing_gradient="detached"`.
        """
        from dilated_attention_pytorch.ring_attention import RingDilatedAttention

        own: Any = self.config
        shape = getattr(own, "layers", own)  # a slide encoder's config has its layers' inside
        config = ring_config(shape, **{"backend": self._backend, **ring})
        attention = RingDilatedAttention(config, group, mesh_dim=mesh_dim)
        for layer in self.modules():
            if not isinstance(layer, Layer):
                continue
            if getattr(layer.self_attn.attention, "head_groups", False):
                raise ValueError(
                    "expected layers with head_groups=False, got True: in ring attention a head has all branches"
                )
            before: Any = layer.self_attn.attention  # a ring's has a config
            own_config = replace(config, segment_shift=getattr(before, "config", before).segment_shift)
            mine = RingDilatedAttention(own_config, group, mesh_dim=mesh_dim).train(layer.training)
            layer.self_attn.attention = mine  # type: ignore[assignment]  # it takes and gives the same
        self._shards = ContextShards(attention.rank, attention.world_size, attention.group_name)
