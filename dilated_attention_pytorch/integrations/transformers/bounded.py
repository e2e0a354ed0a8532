"""A cache for transformers' `generate` that forgets what no later token can see."""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dilated_attention_pytorch.integrations.longnet import LongNetForCausalLM
from dilated_attention_pytorch.integrations.transformers.pattern import DENSE_LENGTH, NAME, LayerPattern
from dilated_attention_pytorch.integrations.transformers.switch import attention_layers


class _BoundedLayer(DynamicSlidingWindowLayer):
    """The keys in sight of one query lie within the longest segment's length, wherever segments begin."""

    is_sliding = False  # transformers takes the sizes of a window's mask from a layer that is


def bounded_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `generate(past_key_values=...)` whose dilated layers keep at most their longest segment.

    Tokens are those of the cache that keeps everything. Layers that are dense, or have a window, keep what they need.
    Undoing tokens, as assisted decoding does, works while transformers records the past; a cache that it did not record
    refuses to.

    Args:
        model: a `LongNetForCausalLM`, or a switched model: by `use_dilated_attention`, or a config with a pattern.

    Raises:
        ValueError: a model that is not switched, or that has an encoder.
    """
    if isinstance(model, LongNetForCausalLM):
        cache = DynamicCache(config=model.config)
        cache.layers = [_BoundedLayer(max(model.config.segment_lengths)) for _ in cache.layers]
        return cache
    if model.config.is_encoder_decoder:
        raise ValueError(f"expected a decoder alone, got a {type(model).__name__}, whose cache is two")
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise ValueError(f"expected a model with attn_implementation={NAME!r}, got a {type(model).__name__} without")
    cache = DynamicCache(config=model.config)
    for module in attention_layers(model):
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index < len(cache.layers) and type(cache.layers[index]) is DynamicLayer:
            longest = max(LayerPattern.of(module).segment_lengths)
            if longest < DENSE_LENGTH:
                cache.layers[index] = _BoundedLayer(longest)
    return cache
