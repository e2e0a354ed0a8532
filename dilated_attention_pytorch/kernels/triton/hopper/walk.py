"""The blocks of keys (or of queries) that a tile meets.

Branches are in the order of their lengths: segments nest, each rate divides the next, the first is 1, and head h keeps
the residue h mod r. So a row belongs to the first k branches and to no other: k is its *level*. Ring i around a tile is
branch i's segment without branch i - 1's. A row of level k meets, in ring i, the keys of level l > i through
min(k, l) - i branches: their *multiplicity*. Blocks of one multiplicity follow one another, or those of one ring, so
that a loop over steps has it as a constant.

A *row* counts positions of one residue at stride R, the largest rate: position = row * R + residue. A block is B rows
of a residue, and every length is a multiple of B * R.

All of it is arithmetic on integers that are not negative: `tests/kernels/test_hopper_walk.py` runs these functions as
plain Python. A division by a number that is known only at run time takes microseconds, so `divide` and its like shift,
or divide by all constants and choose.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def pick(values: gl.constexpr, i):
    """values[i], for an i known only at run time."""
    found = gl.to_tensor(values[0])
    for j in gl.static_range(1, len(values)):
        found = gl.where(i == j, values[j], found)
    return found


@gluon.constexpr_function
def logs_of(values):
    """log2 of each of the values; none if one is no power of two."""
    exact = all(x & (x - 1) == 0 for x in values)
    return tuple(x.bit_length() - 1 for x in values) if exact else ()


@gluon.jit
def divide(x, i, RATES: gl.constexpr, B: gl.constexpr):
    """x // (RATES[i] * B), for a B that is a power of two."""
    LOGS: gl.constexpr = logs_of(RATES)
    if len(LOGS) > 0:
        found = gl.to_tensor(x) >> (pick(LOGS, i) + (B.bit_length() - 1))
    else:
        found = gl.to_tensor(x // (RATES[0] * B))
        for j in gl.static_range(1, len(RATES)):
            found = gl.where(i == j, x // (RATES[j] * B), found)
    return found


@gluon.jit
def modulo(x, i, RATES: gl.constexpr):
    """x % RATES[i]."""
    return x - divide(x, i, RATES, 1) * pick(RATES, i)


@gluon.constexpr_function
def log2_to(number):
    """log2 of 1, 2, .. up to a number."""
    return tuple(math.log2(x) for x in range(1, number + 1))


@gluon.jit
def bias_of(multiplicity, NB: gl.constexpr):
    """log2 of a multiplicity up to the number of branches."""
    BIASES: gl.constexpr = log2_to(NB)
    return pick(BIASES, multiplicity - 1)


# Levels and residues.


@gluon.jit
def level_of(distance, RATES: gl.constexpr):
    """How many branches keep a residue that lies so far behind the head's own."""
    level = gl.to_tensor(1)
    for j in gl.static_range(1, len(RATES)):
        level += gl.where(distance % RATES[j] == 0, 1, 0)
    return level


@gluon.jit
def residues_of(shown, level, RATES: gl.constexpr):
    """Distances from the head's residue at which a tile of a level meets keys of level `shown` (<= level).

    Where both are equal, of that level and above: no branch of the tile tells them apart.

    Returns:
        first, stride, step, index: `for z in range(first, stride, step)` the residues z, z + stride, .. below R;
        RATES[index] is the stride.
    """
    # Of level `shown` exactly: multiples of r_(shown - 1) that are none of r_shown. At the tile's own level: all
    # multiples of its longest branch's rate.
    below = shown < level
    step = pick(RATES, shown - 1)
    index = gl.where(below, shown, shown - 1)
    return gl.where(below, step, 0), pick(RATES, index), step, index


@gluon.constexpr_function
def step_at(i, rates):
    """The distance between the residues that are met at the stride rates[i]."""
    return rates[max(i - 1, 0)]


@gluon.jit
def residues_at(i, level, RATES: gl.constexpr):
    """What `residues_of` gives for shown = 1, 2, .. level, by strides: for i = 0, 1, .., a constant, those at RATES[i].

    Returns:
        end, ratio, step: `for number in range(1, end)` the residue `number % ratio * step`.
    """
    step: gl.constexpr = step_at(i, RATES)
    ratio: gl.constexpr = RATES[i] // step
    # Those of the keys' own level, then, at the tile's, the tile's own residue.
    return gl.where(i < level, ratio + gl.where(i == level - 1, 1, 0), 1), ratio, step


@gluon.jit
def residue_count(shown, level, RATES: gl.constexpr):
    """How many residues below R `residues_of` leads to."""
    R: gl.constexpr = RATES[len(RATES) - 1]
    return divide(R, shown - 1, RATES, 1) - gl.where(shown < level, divide(R, shown, RATES, 1), 0)


@gluon.constexpr_function
def rows_of(lengths, rate):
    """Segment lengths in rows of a residue."""
    return tuple(length // rate for length in lengths)


@gluon.jit
def segment_of(row, i, LENGTHS: gl.constexpr, R: gl.constexpr):
    """First row and number of rows of branch i's segment around a row."""
    ROWS: gl.constexpr = rows_of(LENGTHS, R)
    rows = pick(ROWS, i)
    return divide(row, i, ROWS, 1) * rows, rows


@gluon.jit
def ring_of(row, i, whole, LENGTHS: gl.constexpr, R: gl.constexpr):
    """Ring i around a row, before the row `whole`: its first row, where its hole begins, rows of the hole, its rows."""
    start, rows = segment_of(row, i, LENGTHS, R)
    inner, inner_rows = segment_of(row, gl.maximum(i, 1) - 1, LENGTHS, R)
    # The hole is branch i - 1's segment, cut at `whole` as the ring is; ring 0 has none.
    end = gl.minimum(start + rows, whole)
    hole = gl.where(i > 0, inner, start)
    hole_end = gl.where(i > 0, gl.minimum(inner + inner_rows, whole), start)
    return start, hole, hole_end - hole, hole - start + end - hole_end


@gluon.jit
def each_of_ring(
    visit: gl.constexpr, context, state, row, i, shown, level, head, whole, LENGTHS: gl.constexpr,
    RATES: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """As `each_block`, for the keys of level `shown` in ring i."""
    R: gl.constexpr = RATES[len(RATES) - 1]
    first, stride, step, _ = residues_of(shown, level, RATES)
    start, hole, jump, rows = ring_of(row, i, whole, LENGTHS, R)
    for z in range(first, stride, step):
        for distance in range(z, R, stride):
            residue = (head + distance) % R
            # Rows before the hole, then rows behind it.
            for b in range(0, rows, B):
                here = start + b
                here += gl.where(here >= hole, jump, 0)
                state = visit(context, state, here, residue, shown - i)
    return state


@gluon.jit
def each_block(
    visit: gl.constexpr, context, state, row, level, head, whole, LENGTHS: gl.constexpr, RATES: gl.constexpr,
    B: gl.constexpr, BY_RINGS: gl.constexpr = False,
):  # fmt: skip
    """state = visit(context, state, row, residue, multiplicity) for each block that a tile meets before `whole`.

    Args:
        row, level: of the tile.
        head: the key/value head.
        whole: rows of whole blocks that every residue has.
        BY_RINGS: ring by ring, so that rows of a lower level see what comes first; else by multiplicities.
    """
    if BY_RINGS:
        for i in range(0, level):
            for shown in range(i + 1, level + 1):
                state = each_of_ring(visit, context, state, row, i, shown, level, head, whole, LENGTHS, RATES, B)
    else:
        for multiplicity in range(1, level + 1):
            for i in range(0, level - multiplicity + 1):
                shown = multiplicity + i
                state = each_of_ring(visit, context, state, row, i, shown, level, head, whole, LENGTHS, RATES, B)
    return state


@gluon.jit
def steps_up_to(row, level, whole, LENGTHS: gl.constexpr, RATES: gl.constexpr, B: gl.constexpr):
    """Blocks of `each_block` of multiplicity 1, of up to 2, .. of up to the number of branches."""
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    blocks = ()
    for i in gl.static_range(NB):
        _, _, _, rows = ring_of(row, i, whole, LENGTHS, R)
        blocks = blocks + (rows // B,)
    ends = ()
    total = gl.to_tensor(0)
    for multiplicity in gl.static_range(1, NB + 1):
        for i in gl.static_range(0, NB - multiplicity + 1):
            # Of level multiplicity + i or above, less what lies above, unless that is the tile's own level.
            total += gl.where(multiplicity + i <= level, blocks[i] * (R // RATES[multiplicity + i - 1]), 0)
            if multiplicity + i < NB:
                total -= gl.where(multiplicity + i < level, blocks[i] * (R // RATES[multiplicity + i]), 0)
        ends = ends + (total,)
    return ends


@gluon.jit
def bias_at(step, ends, NB: gl.constexpr):
    """log2 of the multiplicity of a step of `each_block`."""
    BIASES: gl.constexpr = log2_to(NB)
    bias = gl.to_tensor(0.0)
    for j in gl.static_range(1, NB):
        bias = gl.where(step >= ends[j - 1], BIASES[j], bias)
    return bias


@gluon.jit
def cut_ring(row, level, whole, LENGTHS: gl.constexpr, RATES: gl.constexpr):
    """The ring with the blocks that the sequence's end cuts, at `whole`; `level` if none has any.

    The shortest segment that reaches past `whole` has them; to longer ones they lie in the hole.
    """
    R: gl.constexpr = RATES[len(RATES) - 1]
    ring = gl.to_tensor(0)
    for i in gl.static_range(len(LENGTHS)):
        start, rows = segment_of(row, i, LENGTHS, R)
        ring += gl.where((i < level) & (start + rows <= whole), 1, 0)
    return ring


@gluon.jit
def each_cut_block(
    visit: gl.constexpr, context, state, row, level, head, whole, LENGTHS: gl.constexpr, RATES: gl.constexpr
):
    """As `each_block`, for the blocks of `cut_ring`."""
    R: gl.constexpr = RATES[len(RATES) - 1]
    ring = cut_ring(row, level, whole, LENGTHS, RATES)
    for shown in range(ring + 1, level + 1):
        first, stride, step, _ = residues_of(shown, level, RATES)
        for z in range(first, stride, step):
            for distance in range(z, R, stride):
                state = visit(context, state, whole, (head + distance) % R, shown - ring)
    return state


@gluon.jit
def ring_steps(row, i, whole, LENGTHS: gl.constexpr, RATES: gl.constexpr, B: gl.constexpr):
    """Blocks that a residue has in ring i."""
    return ring_of(row, i, whole, LENGTHS, RATES[len(RATES) - 1])[3] // B


@gluon.jit
def first_shown(level, RATES: gl.constexpr):
    """The lowest level whose keys a row of a level sees."""
    NB: gl.constexpr = len(RATES)
    found = level
    for i in gl.static_range(1, NB):
        found = gl.where((NB - i < level) & (residue_count(NB - i, level, RATES) > 0), NB - i, found)
    return found


# With a causal mask: a tile is rows of one level, in one segment of the shortest branch. Only keys of that segment meet
# a diagonal; of every other ring, what lies before the segment is seen by all rows and the rest by none.


@gluon.jit
def stride_index(level, NB: gl.constexpr):
    """Index of the rate at whose stride the rows of a level lie."""
    return gl.minimum(level, NB - 1)


@gluon.jit
def blocks_before(residue, index, low, high, RATES: gl.constexpr, B: gl.constexpr):
    """Of the places residue + t * RATES[index] of a segment in blocks of B: how many blocks lie wholly at or before the
    place low, how many begin at or before high."""
    stride = pick(RATES, index)
    dense = divide(gl.maximum(low + stride - residue, 0), index, RATES, B)
    some = gl.where(high >= residue, divide(gl.maximum(high - residue, 0), index, RATES, B) + 1, 0)
    return dense, some


@gluon.jit
def blocks_after(residue, index, low, high, LENGTHS: gl.constexpr, RATES: gl.constexpr, B: gl.constexpr):
    """Of the same blocks: the first that ends at or after the place low, and the first that begins at or after high."""
    stride = pick(RATES, index)
    count = divide(LENGTHS[0], index, RATES, B)
    some = gl.minimum(divide(gl.maximum(low + stride - 1 - residue, 0), index, RATES, B), count)
    dense = gl.minimum(divide(gl.maximum(high + stride * B - 1 - residue, 0), index, RATES, B), count)
    return some, dense


@gluon.jit
def side_of(row, i, end, AFTER: gl.constexpr, LENGTHS: gl.constexpr, R: gl.constexpr):
    """First row and number of rows of what ring i >= 1 has before a row's segment of branch i - 1, or after it and
    before the row `end`."""
    start, rows = segment_of(row, i, LENGTHS, R)
    inner, inner_rows = segment_of(row, i - 1, LENGTHS, R)
    if AFTER:
        begin = gl.minimum(inner + inner_rows, end)
        return begin, gl.minimum(start + rows, end) - begin
    else:
        return start, inner - start


@gluon.jit
def each_side_block(
    visit: gl.constexpr, context, state, row, level, head, end, AFTER: gl.constexpr, LENGTHS: gl.constexpr,
    RATES: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """As `each_block`, for the rings from 1 on: keys before the shortest segment of a row, or queries after it."""
    R: gl.constexpr = RATES[len(RATES) - 1]
    for multiplicity in range(1, level):
        for i in range(1, level - multiplicity + 1):
            first, stride, step, _ = residues_of(multiplicity + i, level, RATES)
            start, rows = side_of(row, i, end, AFTER, LENGTHS, R)
            for z in range(first, stride, step):
                for distance in range(z, R, stride):
                    residue = (head + distance) % R
                    for b in range(0, rows, B):
                        state = visit(context, state, start + b, residue, multiplicity)
    return state


@gluon.jit
def side_steps(
    multiplicity, row, level, end, AFTER: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, B: gl.constexpr
):
    """Blocks of `each_side_block` of one multiplicity."""
    R: gl.constexpr = RATES[len(RATES) - 1]
    total = gl.to_tensor(0)
    for i in range(1, level - multiplicity + 1):
        _, rows = side_of(row, i, end, AFTER, LENGTHS, R)
        total += rows // B * residue_count(multiplicity + i, level, RATES)
    return total
