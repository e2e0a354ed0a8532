"""Hugging Face transformers: `attn_implementation="dilated"` for its models, and LongNet among its Auto classes.

    from dilated_attention_pytorch.integrations.transformers import register

    register()
    config = LlamaConfig(dilated_segment_lengths=[2048, 8192], dilated_dilation_rates=[1, 4])
    model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")

Causality comes from the model's own layers (`is_causal`), padding on either side from its 2-D `attention_mask`, and the
position of a query in decoding from the number of keys in the cache. Sliding windows, soft caps, attention sinks,
position biases, other masks and static caches raise: the pattern cannot express them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import SegmentShift, check_segment_shift
from dilated_attention_pytorch.core.validation import check_choice
from dilated_attention_pytorch.functional import dilated_attention
from dilated_attention_pytorch.integrations.reach import check_config, layer_shift
from dilated_attention_pytorch.types import BackendName, MixingGradient, Offsets

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    raise ImportError(
        "expected transformers 5 or later, which this module is for, found none: "
        "pip install 'dilated-attention-pytorch[hf]'"
    ) from error

from dilated_attention_pytorch.integrations.longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetHFConfig,
    register_longnet,
)

__all__ = [
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetHFConfig",
    "register",
    "use_dilated_attention",
]

NAME = "dilated"
_WITH = f"with attn_implementation={NAME!r}"

# Arguments that models pass to every attention function and that change nothing here.
_HARMLESS = {
    "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


def register() -> None:
    """Register `attn_implementation="dilated"` and the model type `longnet`; may be called again.

    A model's config then names the pattern: `dilated_segment_lengths` and `dilated_dilation_rates`, optionally
    `dilated_offsets` (`"modulo"`), `dilated_segment_shift` (0; a number, one per layer or `"alternate"`),
    `dilated_mixing_gradient` (`"exact"`) and `dilated_backend` (`"auto"`). With grouped
    heads, offsets are counted over key/value heads.

    Raises:
        ValueError: another function has taken the name `"dilated"`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register()
        >>> config = LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        ...     num_key_value_heads=2, dilated_segment_lengths=[16, 64], dilated_dilation_rates=[1, 4],
        ... )
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")
        >>> model(torch.randint(99, (1, 200))).logits.shape
        torch.Size([1, 200, 99])
    """
    for interface, ours in ((AttentionInterface(), attention), (AttentionMaskInterface(), mask)):
        known = interface.get(NAME)
        if known not in (None, ours):
            raise ValueError(f"expected the attention name {NAME!r} to be free, got {known!r} registered under it")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    register_longnet()


def use_dilated_attention(
    model: PreTrainedModel,
    segment_lengths: list[int],
    dilation_rates: list[int],
    *,
    offsets: Offsets = "modulo",
    segment_shift: SegmentShift = 0,
    mixing_gradient: MixingGradient = "exact",
    backend: BackendName = "auto",
) -> None:
    """Switch a loaded model's attention to a dilated pattern, weights untouched; its config keeps the pattern.

    Args:
        model: any transformers model whose attention goes through `AttentionInterface`.
        segment_lengths: w_i, in tokens, one per branch.
        dilation_rates: r_i, one per branch.
        offsets: `"modulo"` or `"blocked"`, counted over key/value heads.
        segment_shift: of all layers, one per layer, or `"alternate"`: half of the largest segment in every other layer.
        mixing_gradient: `"exact"` or `"detached"`.
        backend: as in `dilated_attention`.

    Raises:
        ValueError: a pattern that does not fit together, an unknown option, or a model whose attention cannot be
            replaced; the model stays as it was.
    """
    pattern = DilatedPattern(segment_lengths, dilation_rates, 1, offsets)  # type: ignore[arg-type]
    segment_shift = check_segment_shift("segment_shift", segment_shift)
    check_choice("mixing_gradient", mixing_gradient, MixingGradient)
    check_choice("backend", backend, BackendName)
    # transformers takes a model without attention (Mamba) for one whose attention can be set.
    known = (hasattr(sys.modules.get(type(m).__module__), "ALL_ATTENTION_FUNCTIONS") for m in model.modules())
    if not getattr(model, "_can_set_attn_implementation", bool)() or not any(known):
        raise ValueError(
            f"expected a model whose attention goes through AttentionInterface, got a {type(model).__name__}, which "
            "has none that can be replaced"
        )
    # A composite model has one config per part, and each attention layer reads its own.
    found = (getattr(m, "config", None) for m in model.modules())
    configs = {id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values()
    for config in configs:
        check_config(config, pattern, segment_shift)
    register()
    model.set_attn_implementation(NAME)
    for config in configs:
        config.dilated_segment_lengths = list(pattern.segment_lengths)
        config.dilated_dilation_rates = list(pattern.dilation_rates)
        config.dilated_offsets, config.dilated_mixing_gradient = offsets, mixing_gradient
        config.dilated_backend, config.dilated_segment_shift = backend, segment_shift


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask of `attention`, without causality: None, or bool `(B, keys)`, True = real."""
    # Some models make a sliding mask that no layer takes; `attention` refuses a layer that does.
    if local_size is None:
        if mask_function not in (causal_mask_function, bidirectional_mask_function):
            raise ValueError(
                f"expected a causal or a bidirectional mask {_WITH}, got one combined with another (packed "
                "position_ids, a prefix, image tokens): pad each sequence with attention_mask"
            )
        growing = not isinstance(q_offset, Tensor) and not kv_offset and kv_length == q_offset + q_length
        if mask_function is causal_mask_function and not growing:
            raise ValueError(
                f"expected a cache whose keys end with the last query (DynamicCache) {_WITH}, got {kv_length} keys for "
                f"{q_length} queries from position {q_offset} on: static, sliding and prefix caches are not supported"
            )
    # As for flash attention, None without padding: the path without a mask.
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask.to(torch.bool)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: `(B, H, T, D)` queries over `(B, H_kv, T_k, D)` keys to `(B, T, H, D)`, no weights."""
    _check_arguments(module, query, key, attention_mask, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    config: Any = module.config
    # Decoder models with `config.is_causal = False` are bidirectional; their layers do not know.
    causal = bool(causal) and getattr(config, "is_causal", True) is not False
    keys, queries = key.shape[2], query.shape[2]
    if queries > keys or (queries != keys and not causal):
        how = "" if causal else " without causality"
        raise ValueError(f"expected self-attention {_WITH}, got {queries} queries over {keys} keys{how}")
    offsets: Offsets = getattr(config, "dilated_offsets", "modulo")
    pattern = DilatedPattern(config.dilated_segment_lengths, config.dilated_dilation_rates, key.shape[1], offsets)
    out = dilated_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        segment_shift=layer_shift(module, pattern, keys, is_causal=causal),
        is_causal=causal,
        scale=scaling,
        offsets=offsets,
        dropout_p=float(dropout or 0.0),
        key_padding_mask=attention_mask,
        # Positions count from a row's first real token, so left padding changes nothing; 0 for right padding.
        row_start=None if attention_mask is None else attention_mask.int().argmax(1),
        q_start=keys - queries,
        mixing_gradient=getattr(config, "dilated_mixing_gradient", "exact"),
        backend=getattr(config, "dilated_backend", "auto"),
    )
    return out, None


def _check_arguments(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if wrong := sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None and v is not False):
        given = ", ".join(f"{k}={_short(kwargs[k])}" for k in wrong)
        raise ValueError(
            f"expected {name} to ask for plain attention {_WITH}, got {given}, which dilated attention does not have; "
            "a sliding window is switched off in the config (layer_types all full_attention)"
        )
    if "CrossAttention" in name or getattr(module, "is_cross_attention", False):
        raise ValueError(f"expected self-attention {_WITH}, got the cross-attention {name}")
    # One class serves all three uses in Bart and its kin: a decoder's layer is causal, or looks at the encoder.
    if getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True):
        raise ValueError(
            f"expected self-attention {_WITH}, got a cross-attention: {name} with is_decoder=True and is_causal=False"
        )
    config, needed = getattr(module, "config", None), ("dilated_segment_lengths", "dilated_dilation_rates")
    if missing := [k for k in needed if getattr(config, k, None) is None]:
        raise ValueError(
            f"expected {' and '.join(missing)} in the {type(config).__name__} of {name}, got none: name the pattern in "
            "the config, or call use_dilated_attention(model, segment_lengths, dilation_rates)"
        )
    shape = (query.shape[0], key.shape[2])
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"expected attention_mask of shape (batch, keys) = {shape} {_WITH}, got {tuple(attention_mask.shape)}"
        )


def _short(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
