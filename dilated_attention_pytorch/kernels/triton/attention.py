"""The general forward kernel: one branch a launch, tiles of consecutive slots, merged into (out, lse) in place.

A tile of slots of one segment meets the slots of the same segment, so every product is dense whatever w, r and N
are; masks are needed only where a segment or the diagonal cuts a tile. The launch of the next branch continues the
online softmax from the (out, lse) it finds: nothing else is written, at the price of reading the rows of a sparser
branch once more. Where lengths align, `aligned.py` walks all branches in one launch instead.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import geometry, softmax, views

_RAGGED = tl.constexpr(views.RAGGED)

# Values that differ from call to call, or from branch to branch, without being worth a compilation of their own. They
# come one by one: Triton specialises on every member of a tuple, as it should on strides.
RUNTIME = [
    "num_heads", "num_kv_heads", "num_queries", "num_keys", "q_start", "k_start", "length", "rate", "branch",
    "num_sequences", "num_segments", "num_tiles", "threshold", "view_rows", "num_batches", "slots_each", "terms_slots",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def branch_forward(
    q, k, v, k_view, v_view, out, lse, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_strides, k_strides, v_strides, out_strides, lse_batch, lse_head, mask_batch,
    num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, slots_each, qk_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr, NEGATE: tl.constexpr,
    VIEW: tl.constexpr, EVEN: tl.constexpr, JOINED: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Merges a tile of queries' share of one branch into (out, lse)."""
    KEY_MASK: tl.constexpr = key_mask is not None
    DROPOUT: tl.constexpr = seed is not None

    # The program's segment and its slots.
    sequence, head, segment, tile, row_base, q_begin, k_begin, q_count, k_count = geometry.locate(
        num_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
        row_start, cu_seqlens, tile_ends, num_sequences, BM, SEARCH_STEPS,
    )  # fmt: skip
    batch = 0 if cu_seqlens is not None else sequence
    kv_head = head // (num_heads // num_kv_heads)
    offset = geometry.head_offset(kv_head, rate, num_kv_heads, MODULO)
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, pads = geometry.segment_slots(
        segment, False, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    # The tiles with most keys first: the short ones fill the gaps at the launch's end.
    if CAUSAL:
        first = q_lo + (tl.cdiv(q_hi - q_lo, BM) - 1 - tile) * BM
    else:
        first = q_lo + tile * BM
    if (first < q_lo) | (first >= q_hi):
        return

    # The queries' tile: [BM, D].
    d = tl.arange(0, BLOCK_D)
    slots = first + tl.arange(0, BM)
    out_pos = out_base + slots * rate
    written = slots < q_hi
    batch64 = tl.full((), 0, tl.int64) if cu_seqlens is not None else batch.to(tl.int64)
    q_rows = (row_base + base - q_begin + slots * rate).to(tl.int64)
    out_rows = (row_base + out_pos - q_begin).to(tl.int64)
    d_mask = d[None, :] < D
    q_tile = geometry.load_rows(q, q_strides, batch64, head, q_rows, d, (slots < q_real)[:, None] & d_mask)
    # `softmax.step` scales the maximum after it was taken, which a negative scale would turn into a minimum.
    if NEGATE:
        q_tile = -q_tile

    # What the branches before found: acc [BM, D], m and l [BM].
    out_at = geometry.rows_at(out, out_strides, batch64, head, out_rows, d)
    lse_at = lse + batch64 * lse_batch + head * lse_head + out_rows
    if FIRST:
        m = tl.full((BM,), -float("inf"), tl.float32)
        l = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BLOCK_D), tl.float32)
    else:
        # A partial result is a softmax with one key of weight exp(lse) and value out: the walk continues from it.
        m = tl.load(lse_at, mask=written, other=-float("inf")) * softmax.LOG2E
        l = tl.where(m == -float("inf"), 0.0, 1.0)
        acc = tl.load(out_at, mask=written[:, None] & d_mask, other=0.0).to(tl.float32)
    # Keys of logit 0 and value 0: they add to the denominator alone.
    if ZERO_KEYS:
        if pads > 0:
            m_new = tl.maximum(m, 0.0)
            alpha = tl.math.exp2(m - m_new)
            l = l * alpha + pads * tl.math.exp2(-m_new)
            acc = acc * alpha[:, None]
            m = m_new
    if DROPOUT:
        state = geometry.row_hash(seed, sequence, head, branch, out_pos)

    # Where the walk over the segment's keys begins and ends, in memory and in the views.
    n = tl.arange(0, BN)
    k_first = (row_base + base - k_begin).to(tl.int64)
    view_row = (base - k_begin) // rate
    split, end = geometry.keys_seen(first, q_hi, k_lo, k_hi, view_rows - view_row, BM, BN, VIEW, CAUSAL, JOINED)
    residue = (base - k_begin) % rate
    k_at = geometry.head_at(k, k_strides, batch64, kv_head) + k_first * k_strides.row
    v_at = geometry.head_at(v, v_strides, batch64, kv_head) + k_first * v_strides.row
    k_source = k_view, k_at, geometry.steps_to(k_strides, rate, d, BN), k_strides
    v_source = v_view, v_at, geometry.steps_to(v_strides, rate, d, BN), v_strides

    # Walk the keys: whole tiles without a mask, then those that the diagonal or the segment's end cuts.
    for masked in tl.static_range(2):
        if masked == 0 or CAUSAL or not EVEN:
            for start in tl.range(split if masked else k_lo, end if masked else split, BN):
                hop = (start * rate).to(tl.int64)
                load_mask = (start + n < k_hi)[:, None] & d_mask if masked else d_mask
                if masked and VIEW == _RAGGED:
                    # The tile may hold rows that the view lacks.
                    rows = k_first + (start + n) * rate
                    k_tile = geometry.load_rows(k, k_strides, batch64, kv_head, rows, d, load_mask)
                    v_tile = geometry.load_rows(v, v_strides, batch64, kv_head, rows, d, load_mask)
                else:
                    k_tile, v_tile = geometry.load_pair(
                        k_source, v_source, batch, kv_head, view_rows, view_row + start, residue, hop, load_mask,
                        load_mask, VIEW,
                    )  # fmt: skip
                # Logits: [BM, D] x [D, BN] -> [BM, BN].
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                if masked:
                    seen = geometry.pairs_seen(slots, start, n, k_hi, slots_each, CAUSAL, JOINED)
                    s = tl.where(seen, s, -float("inf"))
                k_pos = base + (start + n) * rate
                if KEY_MASK:
                    k_rows = k_pos - k_begin + k_start
                    shown = geometry.load_shown(key_mask, batch64 * mask_batch, k_rows, start + n < k_hi)
                    s = tl.where(shown[None, :], s, -float("inf"))
                # Softmax online, then P V: [BM, BN] x [BN, D] -> [BM, D].
                p, acc, m, l = softmax.step(s, acc, m, l, qk_scale, KEY_MASK or not EVEN)
                # After the sum: dropout acts on probabilities, not on the denominator.
                if DROPOUT:
                    kept = geometry.pairs_kept(state[:, None], k_pos[None, :], threshold)
                    p = tl.where(kept, p * keep_scale, 0.0)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    # Write the rows; those of masked queries as (0, -inf).
    result, result_lse = softmax.finish(acc, m, l)
    if KEY_MASK:
        real = geometry.load_shown(key_mask, batch64 * mask_batch, out_pos - q_begin + q_start, written)
        result = tl.where(real[:, None], result, 0.0)
        result_lse = tl.where(real, result_lse, -float("inf"))
    tl.store(out_at, result.to(out.dtype.element_ty), mask=written[:, None] & d_mask)
    tl.store(lse_at, result_lse, mask=written)
