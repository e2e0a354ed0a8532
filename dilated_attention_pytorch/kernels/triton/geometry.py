"""Index arithmetic, loads and hashing that the kernels share: the in-kernel twin of `core.pattern` and `core.dropout`.

The general kernels count in *slots*: slot j of a segment is position `base + j * rate`. A tile is a run of slots of one
segment, so that all of its rows see the same segment and a kernel needs masks only where a segment ends.

A batch index that is multiplied by a stride, and every row, is int64: a tensor may have more than 2^31 elements.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import views

_FLAT = tl.constexpr(views.FLAT)
_POINTERS = tl.constexpr(views.POINTERS)
_RAGGED = tl.constexpr(views.RAGGED)


# Rows of one head of a tensor (B, N, H, D), whose strides are a `views.Strides`.


@triton.jit
def head_at(x, strides, batch, head):
    """Pointer to a head's first row."""
    return x + batch * strides.batch + head * strides.head


@triton.jit
def rows_at(x, strides, batch, head, rows, d):
    """Pointers to rows of a head: rows [M] and d [D] give [M, D]."""
    return x + batch * strides.batch + head * strides.head + rows[:, None] * strides.row + d[None, :]


@triton.jit
def offsets_of(strides, batch, head, rows, d):
    """The same as offsets [M, D], for tensors that lie alike."""
    return batch * strides.batch + head * strides.head + rows[:, None] * strides.row + d[None, :]


@triton.jit
def load_rows(x, strides, batch, head, rows, d, mask):
    """Rows of a head, zero where the mask hides them: [M, D]."""
    return tl.load(rows_at(x, strides, batch, head, rows, d), mask=mask, other=0.0)


@triton.jit
def steps_to(strides, rate, d, ROWS: tl.constexpr):
    """What leads from a row to ROWS rows at stride rate: [ROWS, D]."""
    return (tl.arange(0, ROWS) * rate).to(tl.int64)[:, None] * strides.row + d[None, :]


@triton.jit
def load_tile(source, batch, head, view_rows, row, residue, hop, mask, VIEW: tl.constexpr):
    """A tile of a walk: [ROWS, D].

    Args:
        source: view (`views.view_pair`), pointer to the walk's first row, steps to a tile's rows, strides.
        view_rows: rows of a residue, in the view.
        row: the tile's first row in the view, of its residue.
        hop: how many rows of the tensor the tile's first lies beyond the walk's first, int64.
        mask: what plain pointers may load; None for whole tiles.
    """
    view, at, steps, strides = source
    if VIEW == _FLAT:
        return view.load([batch * view_rows + row, residue * strides.row + head * strides.head])
    elif VIEW != _POINTERS:
        return view.load([batch, residue, head, row, 0]).reshape(steps.shape)
    elif mask is None:
        return tl.load(at + hop * strides.row + steps)
    else:
        return tl.load(at + hop * strides.row + steps, mask=mask, other=0.0)


@triton.jit
def load_pair(a, b, batch, head, view_rows, row, residue, hop, a_mask, b_mask, VIEW: tl.constexpr):
    """The same tile of K and V, or of Q and dO; see `load_tile`."""
    a_tile = load_tile(a, batch, head, view_rows, row, residue, hop, a_mask, VIEW)
    b_tile = load_tile(b, batch, head, view_rows, row, residue, hop, b_mask, VIEW)
    return a_tile, b_tile


# Which rows a program has.


@triton.jit
def head_offset(kv_head, rate, num_kv_heads, MODULO: tl.constexpr):
    """The residue that a key/value head keeps."""
    if MODULO:
        return kv_head % rate
    else:
        return kv_head // tl.cdiv(num_kv_heads, rate)


@triton.jit
def locate(
    num_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
    row_start, cu_seqlens, tile_ends, num_sequences, TILE: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    """Which tile of which segment, head and sequence a program has.

    Returns:
        sequence, head, segment (counted from the first one in range), tile, row_base (memory row of the sequence's
        first row), q_begin and k_begin (positions of the first rows), number of queries and keys.
    """
    # One axis: the others of CUDA end at 65,535, which a batch of short sequences or a large rate passes.
    pid = tl.program_id(0)
    if cu_seqlens is not None:
        # num_tiles bounds the tiles of all sequences together; which of them a tile falls into is searched.
        flat = pid % num_tiles
        head = pid // num_tiles
        # Bisection for the first sequence whose tiles end after this one; the number of steps is known to the compiler.
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
        # Bounds that the host has not read may be wrong: no row outside the tensors is touched for that.
        row_base = tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int32)
        row_base = tl.minimum(tl.maximum(row_base, 0), num_queries)
        stop = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int32)
        stop = tl.minimum(tl.maximum(stop, row_base), num_queries)
        # 0 for the tiles beyond the last sequence.
        count = stop - row_base
        per_segment = tl.maximum(tl.cdiv(tl.cdiv(tl.minimum(length, count), rate), TILE), 1)
        local = flat - begin
        return sequence, head, local // per_segment, local % per_segment, row_base, q_start, k_start, count, count
    else:
        # Tiles of one segment follow one another: they share its keys, which stay in the L2 cache.
        tile = pid % num_tiles
        pid = pid // num_tiles
        segment = pid % num_segments
        pid = pid // num_segments
        head = pid % num_heads
        sequence = pid // num_heads
        q_begin = q_start
        k_begin = k_start
        if row_start is not None:
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
        # Left padding makes positions negative: those rows belong to no segment.
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
def keys_seen(
    first, q_hi, k_lo, k_hi, view_slots, BM: tl.constexpr, BN: tl.constexpr, VIEW: tl.constexpr, CAUSAL: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """(split, end) of the walk over the keys that the BM slots from `first` see: tiles before split need no mask, and
    lie before slot view_slots, where a ragged view ends."""
    end = k_hi
    whole = tl.minimum(k_hi, view_slots) if VIEW == _RAGGED else k_hi
    split = k_lo if JOINED else k_lo + tl.maximum(whole - k_lo, 0) // BN * BN
    if CAUSAL:
        end = tl.minimum(k_hi, tl.minimum(first + BM, q_hi))
        split = tl.minimum(split, k_lo + tl.maximum(first + 1 - k_lo, 0) // BN * BN)
    return split, end


@triton.jit
def pairs_seen(slots, start, n, k_hi, segment_slots, CAUSAL: tl.constexpr, JOINED: tl.constexpr):
    """Which pairs of query slots and of key slots start + n count: [BM, BN], or [1, BN] without a diagonal."""
    seen = (start + n < k_hi)[None, :]
    if CAUSAL:
        seen = seen & (slots[:, None] >= start + n[None, :])
    if JOINED:
        seen = seen & same_segment(slots[:, None], start + n[None, :], segment_slots)
    return seen


@triton.jit
def same_segment(a, b, segment_slots):
    """Whether slots of joined segments, of so many slots each, belong to one of them."""
    return a // segment_slots == b // segment_slots


@triton.jit
def load_shown(key_mask, at, positions, mask):
    """Whether the key padding mask, from its element `at` on, shows positions. [M]"""
    return tl.load(key_mask + at + positions.to(tl.int64), mask=mask, other=0) != 0


# Dropout's counter-based mask.


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


@triton.jit
def pairs_kept(state, k_pos, threshold):
    """Which pairs dropout keeps; state of the queries and k_pos are broadcast against each other."""
    return absorb(state, k_pos) >= threshold.to(tl.uint32)
