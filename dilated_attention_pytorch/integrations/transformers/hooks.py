"""Where transformers itself is taught: what a config says is loaded, and packed documents are seen with a cache too."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from dilated_attention_pytorch.integrations import packing
from dilated_attention_pytorch.integrations.transformers.pattern import NAME, WITH, has_pattern, setting


def install() -> None:
    """Put the hooks in place, once."""
    hooks: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (PreTrainedConfig, "__post_init__", _names_its_attention),
        (PreTrainedModel, "_check_and_adjust_attn_implementation", _loads_what_its_config_says),
        (masking_utils, "_preprocess_mask_arguments", _sees_packed_documents),
    )
    for owner, name, hook in hooks:
        original = getattr(owner, name)
        if not hasattr(original, "dilated_hook"):
            hooked = hook(original)
            hooked.dilated_hook = True
            setattr(owner, name, hooked)


def _names_its_attention(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def hooked(self: PreTrainedConfig, **kwargs: Any) -> None:
        original(self, **kwargs)
        if has_pattern(self) and self._attn_implementation is None:
            self._attn_implementation = NAME  # for the configs of its parts too

    return hooked


def _loads_what_its_config_says(original: Callable[..., str]) -> Callable[..., str]:
    """A config with a pattern means dilated attention, unless another one is asked for by name."""

    @functools.wraps(original)
    def hooked(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        patterned = has_pattern(self.config)
        if patterned and attn_implementation is None:
            attn_implementation = NAME
        if attn_implementation == NAME:
            _refuse_other_readers(type(self).__module__, type(self).__name__)
        found = original(self, attn_implementation, *args, **kwargs)
        if patterned:
            # transformers drops its own record when it saves, and obeys this one when it loads.
            self.config.attn_implementation = found
        return found

    return hooked


@functools.cache
def _refuse_other_readers(module: str, model: str) -> None:
    """Raises where attention that is not ours adds the mask to its scores, which has to be a mask of numbers then."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return
    for name, body in re.findall(r"^class (\w*Attention)\(.*?\n((?:[ \t].*\n|\n)*)", source, re.MULTILINE):
        if "ALL_ATTENTION_FUNCTIONS" not in body and re.search(r"\w+ \+ attention_mask\b(?!\.)", body):
            raise ValueError(
                f"expected all attention of {model} to go through AttentionInterface {WITH}, got {name}, which adds "
                "the mask to its scores itself"
            )


def _sees_packed_documents(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Transformers looks at positions without a cache and a mask alone, but a cache is there by default."""

    @functools.wraps(original)
    def hooked(
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_ids: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        found = original(config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs)
        early_exit, real, _, q_length, kv_length, *offsets = found
        if early_exit or position_ids is None or config._attn_implementation != NAME or position_ids.dim() != 2:
            return found
        if real is not None and real.shape[1] != q_length:
            return found
        if kv_length != q_length:
            static = getattr(past_key_values, "is_compileable", False) and packing.is_readable(position_ids)
            if static and packing.documents(position_ids.expand(inputs_embeds.shape[0], -1), real) is not None:
                raise ValueError(f"expected one sequence per row with a static cache {WITH}, got packed position_ids")
            return found
        numbers = packing.documents(position_ids.expand(inputs_embeds.shape[0], -1), real)
        chunks = setting(config, "attention_chunk_size") is not None
        if numbers is not None and chunks and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
            raise ValueError(
                f"expected a newer transformers for packed position_ids in chunks {WITH}: this one's chunks do not "
                "begin anew with each document"
            )
        return (early_exit, real, numbers, q_length, kv_length, *offsets)

    return hooked
