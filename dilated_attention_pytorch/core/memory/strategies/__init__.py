"""Ways to keep free memory, one file each."""

from __future__ import annotations

from dilated_attention_pytorch.core.memory.strategies.adaptive import AdaptiveStrategy
from dilated_attention_pytorch.core.memory.strategies.base import Strategy
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy
from dilated_attention_pytorch.core.memory.strategies.fragment_aware import FragmentAwareStrategy
from dilated_attention_pytorch.core.memory.strategies.numa import NumaStrategy
from dilated_attention_pytorch.core.memory.strategies.simple import SimpleStrategy

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (SimpleStrategy, BucketedStrategy, FragmentAwareStrategy, NumaStrategy, AdaptiveStrategy)
}
