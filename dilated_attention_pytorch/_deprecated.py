"""The names of 0.1 and 0.2: one table of them, the warning they give, and what their arguments mean now.

Everything here and in `_old/` goes with 0.4.0. This file imports nothing of ours, so that anything may lean on it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

PACKAGE = __name__.rpartition(".")[0]
REMOVED_IN = "0.4.0"
_T = TypeVar("_T")


class OldName(NamedTuple):
    """A row of the table.

    Attributes:
        name: the old name.
        now: what to write instead, dotted, under the package.
        stand_in: `module:attribute`, under the package, of what takes the old arguments.
        places: the old modules that had it, under the package; `""` is the package itself.
        by_hand: why a call needs more than the new name; empty where the new name takes the old call.
    """

    name: str
    now: str
    stand_in: str
    places: tuple[str, ...]
    by_hand: str = ""


def _row(name: str, now: str, stand_in: str, *places: str, by_hand: str = "") -> OldName:
    return OldName(name, now, stand_in if ":" in stand_in else f"{stand_in}:{name}", places, by_hand)


def _ring(name: str, *modules: str) -> OldName:
    return _row(name, "RingDilatedAttention", "_old.ring", "", *modules)


def _hilbert(name: str, module: str) -> OldName:
    successor = "ring_attention.variants.HilbertRingAttention"
    return _row(name, successor, "_old.hilbert", "", module, by_hand="it takes a config and the places of the tokens")


# fmt: off
TABLE: tuple[OldName, ...] = (
    # 0.1, whose names 0.2 kept
    _row("DilatedAttention", "DilatedAttention", "_old.attention:DilatedAttention01", "dilated_attention"),
    _row("MultiheadDilatedAttention", "MultiheadDilatedAttention", "_old.attention:MultiheadDilatedAttention01",
         "dilated_attention",
         by_hand="is_causal is not the fourth argument, and a checkpoint's norm is inner_attn_ln"),
    _row("LongNet", "LongNet", "models.longnet", "long_net"),
    _row("LongNetLM", "LongNetLM", "_old.models:LongNetLM01", "long_net",
         by_hand="num_tokens is vocab_size, and is_causal is gone"),
    _row("DilatedTransformerEncoderLayer", "models.layers.Layer", "_old.models", "", "transformer",
         by_hand="it takes a LongNetConfig"),
    _row("DilatedTransformerDecoderLayer", "models.layers.Layer", "_old.models", "", "transformer",
         by_hand="it takes a LongNetConfig"),
    # 0.2
    _row("MultiheadDilatedAttention", "MultiheadDilatedAttention", "_old.attention:MultiheadDilatedAttention02",
         "multihead_dilated_attention",
         by_hand="it returns a pair, and masks are True where real"),
    _row("ImprovedDilatedAttention", "DilatedAttention", "_old.attention", "", "improved_dilated_attention",
         by_hand="dropout is attention_dropout"),
    _row("ImprovedMultiheadDilatedAttention", "MultiheadDilatedAttention", "_old.attention",
         "", "improved_multihead_dilated_attention",
         by_hand="masks are True where real"),
    _row("DistributedImprovedDilatedAttention", "DilatedAttention", "_old.attention",
         "", "improved_distributed_dilated_attention",
         by_hand="dropout is attention_dropout, and no rank shares its work; RingDilatedAttention does"),
    _row("DistributedImprovedMultiheadDilatedAttention", "MultiheadDilatedAttention", "_old.attention",
         "", "improved_distributed_dilated_attention",
         by_hand="it returns a pair, masks are True where real, and no rank shares its work"),
    _row("create_dilated_attention", "DilatedAttention", "_old.factories", "", "core",
         by_hand="a class has no attention_type"),
    _row("create_multihead_dilated_attention", "MultiheadDilatedAttention", "_old.factories", "", "core",
         by_hand="a class has no attention_type"),
    # The modules' own factories took what their classes took.
    _row("create_dilated_attention", "DilatedAttention", "_old.attention:DilatedAttention01", "dilated_attention"),
    _row("create_multihead_dilated_attention", "MultiheadDilatedAttention",
         "_old.attention:MultiheadDilatedAttention02", "multihead_dilated_attention",
         by_hand="it returns a pair, and masks are True where real"),
    _row("DilatedAttentionConfig", "DilatedAttention", "_old.factories", "core",
         by_hand="its fields are arguments of the class"),
    _row("MultiheadConfig", "MultiheadDilatedAttention", "_old.factories", "core",
         by_hand="its fields are arguments of the class"),
    # 0.2's rings
    _row("RingAttentionConfig", "RingAttentionConfig", "ring_attention.config",
         "core", "ring_dilated_attention_production"),
    _row("RingDilatedAttention", "RingDilatedAttention", "_old.ring:RingDilatedAttention01", "ring_dilated_attention"),
    _row("RingDistributedDilatedAttention", "RingDistributedDilatedAttention",
         "_old.ring_multihead:RingDistributedDilatedAttention02", "ring_distributed_dilated_attention",
         by_hand="it takes a config and one tensor"),
    _row("RingMultiheadDilatedAttentionHybrid", "RingDistributedDilatedAttention", "_old.ring_multihead",
         "", "ring_multihead_dilated_attention_hybrid",
         by_hand="it takes a config and one tensor"),
    _row("create_production_ring_attention", "RingDilatedAttention", "_old.ring",
         "", "ring_dilated_attention_production"),
    _ring("RingDilatedAttentionProduction", "ring_dilated_attention_production"),
    _ring("RingDilatedAttentionHybrid", "ring_dilated_attention_hybrid"),
    _ring("RingDilatedAttentionTrue", "ring_dilated_attention_true"),
    _ring("TrueRingDilatedAttention", "ring_dilated_attention_true", "true_ring_dilated_attention"),
    _row("SimulatedRingDilatedAttention", "RingDilatedAttention", "_old.ring", "simulated_ring_dilated_attention"),
    _ring("RingDilatedAttentionV2", "ring_dilated_attention_v2"),
    _ring("RingDilatedAttentionV2Collective", "ring_dilated_attention_v2_collective"),
    _ring("RingDilatedAttentionV2Flash", "ring_dilated_attention_v2_flash"),
    _ring("RingDilatedAttentionV3", "ring_dilated_attention_v3"),
    _hilbert("RingDilatedAttentionHilbertOptimized", "ring_dilated_attention_hilbert_optimized"),
    _hilbert("RingDilatedAttentionHybridHilbert", "ring_dilated_attention_hybrid_hilbert"),
)
# fmt: on

# How names of 0.2 begin that have no successor: sparse patterns that are not dilated attention, and their tools.
NOT_REPLACED = (
    "BlockSparse", "RingBlockSparse", "SparsePattern", "SparseAttention", "DistributedSparse", "HeadParallel",
    "HierarchicalConfig", "AdaptiveConfig", "AdaptiveSparsity", "ContentAdaptiveSparsity", "ImportanceScorer",
    "PatternConfig", "PatternOptimizer", "PatternQualityAnalyzer", "PatternType",
    "DynamicDilated", "DynamicMultihead", "DynamicSegment", "SegmentSelection",
    "create_block_sparse", "create_multihead_block_sparse", "create_adaptive", "create_hierarchical", "create_dynamic",
    "get_hierarchical_presets", "get_block_sparse",
)  # fmt: skip

# By place, then by name.
BY_PLACE: dict[str, dict[str, OldName]] = {}
for _entry in TABLE:
    for _place in _entry.places:
        BY_PLACE.setdefault(_place, {})[_entry.name] = _entry
# `core` is a place of the present too; its old names warn one by one, as the package's do.
OLD_MODULES = tuple(sorted(set(BY_PLACE) - {"", "core"}))

_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Gives one DeprecationWarning a process and key, at the line of the user's code that led here."""
    if key in _warned:
        return
    warn_user(
        f"{message} (see docs/migration.md; `dilated-attention migrate` lists and rewrites old names)",
        DeprecationWarning,
    )
    # Behind the warning: where a filter makes it an error, it is one every time.
    _warned.add(key)


def warn_user(message: str, category: type[Warning]) -> None:
    """A warning at the line of the user's code that led here, however many of our frames lie between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_inner(module: str) -> bool:
    return module.partition(".")[0] in {PACKAGE, "importlib", "_frozen_importlib", "_frozen_importlib_external"}


def warn_of_module(place: str) -> None:
    """The one warning of an old module: where each of its names is now."""
    moves = ", ".join(f"{row.name} is now {PACKAGE}.{row.now}" for row in BY_PLACE[place].values())
    warn_once(place, f"the module {PACKAGE}.{place} is deprecated and goes with {REMOVED_IN}: {moves}")


def load(row: OldName) -> Any:
    """What stands in for an old name."""
    module, _, attribute = row.stand_in.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), attribute)


def old_name(place: str, name: str) -> Any:
    """An old name of the package itself or of `core`, with its warning; AttributeError where it never was one."""
    owner = f"{PACKAGE}.{place}" if place else PACKAGE
    row = BY_PLACE[place].get(name)
    if not place and name in OLD_MODULES:  # 0.2's package had imported them
        return importlib.import_module(f"{PACKAGE}.{name}")
    if row is None:
        gone = f": 0.2's {name} is not dilated attention and has no successor" if name.startswith(NOT_REPLACED) else ""
        raise AttributeError(f"module {owner!r} has no attribute {name!r}{gone}")
    found = load(row)
    warn_once(
        f"{place}.{name}", f"{owner}.{name} is deprecated and goes with {REMOVED_IN}: it is now {PACKAGE}.{row.now}"
    )
    return found


def old_module(module: str, *, warn_now: bool = True) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of an old module.

    Args:
        module: its `__name__`.
        warn_now: warn while it is imported; else when a name is first taken from it.
    """
    place = module.removeprefix(f"{PACKAGE}.")
    names = BY_PLACE[place]
    if warn_now:
        warn_of_module(place)

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = load(names[name])
        warn_of_module(place)
        return found

    return get, lambda: sorted(names)


class OldCall(NamedTuple):
    """The arguments of an old constructor.

    Attributes:
        order: their names, in positional order.
        kept: the new name of each that still means something; the others are accepted, ignored and named in a warning.
        keywords: further names, which had no position that anyone could have used.
    """

    order: tuple[str, ...]
    kept: Mapping[str, str]
    keywords: tuple[str, ...] = ()

    def translate(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """New keyword arguments, and the names of what was given and is ignored.

        Names that the old constructor did not have pass through, for the new one to judge.
        """
        if len(args) > len(self.order):
            raise TypeError(f"expected at most {len(self.order)} positional arguments of {name}, got {len(args)}")
        given = dict(zip(self.order, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise TypeError(f"expected each argument of {name} once, got {', '.join(twice)} twice")
        given.update(kwargs)
        known = {*self.order, *self.keywords}
        ignored = [key for key in given if key in known and key not in self.kept]
        values = {self.kept.get(key, key): value for key, value in given.items() if key not in ignored}
        return values, ignored

    def arguments(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`translate` for a stand-in, whose name has warned already: only what is ignored is worth a second warning."""
        values, ignored = self.translate(name, args, kwargs)
        if ignored:
            warn_once(f"{name}()", f"{name} ignores what means nothing since 0.3: {', '.join(ignored)}")
        return values


def takes_old_call(
    call: OldCall,
    first: tuple[int, type | tuple[type, ...]],
    *,
    old_value: Callable[[Mapping[str, Any]], bool] = lambda kwargs: False,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
    arguments_of: str = "",
) -> Callable[[type[_T]], type[_T]]:
    """Lets a class whose name is as old as 0.1 or 0.2 be constructed as it was then, with a warning.

    Args:
        call: the old arguments.
        first: a position, and the type of what stood there that can only have been an old call.
        old_value: whether keyword arguments of the same name hold something only the old constructor took.
        finish: from the new keyword arguments to those of the constructor.
        arguments_of: the class that has the arguments now, where it is another.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        construct = cls.__init__
        parameters = inspect.signature(construct).parameters
        # Where the new constructor takes any keyword, one that has kept its name is no sign of age.
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        old = (*call.order, *call.keywords)
        old_only = {name for name in old if not (takes_any and call.kept.get(name) == name)} - set(parameters)
        position, kind = first

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            by_place = len(args) > position and isinstance(args[position], kind)
            if not by_place and old_only.isdisjoint(kwargs) and not old_value(kwargs):
                construct(self, *args, **kwargs)
                return
            values, ignored = call.translate(cls.__name__, args, kwargs)
            nothing = f"; ignored, because without meaning now: {', '.join(ignored)}" if ignored else ""
            warn_once(
                f"{cls.__name__}()",
                f"{cls.__name__} was called with the arguments of 0.2, which is deprecated and goes with {REMOVED_IN}: "
                f"they are now {', '.join(f'{key}=...' for key in values)} of {arguments_of or cls.__name__}{nothing}",
            )
            construct(self, **finish(values))

        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate
