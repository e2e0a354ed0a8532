"""The arguments of old constructors, in their order, and what each is called now."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dilated_attention_pytorch._deprecated import REMOVED_IN, warn_once

# Arguments of 0.2 that mean nothing now, whichever class or factory they are given to.
MEANINGLESS = frozenset(
    [
        "enable_memory_pool",
        "enable_profiling",
        "enable_buffer_manager",
        "lightweight_pool",
        "memory_pool_size",
        "memory_pool_threshold_mb",
        "use_memory_pool",
        "use_pattern_cache",
        "use_tf32",
        "use_flash_attention",
        "flash_chunk_size",
        "use_xformers",
        "use_bucketed",
        "bucket_size",
        "chunk_size_kv",
        "cache_on_gpu",
        "grad_checkpoint_buckets",
        "max_cached_buffers",
        "precompute_patterns",
        "overlap_communication",
        "ring_size",
        "use_gradient_checkpointing",
        "use_checkpointing",
        "enable_error_recovery",
        "mixed_precision",
        "log_memory_usage",
    ]
)


class OldCall(NamedTuple):
    """The arguments of an old constructor."""

    name: str  # of the class, for messages
    order: tuple[str, ...]  # the arguments' names, in positional order
    kept: Mapping[str, str]  # the new name of each that still means something; a warning names the others
    keywords: tuple[str, ...] = ()  # further names, which had no position that anyone could have used

    def named(self, name: str, order: str = "") -> OldCall:
        """The same for another class, with the arguments in another order."""
        return self._replace(name=name, order=tuple(order.split()) or self.order)

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by their old names."""
        if len(args) > len(self.order):
            raise TypeError(f"expected at most {len(self.order)} positional arguments of {self.name}, got {len(args)}")
        given = dict(zip(self.order, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise TypeError(f"expected each argument of {self.name} once, got {', '.join(twice)} twice")
        return given | dict(kwargs)

    def translate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """New keyword arguments, and the names of what was given and is ignored.

        Names that the old constructor did not have pass through, for the new one to judge.
        """
        given = self.given(args, kwargs)
        known = {*self.order, *self.keywords, *MEANINGLESS}
        ignored = [key for key in given if key in known and key not in self.kept]
        values = {self.kept.get(key, key): value for key, value in given.items() if key not in ignored}
        return values, ", ".join(ignored)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`translate` for a stand-in, whose name has warned already: only what is ignored is worth a second warning."""
        values, ignored = self.translate(args, kwargs)
        if ignored:
            warn_once(f"{self.name}()", f"{self.name} ignores what means nothing since 0.3: {ignored}")
        return values


class KeptName(NamedTuple):
    """A class whose name is as old as 0.1 or 0.2; an old call of it is told by what only an old call can have."""

    call: OldCall
    position: int  # where an old call had an argument of a type that no new call has there
    kind: type | tuple[type, ...]  # that type
    arguments_of: str  # the class that has the arguments now
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values  # for the new constructor

    def translated(
        self, construct: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments of the new constructor for those of an old call, with a warning; None for a new call."""
        by_place = len(args) > self.position and isinstance(args[self.position], self.kind)
        by_name = not _only_old(self.call, construct).isdisjoint(kwargs)
        by_value = "activation" in self.call.kept and callable(kwargs.get("activation"))
        if not (by_place or by_name or by_value):
            return None
        values, ignored = self.call.translate(args, kwargs)
        warn_once(
            f"{self.call.name}()",
            f"{self.call.name} was called with the arguments of 0.2, which is deprecated and goes with {REMOVED_IN}: "
            f"they are now {', '.join(f'{key}=...' for key in values)} of {self.arguments_of}"
            + (f"; ignored, because without meaning now: {ignored}" if ignored else ""),
        )
        return self.finish(values)


def _only_old(call: OldCall, construct: Callable[..., None]) -> set[str]:
    """The old names that the new constructor does not have."""
    parameters = inspect.signature(construct).parameters
    old = {*call.order, *call.keywords, *MEANINGLESS} - set(parameters)
    # Where it takes any keyword, one that has kept its name is no sign of age.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name for name in old if call.kept.get(name) != name} if takes_any else old


def old_call(name: str, order: str, kept: str, keywords: str = "") -> OldCall:
    """An `OldCall` from names with blanks between them; `old=new` where a name has changed."""
    pairs = [one.partition("=") for one in kept.split()]
    return OldCall(name, tuple(order.split()), {old: new or old for old, _, new in pairs}, tuple(keywords.split()))


def named_activation(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose activation is a name: 0.1 took a function, relu by default."""
    relu, gelu = torch.nn.functional.relu, torch.nn.functional.gelu
    functions = {relu: "relu", torch.relu: "relu", gelu: "gelu"}
    activation = values.get("activation", "relu")
    return {**values, "activation": functions.get(activation, activation) if callable(activation) else activation}


def with_config(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ring, with those of its configuration in one."""
    from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig

    own = ("process_group", "mesh_dim")
    config = RingAttentionConfig(**{name: value for name, value in values.items() if name not in own})
    return {"config": config, **{name: values[name] for name in own if name in values}}


DILATED = KeptName(
    old_call(
        "DilatedAttention",
        "segment_lengths dilation_rates softmax_scale attention_dropout op enable_memory_pool enable_profiling "
        "lightweight_pool",
        kept="segment_lengths dilation_rates softmax_scale=scale attention_dropout",
        keywords="use_tf32 device dtype",
    ),
    2, object, "DilatedAttention",
)  # fmt: skip
MULTIHEAD_ORDER = (
    "embed_dim num_heads dilation_rates segment_lengths dropout bias layer_norm layer_norm_eps gamma_init device dtype"
)
MULTIHEAD = KeptName(
    old_call("MultiheadDilatedAttention", f"{MULTIHEAD_ORDER} op", kept=MULTIHEAD_ORDER),
    2,
    Sequence,
    "MultiheadDilatedAttention",
)
LONGNET_ORDER = (
    "d_model nhead num_encoder_layers num_decoder_layers dim_feedforward segment_lengths dilation_rates dropout "
    "activation layer_norm_eps device dtype"
)
LONGNET = KeptName(
    old_call("LongNet", LONGNET_ORDER, kept=LONGNET_ORDER), 0, int, "LongNet",
    finish=named_activation,
)  # fmt: skip
# 0.2's configuration, and the flags that its ring classes took beside it.
RING_CONFIG = KeptName(
    old_call(
        "RingAttentionConfig",
        "segment_lengths dilation_rates dropout ring_size use_gradient_checkpointing use_memory_pool memory_pool_size "
        "enable_error_recovery mixed_precision log_memory_usage attention_scale",
        kept="segment_lengths dilation_rates dropout attention_scale=scale",
        keywords="block_size use_checkpointing max_cached_buffers use_tf32 device dtype enable_memory_pool "
        "enable_profiling lightweight_pool use_pattern_cache memory_pool_threshold_mb use_flash_attention "
        "flash_chunk_size use_bucketed bucket_size chunk_size_kv cache_on_gpu grad_checkpoint_buckets",
    ),
    0, object, "RingAttentionConfig",
)  # fmt: skip
# 0.2's `RingDilatedAttention` was another name of its `RingDilatedAttentionV2Collective`.
RING = KeptName(
    RING_CONFIG.call.named(
        "RingDilatedAttention",
        "segment_lengths dilation_rates dropout ring_size device dtype enable_memory_pool enable_profiling "
        "lightweight_pool use_pattern_cache memory_pool_threshold_mb use_flash_attention flash_chunk_size",
    ),
    0, (list, tuple), "RingAttentionConfig", finish=with_config,
)  # fmt: skip
