"""Ring attention as users take it: a module without parameters, the same result for every world size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dilated_attention_pytorch._deprecated import takes_old_call  # 0.4.0: goes with _old
from dilated_attention_pytorch.core import dropout, validation
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.functional import dilated_attention_with_lse, in_autocast_dtype
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.kernels.ops import refuse_tangents
from dilated_attention_pytorch.ring_attention import op
from dilated_attention_pytorch.ring_attention.base import BaseRingAttention
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.types import QKV, AttentionOutput, Seed

GroupOrMesh = ProcessGroup | DeviceMesh | None


@takes_old_call("_old.calls:RING")  # 0.4.0: goes with _old
class RingDilatedAttention(BaseRingAttention):
    """Exact dilated attention over a sequence of which every rank holds one contiguous shard, in rank order.

    Shards may be of any lengths. Rows travel only where a segment spans ranks, and of those only the rows that a rank's
    heads keep. Gradients of remote rows return to their owners. A group of one rank, or none, computes
    `dilated_attention` on the whole sequence.

    Args:
        config: see `RingAttentionConfig`.
        process_group: a ProcessGroup; or a DeviceMesh, of one dimension or with `mesh_dim`. Never the world by itself.
        mesh_dim: name of the mesh's dimension over which sequences are sharded.

    Raises:
        TypeError: neither a group nor a mesh.
        ValueError: a mesh of several dimensions without `mesh_dim`.

    Example:
        >>> from dilated_attention_pytorch.ring_attention import (
        ...     RingAttentionConfig, RingDilatedAttention,
        ... )
        >>> config = RingAttentionConfig(segment_lengths=[128, 512], dilation_rates=[1, 4])
        >>> attention = RingDilatedAttention(config)
        >>> q = k = v = torch.randn(1, 1000, 4, 32)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 32])
    """

    def __init__(
        self, config: RingAttentionConfig, process_group: GroupOrMesh = None, *, mesh_dim: str | None = None
    ) -> None:
        super().__init__(config)
        group = group_of(process_group, mesh_dim)
        self.world_size: int = 1 if group is None else group.size()
        self.rank: int = 0 if group is None else group.rank()
        # The name alone: a module with a group in it could be neither copied nor pickled.
        self.group_name = "" if group is None else str(group.group_name)

    @override
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, key_padding_mask: Tensor | None, seed: Seed
    ) -> AttentionOutput:
        config, dropout_p = self.config, self.dropout_p()
        # Nothing to exchange: what one device computes.
        if self.world_size == 1:
            shared = ("segment_lengths", "dilation_rates", "scale", "offsets", "segment_shift", "padding", "backend")
            settings: dict[str, Any] = {name: getattr(config, name) for name in shared}
            settings |= {"is_causal": is_causal, "dropout_p": dropout_p, "key_padding_mask": key_padding_mask}
            return dilated_attention_with_lse(query, key, value, seed=seed, **settings)
        x = QKV(*in_autocast_dtype(query, key, value))
        refuse_tangents(**x._asdict())
        # The op's arguments, tensors taken away: settings, and how rows travel.
        lengths, rates = tuple(config.segment_lengths), tuple(config.dilation_rates)
        pattern = DilatedPattern(lengths, rates, key.shape[2], config.offsets)
        scale = validation.check_scale(config.scale, query.shape[-1], query.dtype)
        # The problem says where the sequence starts: at 0, or at the segment shift.
        start = config.segment_shift
        problem = Problem(pattern, is_causal, scale, dropout_p, start, start, padding=config.padding)
        requires_grad = torch.is_grad_enabled() and any(y.requires_grad for y in x)
        gradient_dtype = "" if config.gradient_dtype is None else str(config.gradient_dtype).removeprefix("torch.")
        keep_rows, same_seed = requires_grad and config.remote_rows == "keep", seed is not None
        how = config.mode, gradient_dtype, keep_rows, requires_grad, same_seed, config.check, config.timeout
        wire = op.Wire(self.group_name, *how, choose_backend(x, problem, config.backend).backend)
        # Where a shard starts, and how long the sequence is, the ranks find out together.
        masks = key_padding_mask, dropout.seed_tensor(seed, dropout_p, query.device)
        out, lse, *_ = op.ring_attention(*x, *masks, *problem.pack(), *wire)
        return AttentionOutput(out, lse)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, world_size={self.world_size}"


def group_of(group: GroupOrMesh, mesh_dim: str | None) -> ProcessGroup | None:
    """The process group meant."""
    if isinstance(group, DeviceMesh):
        if mesh_dim is None and group.ndim != 1:
            raise ValueError(
                f"expected mesh_dim with a DeviceMesh of {group.ndim} dimensions, got None; its dimensions are "
                f"{group.mesh_dim_names}"
            )
        return group.get_group(mesh_dim)
    if mesh_dim is not None:
        raise ValueError(
            f"expected a DeviceMesh with mesh_dim={validation.quoted(mesh_dim)}, got {type(group).__name__}"
        )
    # None is no group at all: the world is rarely the group that shares a sequence.
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(
            f"expected process_group to be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}"
        )
    return group
