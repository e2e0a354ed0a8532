"""What travels from the public function to a kernel, and the words that options take."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Offsets = Literal["modulo", "blocked"]
MixingGradient = Literal["exact", "detached"]
Padding = Literal["none", "zero_keys"]
BackendName = Literal["auto", "reference", "sdpa", "triton"]
Seed = int | Tensor | None


class QKV(NamedTuple):
    """Queries, keys and values of one call; or their gradients.

    Attributes:
        q: `(B, Nq, H, D)`.
        k: `(B, Nk, H_kv, D)`, H a multiple of H_kv.
        v: like k.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Masks(NamedTuple):
    """What hides keys, moves positions or drops weights; None where a call has none of it (docs/spec.md, 4).

    Attributes:
        key_padding: bool `(B, N)`, True = real.
        row_start: int `(B,)`, first real position of each left-padded row.
        cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.
        seed: int64 scalar, of the dropout mask.
    """

    key_padding: Tensor | None = None
    row_start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seed: Tensor | None = None


NO_MASKS = Masks()


class AttentionOutput(NamedTuple):
    """Attention over some keys: the value, and how much weight it carries.

    Two of these over disjoint keys merge exactly (`merge_attention`), which is what rings, decoding and
    streaming are built from.

    Attributes:
        out: `(B, N, H, D)`, the inputs' dtype. Zero where a query sees no key.
        lse: `(B, H, N)`, natural log of the softmax denominator, fp32 (fp64 for fp64 inputs).
            `-inf` where a query sees no key.
    """

    out: Tensor
    lse: Tensor


class OutputGradient(NamedTuple):
    """The gradient that reaches an `AttentionOutput`; `lse` is None where nobody used it."""

    out: Tensor
    lse: Tensor | None
