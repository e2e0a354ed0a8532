"""Tiles of one branch: 128 slots of a segment, forward also 192. Slot j of a segment is position `base + j * rate`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(128)


@gluon.jit
def tile_of(tile, sizes, BY_KEYS: gl.constexpr, MODULO: gl.constexpr, ROWS: gl.constexpr = TILE):
    """(batch, head, key head, segment, base, slots of the segment, first slot) of a tile; its heads are key heads if
    BY_KEYS.

    Args:
        sizes: batches, heads, query heads per key head, segments, tiles of a segment, segment length, rate, rows.
    """
    num_batches, num_heads, group, _, tiles_each, length, rate, num_rows = sizes
    num_kv_heads = num_heads // group
    heads = num_kv_heads if BY_KEYS else num_heads
    turn = tile // tiles_each
    # Tiles differ in cost under a causal mask, and a program that takes every 132nd would see the same few: so they
    # turn from segment to segment. The segment that the sequence's end cuts is the cheapest, and comes last.
    first = (tile + turn) % tiles_each * ROWS
    head = turn % heads
    around = turn // heads
    segment = around // num_batches
    batch = around % num_batches
    kv_head = head if BY_KEYS else head // group
    offset = kv_head % rate if MODULO else kv_head // ((num_kv_heads + rate - 1) // rate)
    # Not positive where the segment ends before the head's first slot.
    slots = (gl.minimum(length, num_rows - segment * length) - offset + rate - 1) // rate
    return batch, head, kv_head, segment, segment * length + offset, slots, first


@gluon.jit
def rows_from(base, sizes):
    """Of a segment's slots in the views: the first one's row, their residue, and whether that has a row more."""
    _, _, _, _, _, _, rate, num_rows = sizes
    row = base // rate
    residue = base - row * rate
    return row, residue, residue < num_rows % rate


@gluon.jit
def place_of(strides, batch, residue, head):
    """A batch, residue and head in units of a view."""
    return batch * strides.batch + residue * strides.row + head * strides.head


@gluon.jit
def blocks_of(slots, B: gl.constexpr):
    """Blocks of B that hold a segment's slots."""
    return (slots + B - 1) // B


@gluon.jit
def blocks_up_to(first, ROWS: gl.constexpr, B: gl.constexpr):
    """Blocks up to a tile's last row; so written that a compiler sees where a tile meets one block on its diagonal."""
    return first // B + ROWS // B if ROWS % B == 0 else (first + ROWS - 1) // B + 1
