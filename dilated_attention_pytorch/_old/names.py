"""The names of 0.1 and 0.2: one table of them, and the warning they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dilated_attention_pytorch._deprecated import PACKAGE, REMOVED_IN, load, warn_once


class OldName(NamedTuple):
    """A row of the table."""

    name: str  # the old name
    now: str  # what to write instead, dotted, under the package
    stand_in: str  # `module:attribute`, under the package, of what takes the old arguments
    places: tuple[str, ...]  # the old modules that had it, under the package; "" is the package itself
    by_hand: str = ""  # why a call needs more than the new name; empty where the new name takes the old call

    @property
    def moved(self) -> str:
        """Where the name is now, in words."""
        return f"{PACKAGE}.{self.now}" + (f" ({self.by_hand})" if self.by_hand else "")


def _row(name: str, now: str, stand_in: str, places: str, by_hand: str = "") -> OldName:
    """A row from places with blanks between them; `.` is the package."""
    stand_in = stand_in if ":" in stand_in else f"{stand_in}:{name}"
    return OldName(name, now, stand_in, tuple("" if place == "." else place for place in places.split()), by_hand)


_DILATED, _MULTIHEAD = "DilatedAttention", "MultiheadDilatedAttention"
_RING, _RING_MULTIHEAD = "RingDilatedAttention", "RingDistributedDilatedAttention"
_RINGS, _ATTENTION = "_old.rings", "_old.attention"
_MASKS = "it returns a pair, and masks are True where real"
_CONFIG = "it takes a LongNetConfig"
_TYPE = "a class has no attention_type"
_FIELDS = "its fields are arguments of the class"
_TENSOR = "it takes a config and one tensor"

# fmt: off
TABLE: tuple[OldName, ...] = (
    # 0.1, whose names 0.2 kept
    _row(_DILATED, _DILATED, f"{_ATTENTION}:DilatedAttention01", "dilated_attention"),
    _row(_MULTIHEAD, _MULTIHEAD, f"{_ATTENTION}:MultiheadDilatedAttention01", "dilated_attention",
         "is_causal is not the fourth argument, and a checkpoint's norm is inner_attn_ln"),
    _row("LongNet", "LongNet", "models.longnet", "long_net"),
    _row("LongNetLM", "LongNetLM", "_old.models:LongNetLM01", "long_net",
         "num_tokens is vocab_size, and is_causal is gone"),
    _row("DilatedTransformerEncoderLayer", "models.layers.Layer", "_old.models", ". transformer", _CONFIG),
    _row("DilatedTransformerDecoderLayer", "models.layers.Layer", "_old.models", ". transformer", _CONFIG),
    # 0.2
    _row(_MULTIHEAD, _MULTIHEAD, f"{_ATTENTION}:MultiheadDilatedAttention02", "multihead_dilated_attention", _MASKS),
    _row("ImprovedDilatedAttention", _DILATED, _ATTENTION, ". improved_dilated_attention",
         "dropout is attention_dropout"),
    _row("ImprovedMultiheadDilatedAttention", _MULTIHEAD, _ATTENTION, ". improved_multihead_dilated_attention",
         "masks are True where real"),
    _row("DistributedImprovedDilatedAttention", _DILATED, _ATTENTION, ". improved_distributed_dilated_attention",
         "dropout is attention_dropout, and no rank shares its work; RingDilatedAttention does"),
    _row("DistributedImprovedMultiheadDilatedAttention", _MULTIHEAD, _ATTENTION,
         ". improved_distributed_dilated_attention",
         "it returns a pair, masks are True where real, and no rank shares its work"),
    _row("create_dilated_attention", _DILATED, "_old.factories", ". core", _TYPE),
    _row("create_multihead_dilated_attention", _MULTIHEAD, "_old.factories", ". core", _TYPE),
    # The modules' own factories took what their classes took.
    _row("create_dilated_attention", _DILATED, f"{_ATTENTION}:DilatedAttention01", "dilated_attention"),
    _row("create_multihead_dilated_attention", _MULTIHEAD, f"{_ATTENTION}:MultiheadDilatedAttention02",
         "multihead_dilated_attention", _MASKS),
    _row("create_improved_dilated_attention", _DILATED, f"{_ATTENTION}:ImprovedDilatedAttention",
         "improved_dilated_attention", "dropout is attention_dropout"),
    _row("create_improved_multihead_dilated_attention", _MULTIHEAD, f"{_ATTENTION}:ImprovedMultiheadDilatedAttention",
         "improved_multihead_dilated_attention", "masks are True where real"),
    _row("DilatedAttentionConfig", _DILATED, "_old.factories", "core", _FIELDS),
    _row("MultiheadConfig", _MULTIHEAD, "_old.factories", "core", _FIELDS),
    # 0.2's rings
    _row("RingAttentionConfig", "RingAttentionConfig", "ring_attention.config",
         "core ring_dilated_attention_production"),
    _row(_RING, _RING, f"{_RINGS}:RingDilatedAttention01", "ring_dilated_attention"),
    _row(_RING_MULTIHEAD, _RING_MULTIHEAD, f"{_RINGS}:RingDistributedDilatedAttention02",
         "ring_distributed_dilated_attention", _TENSOR),
    _row("RingMultiheadDilatedAttentionHybrid", _RING_MULTIHEAD, _RINGS, ". ring_multihead_dilated_attention_hybrid",
         _TENSOR),
    _row("create_ring_multihead_attention_hybrid", _RING_MULTIHEAD, f"{_RINGS}:RingMultiheadDilatedAttentionHybrid",
         ". ring_multihead_dilated_attention_hybrid", _TENSOR),
    _row("RingMultiheadDilatedAttentionV3", _RING_MULTIHEAD, _RINGS, ". ring_dilated_attention_v3", _TENSOR),
    _row("TrueRingMultiheadDilatedAttention", _RING_MULTIHEAD, _RINGS, "ring_dilated_attention_true", _TENSOR),
    _row("create_ring_dilated_attention_v2_collective", _RING, f"{_RINGS}:RingDilatedAttentionV2Collective",
         "ring_dilated_attention_v2_collective"),
    _row("create_production_ring_attention", _RING, _RINGS, ". ring_dilated_attention_production"),
    _row("RingDilatedAttentionProduction", _RING, _RINGS, ". ring_dilated_attention_production"),
    _row("RingDilatedAttentionHybrid", _RING, _RINGS, ". ring_dilated_attention_hybrid"),
    _row("RingDilatedAttentionTrue", _RING, _RINGS, ". ring_dilated_attention_true"),
    _row("TrueRingDilatedAttention", _RING, _RINGS, ". ring_dilated_attention_true true_ring_dilated_attention"),
    _row("SimulatedRingDilatedAttention", _RING, _RINGS, "simulated_ring_dilated_attention"),
    _row("RingDilatedAttentionV2", _RING, _RINGS, ". ring_dilated_attention_v2"),
    _row("RingDilatedAttentionV2Collective", _RING, _RINGS, ". ring_dilated_attention_v2_collective"),
    _row("RingDilatedAttentionV2Flash", _RING, _RINGS, ". ring_dilated_attention_v2_flash"),
    _row("RingDilatedAttentionV3", _RING, _RINGS, ". ring_dilated_attention_v3"),
    _row("RingDilatedAttentionHilbertOptimized", "RingDilatedAttentionHilbert", _RINGS,
         ". ring_dilated_attention_hilbert_optimized",
         "it takes a config and rows along the curve; HilbertRingAttention takes them in their original order"),
    _row("RingDilatedAttentionHybridHilbert", "HilbertRingAttention", _RINGS, ". ring_dilated_attention_hybrid_hilbert",
         "it takes a config and the places of the tokens"),
    # A path that was promised for 0.3.
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


def old_module(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of an old module, which warns while it is imported, or when a name is first taken."""
    place = module.removeprefix(f"{PACKAGE}.")
    names = BY_PLACE[place]
    if place != "dilated_attention":  # which the package itself imports
        warn_of_module(place)

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(
                f"module {module!r} has no attribute {name!r}; what is left of 0.2's is {sorted(names)}"
            )
        found = load(names[name].stand_in)
        warn_of_module(place)
        return found

    return get, lambda: sorted(names)
