"""The softmax that the kernels share. They count logits in units of log2: `exp2` is one instruction, `exp` is two."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def step(s, acc, m, l, qk_scale, GUARD: tl.constexpr, BIASED: tl.constexpr = False, bias=0.0):
    """Takes a tile of raw logits [BM, BN] into the running maximum [BM], sum [BM] and accumulator [BM, D].

    With GUARD, rows that have seen nothing but -inf stay empty. With BIASED, bias (log2) is added to all logits.
    """
    top = tl.max(s, 1) * qk_scale
    if BIASED:
        top += bias
    m_new = tl.maximum(m, top)
    safe = m_new
    # -inf - -inf is NaN, -inf - 0 is a weight of 0.
    if GUARD:
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    # One subtraction per row in place of one addition per logit.
    shift = safe
    if BIASED:
        shift = safe - bias
    # A multiply-add: s is scaled here, not before the maximum.
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - safe)
    return p, acc * alpha[:, None], m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def finish(acc, m, l):
    """The normalised accumulator and the natural log of the denominator; (0, -inf) for an empty row."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, -float("inf"), (m + tl.math.log2(tl.where(empty, 1.0, l))) * _LN2)
    return out, lse


@triton.jit
def load_lse(at, mask):
    """The lse in units of log2, +inf where the row sees nothing, so that its weights exp2(s - lse) vanish."""
    value = tl.load(at, mask=mask, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value * LOG2E)
