"""Switching a loaded model to dilated attention: the whole of it, its encoder, or layers by number."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import SegmentShift, check_segment_shift
from dilated_attention_pytorch.core.validation import check_choice, check_index, check_instance, listed, quoted, shown
from dilated_attention_pytorch.integrations.transformers.pattern import NAME, NEEDED, has_pattern, is_per_layer
from dilated_attention_pytorch.integrations.transformers.reach import check_config
from dilated_attention_pytorch.integrations.transformers.registry import register
from dilated_attention_pytorch.integrations.transformers.sharding import set_group
from dilated_attention_pytorch.ring_attention.production import GroupOrMesh, group_of
from dilated_attention_pytorch.types import BackendName, MixingGradient, Offsets


def use_dilated_attention(
    model: PreTrainedModel,
    segment_lengths: list[int],
    dilation_rates: list[int],
    *,
    layers: Sequence[int] | Literal["encoder", "decoder"] | None = None,
    offsets: Offsets = "modulo",
    segment_shift: SegmentShift = 0,
    mixing_gradient: MixingGradient = "exact",
    backend: BackendName = "auto",
    process_group: GroupOrMesh = None,
    mesh_dim: str | None = None,
) -> None:
    """Switch a loaded model's attention to a dilated pattern, weights untouched; its config keeps the pattern.

    Layers with a window or chunks, and cross-attention, stay as they are.

    Args:
        model: any transformers model whose attention goes through `AttentionInterface`, or a part of one, such as its
            encoder or its language model. What is saved is the config of the model given here.
        segment_lengths: w_i, in tokens, one per branch.
        dilation_rates: r_i, one per branch.
        layers: numbers of the layers to switch, the others keep the pattern that they have, or stay dense; `"encoder"`
            or `"decoder"` for that half of a model whose halves share a config (Bart, Whisper); None for all.
        offsets: `"modulo"` or `"blocked"`, counted over key/value heads. For all layers, as are the next three.
        segment_shift: of all layers, one per layer, or `"alternate"`: half of the largest segment in every other layer.
        mixing_gradient: `"exact"` or `"detached"`.
        backend: as in `dilated_attention`.
        process_group: of ranks that share each sequence, one contiguous shard per rank in rank order, as
            `ShardingCollator` gives them: a ProcessGroup, or a DeviceMesh of one dimension or with `mesh_dim`. The
            config does not keep it. None: sequences are whole.
        mesh_dim: name of the mesh's dimension over which sequences are sharded.

    Raises:
        ValueError: a pattern that does not fit together, an unknown option, layers that are not there, or a model whose
            attention cannot be replaced; the model stays as it was.
        TypeError: layers of another type; no model.
    """
    pattern = DilatedPattern(segment_lengths, dilation_rates, 1, offsets)  # type: ignore[arg-type]
    segment_shift = check_segment_shift("segment_shift", segment_shift)
    check_choice("mixing_gradient", mixing_gradient, MixingGradient)
    check_choice("backend", backend, BackendName)
    check_instance("model", model, nn.Module)
    group = group_of(process_group, mesh_dim)
    if group is not None and mixing_gradient != "exact":
        raise ValueError(f"expected mixing_gradient='exact' with a process_group, got {quoted(mixing_gradient)}")
    found = attention_layers(model)
    if not getattr(model, "_can_set_attn_implementation", bool)() or not found:
        raise ValueError(
            f"expected a model whose attention goes through AttentionInterface, got a {type(model).__name__}, which "
            "has none that can be replaced"
        )
    values: tuple[list[Any], list[Any]] = (list(pattern.segment_lengths), list(pattern.dilation_rates))
    stack, part, configs = None, model, _configs(model)
    if layers is None:
        stack = _half(found, model.config)
    elif isinstance(layers, str):
        stack = check_choice("layers", layers, Literal["encoder", "decoder"])
        halves = {getattr(layer, "is_decoder", None) for layer in found}
        if not halves >= {True, False}:
            raise ValueError(
                f"expected an encoder and a decoder whose layers tell them apart for layers={quoted(layers)}, got a "
                f"{type(model).__name__}: give that part of the model itself, as model.get_{layers}()"
            )
    else:
        part = _owner(model, found, layers)
        configs = [part.config]
        values = _with_layers(part.config, layers, values)
    for config in configs:
        check_config(config, pattern, segment_shift, is_whole=layers is None and stack is None)
    register()
    part.set_attn_implementation(NAME)
    set_group(attention_layers(part), group)
    # A composite model has one config per part, and each attention layer reads its own.
    for config in configs:
        config.dilated_segment_lengths, config.dilated_dilation_rates = (list(v) for v in values)
        config.dilated_offsets, config.dilated_mixing_gradient = offsets, mixing_gradient
        config.dilated_segment_shift = segment_shift
        config.dilated_backend, config.dilated_stack = backend, stack
        config.attn_implementation = NAME  # what is saved; transformers drops its own record


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that call an attention function by name."""
    calls: dict[type, bool] = {}
    for kind in {type(module) for module in model.modules()}:
        try:
            calls[kind] = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
        except (OSError, TypeError):
            calls[kind] = False
    return [module for module in model.modules() if calls[type(module)]]


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    configs = (getattr(m, "config", None) for m in model.modules())
    return list({id(c): c for c in configs if isinstance(c, PreTrainedConfig)}.values())


def _half(found: list[nn.Module], config: PreTrainedConfig) -> str | None:
    """The half that a part of an encoder-decoder model is, whose config the other half may share."""
    halves = {getattr(layer, "is_decoder", None) for layer in found}
    if not config.is_encoder_decoder or len(halves) != 1 or None in halves:
        return None
    return "decoder" if halves == {True} else "encoder"


def _owner(model: PreTrainedModel, found: list[nn.Module], layers: Sequence[int]) -> PreTrainedModel:
    """The part of a model whose layers the numbers mean."""
    if not isinstance(layers, Sequence):
        raise TypeError(f"expected layers to be a sequence of ints, 'encoder', 'decoder' or None, got {shown(layers)}")
    if not all(isinstance(getattr(layer, "layer_idx", None), int) for layer in found):
        raise ValueError(
            f"expected attention layers that know their number for layers=[{listed(layers)}], got a "
            f"{type(model).__name__} in which some do not: give the part that is meant, such as its language model"
        )
    if len({id(layer.config) for layer in found}) != 1:
        raise ValueError(
            f"expected one stack of layers for layers=[{listed(layers)}], got a {type(model).__name__} with several: "
            "give the part that is meant, such as its language model"
        )
    count = 1 + max(layer.layer_idx for layer in found)  # type: ignore[operator, type-var]
    for i, layer in enumerate(layers):
        check_index(f"layers[{i}]", layer, count)  # type: ignore[arg-type]
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is found[0].config)
    return next(parts)


def _with_layers(
    config: PreTrainedConfig, layers: Sequence[int], values: tuple[list[int], list[int]]
) -> tuple[list[Any], list[Any]]:
    """Entries per layer, those of other layers as they were; None for a dense one."""
    count: int = config.num_hidden_layers
    was: list[Any] = [[None] * count] * 2
    if config._attn_implementation == NAME and has_pattern(config):
        was = [getattr(config, name) for name in NEEDED]
    was = [list(x) if is_per_layer(x) else [x] * count for x in was]
    for old, new in zip(was, values, strict=True):
        for layer in layers:
            old[layer] = new
    return was[0], was[1]
