"""Types that appear in public signatures."""

from typing import Literal, NamedTuple

from torch import Tensor

Offsets = Literal["modulo", "blocked"]
MixingGradient = Literal["exact", "detached"]
Padding = Literal["none", "zero_keys"]
Backend = Literal["auto", "reference", "sdpa", "triton"]


class AttentionOutput(NamedTuple):
    """What attention over some keys gives: the value and how much weight it carries.

    Two of these over disjoint keys merge exactly (`merge_attention`), which is what rings, decoding and
    streaming are built from.

    Attributes:
        out: `(B, N, H, D)`, the inputs' dtype. Zero where a query sees no key.
        lse: `(B, H, N)`, natural log of the softmax denominator, fp32 (fp64 for fp64 inputs).
            `-inf` where a query sees no key.
    """

    out: Tensor
    lse: Tensor
