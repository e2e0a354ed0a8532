"""The tiles that a program takes. Levels, residues and segments are those of `walk.py`, as is the arithmetic."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_at(tile, num_blocks, num_heads, R: gl.constexpr):
    """(batch, head, residue, block) of a tile of rows of one residue.

    Levels differ in cost, and a program that takes every 132nd tile would see the same few only: so residues turn from
    block to block, and count from the head.
    """
    turn = tile // R
    head = turn // num_blocks
    return head // num_heads, head % num_heads, (head + tile + turn) % R, turn % num_blocks


@gluon.jit
def drawn(tile, num_tiles, num_segments, PER: gl.constexpr, SHORT: gl.constexpr):
    """Where a tile is whose segment of the shortest branch has PER, the last SHORT of them of one branch alone: batch
    and head in one number, segment, and number in it. Those of one branch, which are the shortest, come last of all.
    """
    LONG: gl.constexpr = PER - SHORT
    number_long = num_tiles // PER * LONG
    is_short = tile >= number_long
    number = tile - gl.where(is_short, number_long, 0)
    turn = gl.where(is_short, number // max(SHORT, 1), number // max(LONG, 1))
    # Levels differ in cost: so they turn from segment to segment.
    at = gl.where(is_short, LONG + (number + turn) % max(SHORT, 1), (number + turn) % max(LONG, 1))
    return turn // num_segments, turn % num_segments, at


# Without a mask a tile is groups of rows of one segment of the shortest branch, in the order of their levels, the
# highest first: rows of a level see all that those of lower levels see.


@gluon.constexpr_function
def groups_above(level, rows, lengths, rates):
    """Groups of so many rows above a level that a segment has."""
    return lengths[0] // (rates[level] * rows) if level < len(rates) else 0


@gluon.constexpr_function
def group_tiles(groups, rows, lengths, rates):
    """Tiles of so many groups that a segment has, and how many of them are of one branch alone."""
    every, longer = (-(-groups_above(level, rows, lengths, rates) // groups) for level in (0, 1))
    return every, every - longer


@gluon.jit
def group_tile_at(
    tile, num_tiles, num_segments, num_heads, GROUPS: gl.constexpr, B: gl.constexpr, LENGTHS: gl.constexpr,
    RATES: gl.constexpr,
):  # fmt: skip
    """(batch, head, segment, number) of a tile: `GROUPS` groups of B rows, from the number-th on (`group_at`)."""
    PER: gl.constexpr = group_tiles(GROUPS, B, LENGTHS, RATES)[0]
    SHORT: gl.constexpr = group_tiles(GROUPS, B, LENGTHS, RATES)[1]
    head, segment, at = drawn(tile, num_tiles, num_segments, PER, SHORT)
    return head // num_heads, head % num_heads, segment, at * GROUPS


@gluon.constexpr_function
def residues_between(level, rates):
    """Residues of a level for each of the levels above, at least 1."""
    return max(rates[level] // rates[level - 1] - 1, 1)


@gluon.jit
def group_at(number, head, segment, num_rows, B: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr):
    """Level, residue and first row of a group, and whether there is one: the segment has so many, and its rows begin
    before the sequence's end.

    Args:
        head: the key/value head.
    """
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    BLOCKS: gl.constexpr = LENGTHS[0] // (R * B)
    level = gl.to_tensor(NB)
    distance = gl.to_tensor(0)
    for i in gl.static_range(1, NB):
        # Level l = NB - i: multiples of r_(l-1) that are none of r_l.
        order = (number - groups_above(NB - i, B, LENGTHS, RATES)) // BLOCKS
        found = order // residues_between(NB - i, RATES) * RATES[NB - i]
        found += (1 + order % residues_between(NB - i, RATES)) * RATES[NB - i - 1]
        here = number >= groups_above(NB - i, B, LENGTHS, RATES)
        level = gl.where(here, NB - i, level)
        distance = gl.where(here, found, distance)
    residue = (head + distance) % R
    # Whole residues come before, so blocks count from the first group on.
    row = segment * (LENGTHS[0] // R) + number % BLOCKS * B
    is_there = (number < groups_above(0, B, LENGTHS, RATES)) & (row * R + residue < num_rows)
    return level, residue, row, is_there


@gluon.jit
def has_rows(
    number, head, segment, num_rows, GROUPS: gl.constexpr, B: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr
):
    """Whether a tile of `group_tile_at` has any."""
    found = group_at(number, head, segment, num_rows, B, LENGTHS, RATES)[3]
    for w in gl.static_range(1, GROUPS):
        found |= group_at(number + w, head, segment, num_rows, B, LENGTHS, RATES)[3]
    return found


# With a causal mask a tile is rows of one level, in such a segment, which whole tiles fill.


@gluon.constexpr_function
def tiles_each(level, rows, lengths, rates):
    """Tiles of so many rows that a residue of a level has, at the stride of the next one."""
    return lengths[0] // (rates[min(level, len(rates) - 1)] * rows)


@gluon.jit
def level_tile_at(
    tile, num_tiles, num_segments, num_heads, B: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr
):
    """(batch, head, segment, level, distance, first) of a tile.

    Its rows are the places `(head + distance) % stride + (first + t) * stride` of the segment, t < B; the stride is
    RATES[stride_index(level)].
    """
    NB: gl.constexpr = len(RATES)
    # Those of several branches are as many as rows of the second one fill.
    PER: gl.constexpr = LENGTHS[0] // B
    SHORT: gl.constexpr = PER - groups_above(1, B, LENGTHS, RATES)
    head, segment, at = drawn(tile, num_tiles, num_segments, PER, SHORT)
    level = gl.to_tensor(NB)
    distance = gl.to_tensor(0)
    first = at * B
    for i in gl.static_range(1, NB):
        # Level l = NB - i: r_l / r_(l-1) - 1 residues at the stride r_l.
        local = at - groups_above(NB - i, B, LENGTHS, RATES)
        here = local >= 0
        level = gl.where(here, NB - i, level)
        distance = gl.where(here, (1 + local // tiles_each(NB - i, B, LENGTHS, RATES)) * RATES[NB - i - 1], distance)
        first = gl.where(here, local % tiles_each(NB - i, B, LENGTHS, RATES) * B, first)
    return head // num_heads, head % num_heads, segment, level, distance, first
