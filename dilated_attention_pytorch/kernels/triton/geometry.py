"""Index arithmetic and hashing that the kernels share: the in-kernel twin of `core.pattern` and `core.dropout`.

Everything counts in *slots*: slot j of a segment is position `base + j * rate`. A tile is a run of slots of one
segment, so that all of its rows see the same segment and a kernel needs masks only where a segment ends.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_offset(kv_head, rate, num_kv_heads, MODULO: tl.constexpr):
    """The residue that a key/value head keeps."""
    if MODULO:
        return kv_head % rate
    else:
        return kv_head // tl.cdiv(num_kv_heads, rate)


@triton.jit
def locate(
    pid, num_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
    row_start, cu_seqlens, tile_ends, num_sequences,
    TILE: tl.constexpr, PACKED: tl.constexpr, ROW_START: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    """Which tile of which segment, head and sequence a program has.

    Returns:
        sequence, head, segment (counted from the first one in range), tile, row_base (memory row of the sequence's
        first row), q_begin and k_begin (positions of the first rows), number of queries and keys.
    """
    if PACKED:
        # num_tiles bounds the tiles of all sequences together; which of them a tile falls into is searched.
        flat = pid % num_tiles
        head = pid // num_tiles
        low = 0
        high = num_sequences
        for _ in tl.static_range(SEARCH_STEPS):
            middle = (low + high) // 2
            end = tl.load(tile_ends + middle, mask=middle < num_sequences, other=2147483647)
            right = (low < high) & (end <= flat)
            high = tl.where(right | (low >= high), high, middle)
            low = tl.where(right, middle + 1, low)
        sequence = low
        inside = sequence < num_sequences
        begin = tl.load(tile_ends + sequence - 1, mask=inside & (sequence > 0), other=0)
        row_base = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int32)
        stop = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int32)
        count = stop - row_base  # 0 for the tiles beyond the last sequence
        per_segment = tl.maximum(tl.cdiv(tl.cdiv(tl.minimum(length, count), rate), TILE), 1)
        local = flat - begin
        return sequence, head, local // per_segment, local % per_segment, row_base, 0, 0, count, count
    else:
        tile = pid % num_tiles
        pid = pid // num_tiles
        segment = pid % num_segments
        pid = pid // num_segments
        head = pid % num_heads
        sequence = pid // num_heads
        q_begin = q_start
        k_begin = k_start
        if ROW_START:
            first = tl.load(row_start + sequence).to(tl.int32)
            q_begin = q_start - first
            k_begin = k_start - first
        return sequence, head, segment, tile, 0, q_begin, k_begin, num_queries, num_keys


@triton.jit
def segment_slots(
    segment, by_keys, length, rate, offset, q_begin, k_begin, num_queries, num_keys, ZERO_KEYS: tl.constexpr
):
    """What one segment holds.

    Args:
        segment: counted from the first segment that holds a query (a key, if by_keys).

    Returns:
        base (position of slot 0), out_base (position that slot 0's result is written to), the slots
        [q_lo, q_hi) of the queries, q_real (slots from there on are queries of zeros), the slots [k_lo, k_hi) of
        the keys, and the number of zero keys.
    """
    if ZERO_KEYS:
        # core.zero_keys: segments of g positions are filled up to m slots and written m * rate apart.
        g = tl.minimum(length, num_queries)
        m = tl.cdiv(g, rate)
        base = segment * g + offset
        out_base = segment * m * rate + offset
        keys = tl.maximum(tl.cdiv(tl.minimum(g, num_queries - segment * g) - offset, rate), 0)
        kept = tl.minimum(tl.maximum(tl.cdiv(num_queries - out_base, rate), 0), m)
        # Past the last segment nothing is left; a kept slot there would be written by nobody's query.
        inside = segment * g < num_queries
        kept = tl.where(inside, kept, 0)
        keys = tl.where(inside, keys, 0)
        # A lone zero key counts for nothing (core.zero_keys).
        pads = tl.where((m == 1) & (keys == 0), 0, m - keys)
        return base, out_base, 0, kept, tl.minimum(keys, kept), 0, keys, pads
    else:
        q_low = tl.maximum(q_begin, 0)
        k_low = tl.maximum(k_begin, 0)
        first = tl.where(by_keys, k_low, q_low) // length
        base = (first + segment) * length + offset
        slots = tl.maximum(tl.cdiv(length - offset, rate), 0)
        q_lo = tl.minimum(tl.maximum(tl.cdiv(q_low - base, rate), 0), slots)
        q_hi = tl.minimum(tl.maximum(tl.cdiv(q_begin + num_queries - base, rate), q_lo), slots)
        k_lo = tl.minimum(tl.maximum(tl.cdiv(k_low - base, rate), 0), slots)
        k_hi = tl.minimum(tl.maximum(tl.cdiv(k_begin + num_keys - base, rate), k_lo), slots)
        return base, base, q_lo, q_hi, q_hi, k_lo, k_hi, 0


@triton.jit
def load_tile(
    view, batch, view_rows, row, residue, head, row_stride, head_stride,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Rows of one residue and head through the copy engine, from a view of rank VIEW (`launch_aligned.descriptor`)."""
    if VIEW == 5:
        return view.load([batch, residue, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        return view.load([batch * view_rows + row, residue * row_stride + head * head_stride])


@triton.jit
def mix(x):
    """`core.dropout.mix` on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def absorb(state, word):
    """`core.dropout.absorb`; word is an int whose low 32 bits count."""
    return mix(state ^ word.to(tl.uint32) ^ 0x9E3779B9)


@triton.jit
def row_hash(seed, sequence, head, branch, q_pos):
    """The hash state of query rows with the branch absorbed."""
    value = tl.load(seed)
    state = absorb(mix((value & 0xFFFFFFFF).to(tl.uint32) ^ 0x9E3779B9), (value >> 32) & 0xFFFFFFFF)
    state = absorb(absorb(state, sequence), head)
    return absorb(absorb(state, q_pos), branch)
