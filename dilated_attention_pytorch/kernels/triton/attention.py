"""The general forward kernel: one branch a launch, tiles of consecutive slots, merged into (out, lse) in place.

A tile of slots of one segment meets the slots of the same segment, so every product is dense whatever w, r and N
are; masks are needed only where a segment or the diagonal cuts a tile. The launch of the next branch continues the
online softmax from the (out, lse) it finds: nothing else is written, at the price of reading the rows of a sparser
branch once more. Where lengths align, `aligned.py` walks all branches in one launch instead.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton.geometry import (
    LN2,
    LOG2E,
    absorb,
    head_offset,
    load_tile,
    locate,
    row_hash,
    segment_slots,
)  # fmt: skip

# Values that differ from call to call, or from branch to branch, without being worth a compilation of their own.
RUNTIME = [
    "num_heads", "num_kv_heads", "num_queries", "num_keys", "q_start", "k_start", "length", "rate", "branch",
    "num_sequences", "num_segments", "num_tiles", "threshold", "view_rows",
    "num_batches", "terms_length",
]  # fmt: skip


@triton.jit
def softmax_step(s, acc, m, l, qk_scale, GUARD: tl.constexpr, BIASED: tl.constexpr = False, bias=0.0):
    """Takes a tile of raw logits into the running maximum (in units of log2), sum and accumulator.

    With GUARD, rows that have seen nothing but -inf stay empty. With BIASED, bias (log2) is added to all logits.
    """
    top = tl.max(s, 1) * qk_scale
    if BIASED:
        top += bias
    m_new = tl.maximum(m, top)
    safe = m_new
    if GUARD:
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    shift = safe
    if BIASED:
        shift = safe - bias
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - safe)
    return p, acc * alpha[:, None], m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def finish(acc, m, l):
    """The normalised accumulator and the natural log of the denominator; (0, -inf) for an empty row."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, -float("inf"), (m + tl.math.log2(tl.where(empty, 1.0, l))) * LN2)
    return out, lse


@triton.jit(do_not_specialize=RUNTIME)
def branch_forward(
    q, k, v, k_view, v_view, out, lse, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, lse_batch, lse_head, mask_batch,
    num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, qk_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, ROW_START: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr, NEGATE: tl.constexpr,
    VIEW: tl.constexpr, EVEN: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head, segment, tile, row_base, q_begin, k_begin, q_count, k_count = locate(
        tl.program_id(0), num_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
        row_start, cu_seqlens, tile_ends, num_sequences, BM, PACKED, ROW_START, SEARCH_STEPS,
    )  # fmt: skip
    batch = 0 if PACKED else sequence
    kv_head = head // (num_heads // num_kv_heads)
    offset = head_offset(kv_head, rate, num_kv_heads, MODULO)
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, pads = segment_slots(
        segment, False, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    if CAUSAL:  # the tiles with most keys first
        first = q_lo + (tl.cdiv(q_hi - q_lo, BM) - 1 - tile) * BM
    else:
        first = q_lo + tile * BM
    if (first < q_lo) | (first >= q_hi):
        return

    d = tl.arange(0, BLOCK_D)
    slots = first + tl.arange(0, BM)
    out_pos = out_base + slots * rate
    written = slots < q_hi
    batch64 = batch.to(tl.int64) if not PACKED else tl.full((), 0, tl.int64)
    q_rows = (row_base + base - q_begin + slots * rate).to(tl.int64)
    out_rows = (row_base + out_pos - q_begin).to(tl.int64)
    d_mask = d[None, :] < D
    q_tile = tl.load(
        q + batch64 * q_batch + head * q_head + q_rows[:, None] * q_row + d[None, :],
        mask=(slots < q_real)[:, None] & d_mask, other=0.0,
    )  # fmt: skip
    if NEGATE:
        q_tile = -q_tile
    out_at = out + batch64 * out_batch + head * out_head + out_rows[:, None] * out_row + d[None, :]
    lse_at = lse + batch64 * lse_batch + head * lse_head + out_rows
    if FIRST:
        m = tl.full((BM,), -float("inf"), tl.float32)
        l = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BLOCK_D), tl.float32)
    else:
        # A partial result is a softmax with one key of weight exp(lse) and value out: the walk continues from it.
        m = tl.load(lse_at, mask=written, other=-float("inf")) * LOG2E
        l = tl.where(m == -float("inf"), 0.0, 1.0)
        acc = tl.load(out_at, mask=written[:, None] & d_mask, other=0.0).to(tl.float32)
    if ZERO_KEYS:
        if pads > 0:
            m_new = tl.maximum(m, 0.0)
            alpha = tl.math.exp2(m - m_new)
            l = l * alpha + pads * tl.math.exp2(-m_new)
            acc = acc * alpha[:, None]
            m = m_new
    if DROPOUT:
        state = row_hash(seed, sequence, head, branch, out_pos)

    end = k_hi
    split = k_lo + (k_hi - k_lo) // BN * BN  # tiles before it need no mask
    if CAUSAL:
        end = tl.minimum(k_hi, tl.minimum(first + BM, q_hi))
        split = tl.minimum(split, k_lo + tl.maximum(first + 1 - k_lo, 0) // BN * BN)
    n = tl.arange(0, BN)
    k_first = (row_base + base - k_begin).to(tl.int64)
    # Row and residue of slot 0 in the views of K and V.
    view_row = (base - k_begin) // rate
    residue = (base - k_begin) % rate
    k_at = k + batch64 * k_batch + kv_head * k_head + k_first * k_row
    v_at = v + batch64 * v_batch + kv_head * v_head + k_first * v_row
    k_steps = (n * rate).to(tl.int64)[:, None] * k_row + d[None, :]
    v_steps = (n * rate).to(tl.int64)[:, None] * v_row + d[None, :]
    for masked in tl.static_range(2):
        if masked == 0 or CAUSAL or not EVEN:
            for start in tl.range(split if masked else k_lo, end if masked else split, BN):
                if VIEW:
                    row = view_row + start
                    k_tile = load_tile(
                        k_view, batch, view_rows, row, residue, kv_head, k_row, k_head, BN, BLOCK_D, VIEW
                    )
                    v_tile = load_tile(
                        v_view, batch, view_rows, row, residue, kv_head, v_row, v_head, BN, BLOCK_D, VIEW
                    )
                else:
                    hop = (start * rate).to(tl.int64)
                    load_mask = d_mask
                    if masked:
                        load_mask = (start + n < k_hi)[:, None] & d_mask
                    k_tile = tl.load(k_at + hop * k_row + k_steps, mask=load_mask, other=0.0)
                    v_tile = tl.load(v_at + hop * v_row + v_steps, mask=load_mask, other=0.0)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                if masked:
                    seen = (start + n < k_hi)[None, :]
                    if CAUSAL:
                        seen = seen & (slots[:, None] >= start + n[None, :])
                    s = tl.where(seen, s, -float("inf"))
                if KEY_MASK:
                    k_pos = (base + (start + n) * rate - k_begin + k_start).to(tl.int64)
                    real = tl.load(key_mask + batch64 * mask_batch + k_pos, mask=start + n < k_hi, other=0) != 0
                    s = tl.where(real[None, :], s, -float("inf"))
                p, acc, m, l = softmax_step(s, acc, m, l, qk_scale, KEY_MASK or not EVEN)
                if DROPOUT:
                    k_pos = base + (start + n) * rate
                    keep = absorb(state[:, None], k_pos[None, :]) >= threshold.to(tl.uint32)
                    p = tl.where(keep, p * keep_scale, 0.0)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    result, result_lse = finish(acc, m, l)
    if KEY_MASK:
        q_at = (out_pos - q_begin + q_start).to(tl.int64)
        real = tl.load(key_mask + batch64 * mask_batch + q_at, mask=written, other=0) != 0
        result = tl.where(real[:, None], result, 0.0)
        result_lse = tl.where(real, result_lse, -float("inf"))
    tl.store(out_at, result.to(out.dtype.element_ty), mask=written[:, None] & d_mask)
    tl.store(lse_at, result_lse, mask=written)
