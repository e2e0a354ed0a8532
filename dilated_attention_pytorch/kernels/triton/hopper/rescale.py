"""A running maximum that moves seldom, and the sum of products that is rescaled when it does.

A softmax taken block by block needs no exact maximum, only one that keeps exponentials in range: here a row's maximum
moves once a logit exceeds it by a factor of 2^8 (sums stay below 2^8 times the number of keys, and P keeps its
precision, which is relative). Then most steps rescale nothing, and skip what the next product would wait for.

Based on FlashAttention-4, whose threshold this is. It pays where the sum is as wide as a block of keys (`is_seldom`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# log2 of the factor.
_SLACK = gl.constexpr(8.0)


@gluon.constexpr_function
def is_seldom(columns, block):
    """Whether a sum of so many columns, over blocks of so many keys, is rescaled seldom: a narrower one costs less to
    rescale than to ask."""
    return columns >= block


@gluon.jit
def moved(m, m_block, SELDOM: gl.constexpr):
    """The maximum of a row after a block whose own is `m_block`, in units of log2."""
    if SELDOM:
        return gl.where(m_block > m + _SLACK, m_block, m)
    else:
        return gl.maximum(m, m_block)


@gluon.jit
def rescaled(acc, alpha, SELDOM: gl.constexpr):
    """acc [HM, D] * alpha [HM, 1]; if SELDOM, a warp skips it where all its alphas are 1."""
    if SELDOM:
        # Registers of a thread: half as many as columns, since it holds two rows' fourth.
        COUNT: gl.constexpr = acc.shape[1] // 2
        _, alpha = gl.broadcast(acc, alpha)
        return gl.inline_asm_elementwise(
            _assembly(COUNT), _constraints(COUNT), [acc, alpha], acc.dtype, is_pure=True, pack=COUNT
        )
    else:
        return acc * alpha


# A branch that a warp takes for itself: Gluon's own `if` asks for one condition for all warps.


@gluon.constexpr_function
def _assembly(count):
    """`count` factors, of which numbers 0 and 2 are of the two rows that a thread holds."""
    return "\n".join(
        [
            "{",
            ".reg .pred changed, any;",
            f"setp.neu.f32 changed, ${2 * count}, 0f3f800000;",
            f"setp.neu.or.f32 changed, ${2 * count + 2}, 0f3f800000, changed;",
            "vote.sync.any.pred any, changed, 0xffffffff;",
            "@!any bra.uni UNCHANGED;",
            *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
            "UNCHANGED:",
            "}",
        ]
    )


@gluon.constexpr_function
def _constraints(count):
    """The products take the places of what they multiply."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)
