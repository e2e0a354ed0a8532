"""What is gone without a stand-in, by how its name begins, and the import errors that say why.

`from package import Name` makes "cannot import name" of any AttributeError, and a module that is not there gives no
reason. Python asks the finders of `sys.meta_path` in both cases, so the last one of them answers.
"""

from __future__ import annotations

import sys
from typing import Any

from dilated_attention_pytorch._deprecated import PACKAGE
from dilated_attention_pytorch._old.names import NOT_REPLACED

_SPARSE = "is not dilated attention and has no successor"
_RINGS = "has gone; rings are RingDilatedAttention(RingAttentionConfig(...), process_group) now"
_MODULES = "has gone; DilatedAttention, MultiheadDilatedAttention and LongNet are names of the package now"
_POOLS = "has gone; UnifiedMemoryPool took the place of the memory pools"
_CORE = "has gone; factories and configurations of 0.2 are names of the package or of its `core`, until 0.4.0"
_NONE = "has gone and has no successor"

# How names of the package and of `core` begin.
_NAMES = {
    NOT_REPLACED: _SPARSE,
    (
        "RingDilatedAttentionCorrect", "RingDilatedAttentionHilbertGPU", "RingDilatedAttentionSDPA",
        "RingMultiheadDilatedAttention", "StandardRingAttention", "DistributedRingAttention", "EnterpriseDistributed",
        "HilbertRingDilatedAttention", "UnfoldRingDilatedAttention", "create_ring_attention",
    ): _RINGS,
    (
        "DistributedDilatedAttention", "DistributedMultihead", "ImprovedDilatedAttentionV2", "BaseDilatedAttention",
        "BaseMultihead",
    ): _MODULES,
    ("MemoryPool", "SimplifiedMemoryPool", "get_global_memory", "reset_global_memory"): _POOLS,
    (
        "PatternCache", "DilatedPatternCache", "OptimizedPatternCache", "get_global_pattern", "get_optimized_pattern",
        "clear_global_cache", "clear_optimized_cache", "ValidationMixin", "DistributedConfig", "GPU_TYPE", "HAS_",
        "CURRENT_OPTIMAL", "apply_dilated_attention", "apply_rotary", "compute_a", "compute_rotary",
        "create_block_diagonal", "create_dilated_mask", "merge_attention_heads", "split_attention_heads",
        "optimize_attention", "register_attention", "register_multihead", "standard_attention",
    ): _NONE,
}  # fmt: skip
# How module paths begin, the first that fits. They are asked for only where there is no such module.
_PATHS = {
    (
        "block_sparse", "sparse", "distributed_sparse", "distributed_memory", "head_parallel", "dynamic_dilated",
        "base.head_parallel", "utils.sparse", "utils.dynamic",
    ): _SPARSE,
    (
        "ring.", "ring_", "deprecated_ring", "hilbert_attention", "kernels.hilbert_", "utils.ring", "utils.hilbert",
    ): _RINGS,
    (
        "base.", "improved_", "distributed_dilated", "advanced_distributed", "models.long_net", "models.transformer",
    ): _MODULES,
    (
        "core.memory_", "core.enhanced_memory", "core.bucketed_memory", "core.fragment_aware", "core.numa_aware",
        "core.unified_memory", "core.attention_buffer", "core.simple_gpu",
    ): _POOLS,
    ("core.factory", "core.config", "core.base", "core.constants", "core.standardized"): _CORE,
    ("core.pattern_cache", "core.optimized_pattern", "utils.", "transformer_refactored"): _NONE,
}  # fmt: skip


def why_gone(name: str, place: str = "") -> str | None:
    """The reason why a name, or a module, of 0.1 and 0.2 is not there; None for what never was.

    Args:
        name: the last part of its path.
        place: what stands before it, under the package.
    """
    path = f"{place}.{name}" if place else name
    # "ring" is told by "ring.": the package that the modules were in.
    reasons = [why for begins, why in _PATHS.items() if f"{path}.".startswith(begins)]
    if place in ("", "core"):
        reasons += [why for begins, why in _NAMES.items() if name.startswith(begins)]
    return f"0.2's {name} {reasons[0]} (see docs/migration.md)" if reasons else None


class Gone:
    """The finder of `sys.meta_path` that finds nothing, and says why."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> None:
        """None for what is none of ours, or is asked for and not imported; an import of what is gone raises a
        ModuleNotFoundError with the reason."""
        place, _, name = fullname.rpartition(".")
        if place != PACKAGE and not place.startswith(f"{PACKAGE}."):
            return
        reason = why_gone(name, place[len(PACKAGE) + 1 :])
        asked = sys._getframe(2).f_globals.get("__name__") == "importlib.util"  # its find_spec, which tells by None
        if reason is not None and not asked:
            # Without the argument `name`: an error with it is dropped by `from package import Name`.
            raise ModuleNotFoundError(f"no {fullname!r}: {reason}")


def install() -> None:
    """Asks `Gone` after all other finders, once."""
    sys.meta_path[:] = [one for one in sys.meta_path if getattr(one, "__module__", "") != __name__]
    sys.meta_path.append(Gone)
