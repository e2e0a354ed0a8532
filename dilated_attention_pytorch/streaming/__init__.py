"""Sequences larger than the device: ranges of host data, staged, computed and written while the next ones arrive."""

from dilated_attention_pytorch.streaming.api import dilated_attention_streamed, streamed_backward, streamed_forward
from dilated_attention_pytorch.streaming.ranges import RangePlan, Sizes, plan_ranges
from dilated_attention_pytorch.streaming.sources import RangeSink, RangeSource

__all__ = [
    "RangePlan",
    "RangeSink",
    "RangeSource",
    "Sizes",
    "dilated_attention_streamed",
    "plan_ranges",
    "streamed_backward",
    "streamed_forward",
]
