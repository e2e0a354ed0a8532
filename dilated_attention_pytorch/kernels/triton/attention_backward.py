"""The general backward kernels: delta, then dQ and dK/dV, one branch a launch, deterministic and free of atomics.

Given the lse over all branches, `P = exp(s - lse)` and `dS = P * (dO.v - delta)` hold for every key on its own, with
`delta = rowsum(dO * out) - grad_lse`. So each branch adds its share to dq, dk and dv by itself: a launch reads what
the one before it wrote and writes the sum.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import geometry, softmax, views
from dilated_attention_pytorch.kernels.triton.attention import RUNTIME

_POINTERS = tl.constexpr(views.POINTERS)
_RAGGED = tl.constexpr(views.RAGGED)


@triton.jit
def rowsum(out, grad_out, out_strides, grad_strides, batch, head, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`rowsum(out * dO)` of a head's rows `[BM]`, fp32."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    # out and dO: [BM, D].
    o = geometry.load_rows(out, out_strides, batch, head, rows, d, mask)
    g = geometry.load_rows(grad_out, grad_strides, batch, head, rows, d, mask)
    return tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def delta_kernel(
    out, grad_out, grad_lse, delta, out_strides, grad_strides, lse_batch, lse_head, num_queries, num_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`rowsum(out * dO) - grad_lse`, fp32."""
    num_tiles = tl.cdiv(num_queries, BM)
    tile, pid = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    head, batch = pid % num_heads, (pid // num_heads).to(tl.int64)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    inside = rows < num_queries
    total = rowsum(out, grad_out, out_strides, grad_strides, batch, head, rows, inside, D, BLOCK_D)
    at = batch * lse_batch + head * lse_head + rows
    if grad_lse is not None:
        total -= tl.load(grad_lse + at, inside, 0.0)
    tl.store(delta + at, total, inside)


@triton.jit(do_not_specialize=[*RUNTIME, "terms_length", "num_rows"])
def terms_kernel(
    lse, delta, terms, num_queries, num_heads, num_kv_heads, length, rate, terms_slots, terms_length, num_rows,
    BM: tl.constexpr, MODULO: tl.constexpr,
):  # fmt: skip
    """The lse in units of log2 and delta of the queries of one branch, as the tiles of dK/dV read them: the slots of a
    head side by side, each segment filled up to terms_slots with (+inf, 0), by which a row without a query vanishes.

    Args:
        terms: `[2, num_rows, terms_length]`, num_rows = B * H.
    """
    num_tiles = tl.cdiv(terms_length, BM)
    tile, row = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    kv_head = (row % num_heads).to(tl.int32) // (num_heads // num_kv_heads)
    columns = tile * BM + tl.arange(0, BM)
    # Counted from the segment's start, then from the sequence's. What fills a segment up may lie beyond 2^31.
    places = geometry.head_offset(kv_head, rate, num_kv_heads, MODULO) + (columns % terms_slots).to(tl.int64) * rate
    positions = columns // terms_slots * length + places
    real = (places < length) & (positions < num_queries)
    kept = columns < terms_length
    at = row * num_queries + positions
    to = terms + row * terms_length + columns
    tl.store(to, softmax.load_lse(lse + at, real), mask=kept)
    tl.store(to + num_rows.to(tl.int64) * terms_length, tl.load(delta + at, mask=real, other=0.0), mask=kept)


@triton.jit(do_not_specialize=RUNTIME)
def branch_backward_dq(
    q, k, v, k_view, v_view, grad_out, lse, delta, dq, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, lse_batch, lse_head, mask_batch,
    num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, slots_each, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr, VIEW: tl.constexpr, EVEN: tl.constexpr,
    JOINED: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq what one branch gives a tile of queries."""
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
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, _ = geometry.segment_slots(
        segment, False, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    # The tiles with most keys first, as in the forward.
    if CAUSAL:
        first = q_lo + (tl.cdiv(q_hi - q_lo, BM) - 1 - tile) * BM
    else:
        first = q_lo + tile * BM
    # A query of zeros has no row to give a gradient to.
    if (first < q_lo) | (first >= q_real):
        return

    # The queries' tile: q and dO [BM, D], lse and delta [BM].
    d = tl.arange(0, BLOCK_D)
    d_mask = d[None, :] < D
    slots = first + tl.arange(0, BM)
    real = slots < q_real
    out_pos = out_base + slots * rate
    batch64 = tl.full((), 0, tl.int64) if cu_seqlens is not None else batch.to(tl.int64)
    q_rows = (row_base + base - q_begin + slots * rate).to(tl.int64)
    out_rows = (row_base + out_pos - q_begin).to(tl.int64)
    tile_mask = real[:, None] & d_mask
    q_tile = geometry.load_rows(q, q_strides, batch64, head, q_rows, d, tile_mask)
    grad_tile = geometry.load_rows(grad_out, grad_strides, batch64, head, out_rows, d, tile_mask)
    row_lse = softmax.load_lse(lse + batch64 * lse_batch + head * lse_head + out_rows, real)
    row_delta = tl.load(delta + batch64 * lse_batch + head * lse_head + out_rows, mask=real, other=0.0)
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

    # Walk the keys, as the forward does.
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
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
                # dP = dO V^T: [BM, D] x [D, BN] -> [BM, BN].
                dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
                # The lse is of all branches: no maximum has to be found, and no weight exceeds 1.
                p = tl.math.exp2(s * qk_scale - row_lse[:, None])
                if masked:
                    p = tl.where(geometry.pairs_seen(slots, start, n, k_hi, slots_each, CAUSAL, JOINED), p, 0.0)
                k_pos = base + (start + n) * rate
                if KEY_MASK:
                    k_rows = k_pos - k_begin + k_start
                    shown = geometry.load_shown(key_mask, batch64 * mask_batch, k_rows, start + n < k_hi)
                    p = tl.where(shown[None, :], p, 0.0)
                if DROPOUT:
                    kept = geometry.pairs_kept(state[:, None], k_pos[None, :], threshold)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                # dQ += dS K: [BM, BN] x [BN, D] -> [BM, D]; scaled once, after the walk.
                ds = p * (dp - row_delta[:, None])
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    # Add to what the branches before gave.
    acc *= scale
    dq_at = geometry.rows_at(dq, dq_strides, batch64, head, q_rows, d)
    if not FIRST:
        acc += tl.load(dq_at, mask=tile_mask, other=0.0).to(tl.float32)
    tl.store(dq_at, acc.to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=RUNTIME)
def branch_backward_dkv(
    q, k, v, q_view, grad_view, terms, grad_out, lse, delta, dk, dv, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, lse_batch, lse_head, mask_batch, num_batches,
    terms_slots, num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, slots_each, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr, VIEW: tl.constexpr, EARLY: tl.constexpr,
    JOINED: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what one branch gives a tile of keys, from the queries of all heads that share them."""
    KEY_MASK: tl.constexpr = key_mask is not None
    DROPOUT: tl.constexpr = seed is not None

    # The program's segment and its slots.
    sequence, kv_head, segment, tile, row_base, q_begin, k_begin, q_count, k_count = geometry.locate(
        num_kv_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
        row_start, cu_seqlens, tile_ends, num_sequences, BN, SEARCH_STEPS,
    )  # fmt: skip
    batch = 0 if cu_seqlens is not None else sequence
    offset = geometry.head_offset(kv_head, rate, num_kv_heads, MODULO)
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, _ = geometry.segment_slots(
        segment, True, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    # When causal, the first tiles have the most queries.
    first = k_lo + tile * BN
    if first >= k_hi:
        return

    # The keys' tile: k and v [BN, D].
    d = tl.arange(0, BLOCK_D)
    d_mask = d[None, :] < D
    slots = first + tl.arange(0, BN)
    real = slots < k_hi
    k_pos = base + slots * rate
    batch64 = tl.full((), 0, tl.int64) if cu_seqlens is not None else batch.to(tl.int64)
    k_rows = (row_base + k_pos - k_begin).to(tl.int64)
    tile_mask = real[:, None] & d_mask
    k_tile = geometry.load_rows(k, k_strides, batch64, kv_head, k_rows, d, tile_mask)
    v_tile = geometry.load_rows(v, v_strides, batch64, kv_head, k_rows, d, tile_mask)
    if KEY_MASK:
        shown = geometry.load_shown(key_mask, batch64 * mask_batch, k_pos - k_begin + k_start, real)

    # Where the walk over the segment's queries begins, in memory and in the views.
    # Causal: queries before the tile's first key see none of it.
    begin = q_lo
    # Tiles from there on need no causal mask.
    split = q_lo
    if CAUSAL:
        begin = tl.maximum(q_lo, first // BM * BM)
        split = first + BN - 1
    q_first = (row_base + base - q_begin).to(tl.int64)
    out_first = (row_base + out_base - q_begin).to(tl.int64)
    q_steps = geometry.steps_to(q_strides, rate, d, BM)
    grad_steps = geometry.steps_to(grad_strides, rate, d, BM)
    # The memory row of slot q_lo, which is not negative, as a row and a residue of the views.
    out_row = row_base + out_base - q_begin + q_lo * rate
    view_row = out_row // rate - q_lo
    residue = out_row % rate

    acc_k = tl.zeros((BN, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BN, BLOCK_D), tl.float32)
    for member in range(num_heads // num_kv_heads):
        head = kv_head * (num_heads // num_kv_heads) + member
        q_at = geometry.head_at(q, q_strides, batch64, head) + q_first * q_strides.row
        grad_at = geometry.head_at(grad_out, grad_strides, batch64, head) + out_first * grad_strides.row
        q_source = q_view, q_at, q_steps, q_strides
        grad_source = grad_view, grad_at, grad_steps, grad_strides
        terms_row = batch * num_heads + head
        lse_at = batch64 * lse_batch + head * lse_head + out_first

        # Walk the queries. A row past the last one has lse +inf: its weights vanish without a mask. A row that a ragged
        # view lacks comes from it as zeros, by which it adds nothing, and once more by itself. A tile of few rows
        # without a pipeline leaves registers to the walk before it.
        for rest in tl.static_range(2):
            if rest == 0 or VIEW == _RAGGED:
                m = tl.arange(0, 16 if rest else BM)
                walk_from = tl.maximum(begin, view_rows - view_row) if rest else begin
                for start in tl.range(walk_from, q_hi, 16 if rest else BM, num_stages=1 if rest else None):
                    inside = start + m < q_hi
                    row = view_row + start
                    q_mask, grad_mask = (start + m < q_real)[:, None] & d_mask, inside[:, None] & d_mask
                    if rest:
                        here = (start + m) * rate
                        q_tile = geometry.load_rows(q, q_strides, batch64, head, q_first + here, d, q_mask)
                        grad_tile = geometry.load_rows(
                            grad_out, grad_strides, batch64, head, out_first + here, d, grad_mask
                        )
                    else:
                        q_tile, grad_tile = geometry.load_pair(
                            q_source, grad_source, batch, head, view_rows, row, residue, (start * rate).to(tl.int64),
                            q_mask, grad_mask, VIEW,
                        )  # fmt: skip
                    if VIEW == _POINTERS or rest:
                        at = lse_at + (start + m) * rate
                        row_lse = softmax.load_lse(lse + at, inside)
                        row_delta = tl.load(delta + at, mask=inside, other=0.0)
                    else:
                        column = segment * terms_slots + start
                        row_lse = terms.load([terms_row, column]).reshape(BM)
                        row_delta = terms.load([num_batches * num_heads + terms_row, column]).reshape(BM)
                    # Transposed logits: [BN, D] x [D, BM] -> [BN, BM], so that P and dS need no transpose below.
                    s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                    # Early, the product runs while the exponentials are taken, at the price of registers.
                    if EARLY:
                        # dP^T = V dO^T: [BN, D] x [D, BM] -> [BN, BM].
                        dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
                    p = tl.math.exp2(s * qk_scale - row_lse[None, :])
                    if KEY_MASK:
                        p = tl.where(shown[:, None], p, 0.0)
                    if CAUSAL:
                        if start < split:
                            p = tl.where(slots[:, None] <= start + m[None, :], p, 0.0)
                    if JOINED:
                        p = tl.where(geometry.same_segment(slots[:, None], start + m[None, :], slots_each), p, 0.0)
                    # dV takes the weights that dropout kept, dS those before it.
                    kept_p = p
                    if DROPOUT:
                        state = geometry.row_hash(seed, sequence, head, branch, out_base + (start + m) * rate)
                        kept = geometry.pairs_kept(state[None, :], k_pos[:, None], threshold)
                        kept_p = tl.where(kept, p * keep_scale, 0.0)
                    # dV += P^T dO: [BN, BM] x [BM, D] -> [BN, D].
                    acc_v = tl.dot(kept_p.to(grad_tile.dtype), grad_tile, acc_v, input_precision=PRECISION)
                    if not EARLY:
                        dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
                    if DROPOUT:
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                    # dK += dS^T Q: [BN, BM] x [BM, D] -> [BN, D].
                    ds = p * (dp - row_delta[None, :])
                    acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)

    # Add to what the branches before gave; the gradients lie alike.
    acc_k *= scale
    at = geometry.offsets_of(dk_strides, batch64, kv_head, k_rows, d)
    if not FIRST:
        acc_k += tl.load(dk + at, mask=tile_mask, other=0.0).to(tl.float32)
        acc_v += tl.load(dv + at, mask=tile_mask, other=0.0).to(tl.float32)
    tl.store(dk + at, acc_k.to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=tile_mask)
