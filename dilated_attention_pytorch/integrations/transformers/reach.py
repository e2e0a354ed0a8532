"""The segment shift of a switched Hugging Face layer, and the warning of a context longer than what can reach it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import SegmentShift, check_segment_shift, layer_shifts
from dilated_attention_pytorch.integrations.transformers.pattern import is_per_layer, setting
from dilated_attention_pytorch.models.reach import warn_out_of_reach


def layer_shift(module: nn.Module, pattern: DilatedPattern, seq_len: int, *, is_causal: bool) -> int:
    """The shift that a layer's config has for it, in `dilated_segment_shift`: a number, one per layer or "alternate".

    Warns once where no position of the sequence knows all of it.

    Raises:
        ValueError: a layer that does not know its index, where layers differ; not one number per layer.
    """
    config: Any = module.config
    given = check_segment_shift("dilated_segment_shift", getattr(config, "dilated_segment_shift", 0))
    index, count = getattr(module, "layer_idx", None), setting(config, "num_hidden_layers")
    if not isinstance(count, int) or not isinstance(index, int) or index >= count:
        if isinstance(given, int):
            return given
        raise ValueError(
            f"expected dilated_segment_shift of one int, or a layer that knows its index, got {given} and a "
            f"{type(module).__name__} with layer_idx={index}"
        )
    shifts = layer_shifts(given, pattern.segment_lengths, count)
    # Layers that stay dense reach everything.
    mixed = is_per_layer(config.dilated_segment_lengths) or getattr(config, "dilated_stack", None) is not None
    if not mixed and not torch.compiler.is_compiling():
        warn_out_of_reach(pattern, shifts, seq_len, is_causal=is_causal)
    return shifts[index]


def check_config(config: Any, pattern: DilatedPattern, segment_shift: SegmentShift, *, is_whole: bool) -> None:
    """Raises where a config has not as many layers as there are shifts; warns once where it promises positions that
    the pattern does not connect, if all layers have it."""
    count, context = setting(config, "num_hidden_layers"), setting(config, "max_position_embeddings")
    if not isinstance(count, int):
        return
    shifts = layer_shifts(segment_shift, pattern.segment_lengths, count)
    heads = setting(config, "num_key_value_heads") or setting(config, "num_attention_heads")
    if is_whole and isinstance(context, int) and isinstance(heads, int):
        warn_out_of_reach(replace(pattern, num_heads=heads), shifts, context)
