"""`DilatedAttention` and `MultiheadDilatedAttention` with the arguments of 0.1 and 0.2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dilated_attention_pytorch._old.calls import DILATED, MULTIHEAD, MULTIHEAD_ORDER, OldCall, old_call
from dilated_attention_pytorch._old.names import warn_of_module
from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention


class OldArguments(nn.Module):
    """Stands before a class of today, which is then constructed with old arguments."""

    call: ClassVar[OldCall]
    place: ClassVar[str] = ""  # of an old module whose class may be had without importing it, so that the class warns

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if self.place:
            warn_of_module(self.place)
        super().__init__(**self.construction(args, kwargs))

    def construction(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The new class's arguments."""
        return self.call.arguments(args, kwargs)

    def _first(self, name: str) -> Any:
        """An attribute of the module, or of the first in it that has one; None where none has."""
        return next((getattr(one, name) for one in self.modules() if hasattr(one, name)), None)

    @property
    def num_groups(self) -> int:
        """The number of branches: 0.2 gave each a group of heads."""
        settings: Any = self._first("config") or self._first("attention") or self
        return len(settings.segment_lengths)

    @property
    def ring_size(self) -> int:
        """How many ranks share a sequence: those of the process group. The old argument changes nothing."""
        return int(self._first("world_size") or 1)

    @property
    def mode(self) -> str:
        """`"single"`, or `"distributed"` for a ring whose process group has several ranks."""
        return "single" if self.ring_size == 1 else "distributed"

    def get_memory_stats(self) -> dict[str, Any]:
        """What 0.2 told and still exists: no index or mask is cached; memory of the CUDA device in GiB."""
        stats: dict[str, Any] = {"cached_indices": 0, "cached_masks": 0}
        if torch.cuda.is_available():
            stats["gpu_memory_allocated_gb"] = torch.cuda.memory_allocated() / 1024**3
            stats["gpu_memory_reserved_gb"] = torch.cuda.memory_reserved() / 1024**3
        return stats

    def clear_caches(self) -> None:
        """Gives memory that torch keeps back to the CUDA device, as 0.2 did; there are no caches here."""
        torch.cuda.empty_cache()


class OldAttention(OldArguments):
    """`OldArguments` for attention without parameters, whose old `forward` took a mask and did not apply it."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        **new: Any,
    ) -> Tensor:
        _no_mask("attention_mask", attention_mask)
        out: Tensor = super().forward(query, key, value, is_causal, **new)
        return out


def _no_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError(
            f"expected no {name}, got a tensor: 0.2 took one and did not apply it. Padding goes into "
            "key_padding_mask (True = real) of the new class; other masks have no dilated counterpart"
        )


class DilatedAttention01(OldAttention, DilatedAttention):
    """`dilated_attention_pytorch.dilated_attention.DilatedAttention`."""

    call = DILATED.call
    place = "dilated_attention"


class ImprovedDilatedAttention(OldAttention, DilatedAttention):
    call = old_call(
        "ImprovedDilatedAttention",
        "segment_lengths dilation_rates dropout use_tf32 enable_memory_pool enable_profiling lightweight_pool",
        kept="segment_lengths dilation_rates dropout=attention_dropout",
        keywords="device dtype",
    )


class DistributedImprovedDilatedAttention(OldAttention, DilatedAttention):
    """Like 0.2's rings, it took the whole sequence on every rank and returned all of it."""

    call = ImprovedDilatedAttention.call.named(
        "DistributedImprovedDilatedAttention",
        "segment_lengths dilation_rates dropout use_tf32 sequence_parallel model_parallel use_flash_attention dtype "
        "device",
    )


class MultiheadDilatedAttention01(OldArguments, MultiheadDilatedAttention):
    """0.1's `MultiheadDilatedAttention`: `forward` takes three tensors and `is_causal`, and returns a pair."""

    call = MULTIHEAD.call
    place = "dilated_attention"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_old_norm)  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **new: Any
    ) -> tuple[Tensor, None]:
        return super().forward(query, key, value, is_causal=is_causal, **new)


def _old_norm(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """0.1 called `inner_attn_ln` `norm`; the rest has kept its names."""
    for name in ("weight", "bias"):
        if f"{prefix}norm.{name}" in state:
            state[f"{prefix}inner_attn_ln.{name}"] = state.pop(f"{prefix}norm.{name}")


class ImprovedMultiheadDilatedAttention(OldArguments, MultiheadDilatedAttention):
    """`forward` takes what `forward_arguments` does, and returns a pair."""

    call = MULTIHEAD.call.named("ImprovedMultiheadDilatedAttention", f"{MULTIHEAD_ORDER} use_tf32")

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return super().forward(**forward_arguments(*args, **kwargs))


class MultiheadDilatedAttention02(OldArguments, MultiheadDilatedAttention):
    """0.2's `MultiheadDilatedAttention`: `forward` returns a tensor, or a pair with `need_weights=True`."""

    call = MULTIHEAD.call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pair = super().forward(**forward_arguments(*args, **kwargs))
        return pair if kwargs.get("need_weights", args[4:5] == (True,)) else pair[0]


class DistributedImprovedMultiheadDilatedAttention(MultiheadDilatedAttention02):
    """Like 0.2's rings, it took the whole sequence on every rank."""

    call = MULTIHEAD.call.named(
        "DistributedImprovedMultiheadDilatedAttention",
        "embed_dim num_heads segment_lengths dilation_rates dropout bias layer_norm layer_norm_eps gamma_init device "
        "dtype use_tf32 sequence_parallel model_parallel use_deepspeed use_gradient_checkpointing "
        "communication_backend cpu_offload use_8bit_optimizer use_flash_attention compile_model",
    )


def forward_arguments(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_padding_mask: Tensor | bool | None = None,
    need_weights: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    average_attn_weights: bool = True,
) -> dict[str, Any]:
    """What 0.2's multi-head `forward` was given, for the new one.

    Absent keys and values are the query, and the mask is turned round: 0.2's was True at padding.
    """
    if isinstance(key_padding_mask, bool):  # the fourth argument before there were masks
        is_causal, key_padding_mask = key_padding_mask, None
    _no_mask("attn_mask", attn_mask)
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(f"expected key_padding_mask of dtype bool, got {key_padding_mask.dtype}")
    real = None if key_padding_mask is None else ~key_padding_mask
    key, value = query if key is None else key, query if value is None else value
    return {"query": query, "key": key, "value": value, "key_padding_mask": real, "is_causal": is_causal}
