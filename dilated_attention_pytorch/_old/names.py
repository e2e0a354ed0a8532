"""The names of 0.1 and 0.2: one table of them, and the warning they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dilated_attention_pytorch._deprecated import PACKAGE, REMOVED_IN, load, warn_once


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

    @property
    def moved(self) -> str:
        """Where the name is now, in words."""
        return f"{PACKAGE}.{self.now}" + (f" ({self.by_hand})" if self.by_hand else "")


def _row(name: str, now: str, stand_in: str, *places: str, by_hand: str = "") -> OldName:
    return OldName(name, now, stand_in if ":" in stand_in else f"{stand_in}:{name}", places, by_hand)


def _ring(name: str, *modules: str) -> OldName:
    return _row(name, "RingDilatedAttention", "_old.ring", "", *modules)


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
    _row("RingDilatedAttentionHilbertOptimized", "RingDilatedAttentionHilbert", "_old.hilbert",
         "", "ring_dilated_attention_hilbert_optimized",
         by_hand="it takes a config and rows along the curve; HilbertRingAttention takes them in their own order"),
    _row("RingDilatedAttentionHybridHilbert", "HilbertRingAttention", "_old.hilbert",
         "", "ring_dilated_attention_hybrid_hilbert",
         by_hand="it takes a config and the places of the tokens"),
    # A place that the first plan of 0.3 had.
    _row("RingDilatedAttentionHilbert", "RingDilatedAttentionHilbert", "ring_attention.variants.hilbert",
         "ring_attention.production_hilbert"),
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


def warn_of_module(place: str) -> None:
    """The one warning of an old module: where each of its names is now."""
    moves = ", ".join(f"{row.name} is now {row.moved}" for row in BY_PLACE[place].values())
    warn_once(place, f"the module {PACKAGE}.{place} is deprecated and goes with {REMOVED_IN}: {moves}")


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
        found = load(names[name].stand_in)
        warn_of_module(place)
        return found

    return get, lambda: sorted(names)
