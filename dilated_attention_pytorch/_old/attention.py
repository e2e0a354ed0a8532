"""`DilatedAttention` and `MultiheadDilatedAttention` with the arguments of 0.1 and 0.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dilated_attention_pytorch._deprecated import OldCall, warn_of_module
from dilated_attention_pytorch.modules import OLD_DILATED, OLD_MULTIHEAD, DilatedAttention, MultiheadDilatedAttention

_IMPROVED = OldCall(
    ("segment_lengths", "dilation_rates", "dropout", "use_tf32", "enable_memory_pool", "enable_profiling",
     "lightweight_pool"),
    {"segment_lengths": "segment_lengths", "dilation_rates": "dilation_rates", "dropout": "attention_dropout"},
    ("device", "dtype"),
)  # fmt: skip
_DISTRIBUTED = _IMPROVED._replace(
    order=("segment_lengths", "dilation_rates", "dropout", "use_tf32", "sequence_parallel", "model_parallel",
           "use_flash_attention", "dtype", "device"),
    keywords=(),
)  # fmt: skip
_DISTRIBUTED_MULTIHEAD = OLD_MULTIHEAD._replace(
    order=("embed_dim", "num_heads", "segment_lengths", "dilation_rates", "dropout", "bias", "layer_norm",
           "layer_norm_eps", "gamma_init", "device", "dtype", "use_tf32", "sequence_parallel", "model_parallel",
           "use_deepspeed", "use_gradient_checkpointing", "communication_backend", "cpu_offload",
           "use_8bit_optimizer", "use_flash_attention", "compile_model"),
)  # fmt: skip
_IMPROVED_MULTIHEAD = OLD_MULTIHEAD._replace(order=(*OLD_MULTIHEAD.order[:-1], "use_tf32"))


def no_mask(name: str, mask: Tensor | None) -> None:
    """Raises where an old call brings a mask that the old code took and did not apply."""
    if mask is not None:
        raise ValueError(
            f"expected no {name}, got a tensor: 0.2 took one and did not apply it. Padding goes into "
            "key_padding_mask (True = real) of the new class; other masks have no dilated counterpart"
        )


class _OldDilated(DilatedAttention):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        **new: Any,
    ) -> Tensor:
        """`DilatedAttention.forward`; see `no_mask`."""
        no_mask("attention_mask", attention_mask)
        return super().forward(query, key, value, is_causal, **new)


class DilatedAttention01(_OldDilated):
    """`dilated_attention_pytorch.dilated_attention.DilatedAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warn_of_module("dilated_attention")  # it may have come as an attribute of the function
        super().__init__(**OLD_DILATED.arguments("DilatedAttention", args, kwargs))


class ImprovedDilatedAttention(_OldDilated):
    """0.2's `ImprovedDilatedAttention`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_IMPROVED.arguments("ImprovedDilatedAttention", args, kwargs))


class DistributedImprovedDilatedAttention(_OldDilated):
    """0.2's name; as its rings, it took the whole sequence on every rank and returned all of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_DISTRIBUTED.arguments("DistributedImprovedDilatedAttention", args, kwargs))


class MultiheadDilatedAttention01(MultiheadDilatedAttention):
    """0.1's `MultiheadDilatedAttention`: `forward` takes three tensors and `is_causal`, and returns a pair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warn_of_module("dilated_attention")
        super().__init__(**OLD_MULTIHEAD.arguments("MultiheadDilatedAttention", args, kwargs))
        self.register_load_state_dict_pre_hook(_old_norm)  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **new: Any
    ) -> tuple[Tensor, None]:
        """`MultiheadDilatedAttention.forward`."""
        return super().forward(query, key, value, is_causal=is_causal, **new)


def _old_norm(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """0.1 called `inner_attn_ln` `norm`; the rest has kept its names."""
    for name in ("weight", "bias"):
        if f"{prefix}norm.{name}" in state:
            state[f"{prefix}inner_attn_ln.{name}"] = state.pop(f"{prefix}norm.{name}")


class MultiheadDilatedAttention02(MultiheadDilatedAttention):
    """0.2's `MultiheadDilatedAttention`: `forward` returns a tensor, or a pair with `need_weights=True`."""

    _call: ClassVar[tuple[str, OldCall]] = "MultiheadDilatedAttention", OLD_MULTIHEAD

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, call = self._call
        super().__init__(**call.arguments(name, args, kwargs))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> Any:
        """`MultiheadDilatedAttention.forward`, with a `key_padding_mask` that is True at padding."""
        call = forward_arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        out, _ = super().forward(**call)
        return (out, None) if need_weights else out


class DistributedImprovedMultiheadDilatedAttention(MultiheadDilatedAttention02):
    """0.2's name: see `DistributedImprovedDilatedAttention`."""

    _call = "DistributedImprovedMultiheadDilatedAttention", _DISTRIBUTED_MULTIHEAD


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """0.2's `ImprovedMultiheadDilatedAttention`: `forward` returns a pair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_IMPROVED_MULTIHEAD.arguments("ImprovedMultiheadDilatedAttention", args, kwargs))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:
        """`MultiheadDilatedAttention.forward`, with a `key_padding_mask` that is True at padding."""
        call = forward_arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        return super().forward(**call)


def forward_arguments(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_padding_mask: Tensor | bool | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> dict[str, Any]:
    """What 0.2's multi-head `forward` was given, for the new one.

    Absent keys and values are the query, and the mask is turned round: 0.2's was True at padding.
    """
    if isinstance(key_padding_mask, bool):  # the fourth argument before there were masks
        is_causal, key_padding_mask = key_padding_mask, None
    no_mask("attn_mask", attn_mask)
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(f"expected key_padding_mask of dtype bool, got {key_padding_mask.dtype}")
    call: Mapping[str, Any] = {
        "query": query,
        "key": query if key is None else key,
        "value": query if value is None else value,
        "key_padding_mask": None if key_padding_mask is None else ~key_padding_mask,
        "is_causal": is_causal,
    }
    return dict(call)
