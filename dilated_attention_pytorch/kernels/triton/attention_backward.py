"""The general backward kernels: delta, then dQ and dK/dV, one branch a launch, deterministic and free of atomics.

Given the lse over all branches, `P = exp(s - lse)` and `dS = P * (dO.v - delta)` hold for every key on its own, with
`delta = rowsum(dO * out) - grad_lse`. So each branch adds its share to dq, dk and dv by itself: a launch reads what
the one before it wrote and writes the sum.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton.attention import RUNTIME
from dilated_attention_pytorch.kernels.triton.geometry import (
    LOG2E,
    absorb,
    head_offset,
    load_tile,
    locate,
    row_hash,
    segment_slots,
)  # fmt: skip

# Launches have one axis: the others of CUDA end at 65,535, which a batch of short sequences or a large rate passes.


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def delta_kernel(
    out, grad_out, grad_lse, delta,
    out_batch, out_row, out_head, grad_batch, grad_row, grad_head, lse_batch, lse_head, num_queries,
    num_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """`rowsum(out * dO) - grad_lse`, fp32."""
    num_tiles = tl.cdiv(num_queries, BM)
    tile, pid = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    head, batch = pid % num_heads, (pid // num_heads).to(tl.int64)
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (rows < num_queries)[:, None] & (d < D)[None, :]
    o = tl.load(out + batch * out_batch + head * out_head + rows[:, None] * out_row + d[None, :], mask, 0.0)
    g = tl.load(grad_out + batch * grad_batch + head * grad_head + rows[:, None] * grad_row + d[None, :], mask, 0.0)
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    at = batch * lse_batch + head * lse_head + rows
    if GRAD_LSE:
        total -= tl.load(grad_lse + at, rows < num_queries, 0.0)
    tl.store(delta + at, total, rows < num_queries)


@triton.jit(do_not_specialize=["num_queries", "rate", "length", "num_sequences"])
def terms_kernel(lse, delta, terms, num_queries, rate, length, num_sequences, BM: tl.constexpr):
    """The lse in units of log2 (+inf where it is -inf) and delta of each row, as `[2, B * H, rate, length]`: the rows
    of one branch's slots side by side. What lies past a residue's last row stays unwritten."""
    num_tiles = tl.cdiv(num_queries, BM)
    tile, sequence = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    inside = rows < num_queries
    at = sequence * num_queries + rows
    to = (sequence * rate + rows % rate) * length + rows // rate
    tl.store(terms + to, load_lse(lse + at, inside), mask=inside)
    to += num_sequences.to(tl.int64) * rate * length
    tl.store(terms + to, tl.load(delta + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def load_lse(at, mask):
    """The lse in units of log2, +inf where the row sees nothing, so that its weights exp2(s - lse) vanish."""
    value = tl.load(at, mask=mask, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value * LOG2E)


@triton.jit(do_not_specialize=RUNTIME)
def branch_backward_dq(
    q, k, v, k_view, v_view, grad_out, lse, delta, dq, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dq_batch, dq_row, dq_head, lse_batch, lse_head, mask_batch,
    num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, ROW_START: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr,
    VIEW: tl.constexpr, EVEN: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head, segment, tile, row_base, q_begin, k_begin, q_count, k_count = locate(
        tl.program_id(0), num_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries, num_keys,
        row_start, cu_seqlens, tile_ends, num_sequences, BM, PACKED, ROW_START, SEARCH_STEPS,
    )  # fmt: skip
    batch = 0 if PACKED else sequence
    kv_head = head // (num_heads // num_kv_heads)
    offset = head_offset(kv_head, rate, num_kv_heads, MODULO)
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, _ = segment_slots(
        segment, False, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    if CAUSAL:
        first = q_lo + (tl.cdiv(q_hi - q_lo, BM) - 1 - tile) * BM
    else:
        first = q_lo + tile * BM
    if (first < q_lo) | (first >= q_real):  # a query of zeros has no row to give a gradient to
        return

    d = tl.arange(0, BLOCK_D)
    d_mask = d[None, :] < D
    slots = first + tl.arange(0, BM)
    real = slots < q_real
    out_pos = out_base + slots * rate
    batch64 = batch.to(tl.int64) if not PACKED else tl.full((), 0, tl.int64)
    q_rows = (row_base + base - q_begin + slots * rate).to(tl.int64)
    out_rows = (row_base + out_pos - q_begin).to(tl.int64)
    tile_mask = real[:, None] & d_mask
    q_tile = tl.load(
        q + batch64 * q_batch + head * q_head + q_rows[:, None] * q_row + d[None, :], mask=tile_mask, other=0.0
    )
    grad_tile = tl.load(
        grad_out + batch64 * grad_batch + head * grad_head + out_rows[:, None] * grad_row + d[None, :],
        mask=tile_mask, other=0.0,
    )  # fmt: skip
    row_lse = load_lse(lse + batch64 * lse_batch + head * lse_head + out_rows, real)
    row_delta = tl.load(delta + batch64 * lse_batch + head * lse_head + out_rows, mask=real, other=0.0)
    if DROPOUT:
        state = row_hash(seed, sequence, head, branch, out_pos)

    end = k_hi
    split = k_lo + (k_hi - k_lo) // BN * BN  # tiles before it need no mask
    if CAUSAL:
        end = tl.minimum(k_hi, tl.minimum(first + BM, q_hi))
        split = tl.minimum(split, k_lo + tl.maximum(first + 1 - k_lo, 0) // BN * BN)
    n = tl.arange(0, BN)
    k_first = (row_base + base - k_begin).to(tl.int64)
    view_row = (base - k_begin) // rate
    residue = (base - k_begin) % rate
    k_at = k + batch64 * k_batch + kv_head * k_head + k_first * k_row
    v_at = v + batch64 * v_batch + kv_head * v_head + k_first * v_row
    k_steps = (n * rate).to(tl.int64)[:, None] * k_row + d[None, :]
    v_steps = (n * rate).to(tl.int64)[:, None] * v_row + d[None, :]
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
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
                dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
                p = tl.math.exp2(s * qk_scale - row_lse[:, None])
                if masked:
                    seen = (start + n < k_hi)[None, :]
                    if CAUSAL:
                        seen = seen & (slots[:, None] >= start + n[None, :])
                    p = tl.where(seen, p, 0.0)
                if KEY_MASK:
                    k_pos = (base + (start + n) * rate - k_begin + k_start).to(tl.int64)
                    shown = tl.load(key_mask + batch64 * mask_batch + k_pos, mask=start + n < k_hi, other=0) != 0
                    p = tl.where(shown[None, :], p, 0.0)
                if DROPOUT:
                    k_pos = base + (start + n) * rate
                    keep = absorb(state[:, None], k_pos[None, :]) >= threshold.to(tl.uint32)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - row_delta[:, None])
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    acc *= scale
    dq_at = dq + batch64 * dq_batch + head * dq_head + q_rows[:, None] * dq_row + d[None, :]
    if not FIRST:
        acc += tl.load(dq_at, mask=tile_mask, other=0.0).to(tl.float32)
    tl.store(dq_at, acc.to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=RUNTIME)
def branch_backward_dkv(
    q, k, v, q_view, grad_view, terms, grad_out, dk, dv, key_mask, row_start, cu_seqlens, tile_ends, seed,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dk_batch, dk_row, dk_head, mask_batch, num_batches, terms_length,
    num_heads, num_kv_heads, num_queries, num_keys, q_start, k_start, length, rate, branch, num_sequences,
    num_segments, num_tiles, view_rows, qk_scale, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, ROW_START: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, ZERO_KEYS: tl.constexpr, FIRST: tl.constexpr,
    VIEW: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, segment, tile, row_base, q_begin, k_begin, q_count, k_count = locate(
        tl.program_id(0), num_kv_heads, num_segments, num_tiles, length, rate, q_start, k_start, num_queries,
        num_keys, row_start, cu_seqlens, tile_ends, num_sequences, BN, PACKED, ROW_START, SEARCH_STEPS,
    )  # fmt: skip
    batch = 0 if PACKED else sequence
    offset = head_offset(kv_head, rate, num_kv_heads, MODULO)
    base, out_base, q_lo, q_hi, q_real, k_lo, k_hi, _ = segment_slots(
        segment, True, length, rate, offset, q_begin, k_begin, q_count, k_count, ZERO_KEYS
    )
    first = k_lo + tile * BN  # when causal, the first tiles have the most queries
    if first >= k_hi:
        return

    d = tl.arange(0, BLOCK_D)
    d_mask = d[None, :] < D
    slots = first + tl.arange(0, BN)
    real = slots < k_hi
    k_pos = base + slots * rate
    batch64 = batch.to(tl.int64) if not PACKED else tl.full((), 0, tl.int64)
    k_at = (row_base + k_pos - k_begin).to(tl.int64)
    tile_mask = real[:, None] & d_mask
    k_tile = tl.load(
        k + batch64 * k_batch + kv_head * k_head + k_at[:, None] * k_row + d[None, :], mask=tile_mask, other=0.0
    )
    v_tile = tl.load(
        v + batch64 * v_batch + kv_head * v_head + k_at[:, None] * v_row + d[None, :], mask=tile_mask, other=0.0
    )
    if KEY_MASK:
        mask_at = key_mask + batch64 * mask_batch + (k_pos - k_begin + k_start).to(tl.int64)
        shown = tl.load(mask_at, mask=real, other=0) != 0

    begin = q_lo
    split = q_lo  # tiles from there on need no causal mask
    if CAUSAL:
        begin = tl.maximum(q_lo, first // BM * BM)
        split = first + BN - 1
    m = tl.arange(0, BM)
    q_first = (row_base + base - q_begin).to(tl.int64)
    out_first = (row_base + out_base - q_begin).to(tl.int64)
    q_steps = (m * rate).to(tl.int64)[:, None] * q_row + d[None, :]
    grad_steps = (m * rate).to(tl.int64)[:, None] * grad_row + d[None, :]
    # The memory row of slot q_lo, which is not negative, as a row and a residue of the views.
    out_row = row_base + out_base - q_begin + q_lo * rate
    view_row = out_row // rate - q_lo
    view_residue = out_row % rate
    acc_k = tl.zeros((BN, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BN, BLOCK_D), tl.float32)
    for member in range(num_heads // num_kv_heads):
        head = kv_head * (num_heads // num_kv_heads) + member
        q_at = q + batch64 * q_batch + head * q_head + q_first * q_row
        grad_at = grad_out + batch64 * grad_batch + head * grad_head + out_first * grad_row
        lse_at = (batch * num_heads + head) * rate + view_residue
        terms_at = lse_at.to(tl.int64) * terms_length + view_row
        delta_at = terms_at + num_batches.to(tl.int64) * num_heads * rate * terms_length
        # A row past the last query has lse +inf: its weights vanish without a mask.
        for start in tl.range(begin, q_hi, BM):
            inside = start + m < q_hi
            if VIEW:
                row = view_row + start
                q_tile = load_tile(q_view, batch, view_rows, row, view_residue, head, q_row, q_head, BM, BLOCK_D, VIEW)
                grad_tile = load_tile(
                    grad_view, batch, view_rows, row, view_residue, head, grad_row, grad_head, BM, BLOCK_D, VIEW
                )
            else:
                hop = (start * rate).to(tl.int64)
                q_mask = (start + m < q_real)[:, None] & d_mask
                q_tile = tl.load(q_at + hop * q_row + q_steps, mask=q_mask, other=0.0)
                grad_mask = inside[:, None] & d_mask
                grad_tile = tl.load(grad_at + hop * grad_row + grad_steps, mask=grad_mask, other=0.0)
            if VIEW == 2:
                row_lse = terms.load([lse_at, row]).reshape(BM)
                row_delta = terms.load([num_batches * num_heads * rate + lse_at, row]).reshape(BM)
            else:
                row_lse = tl.load(terms + terms_at + start + m, mask=inside, other=float("inf"))
                row_delta = tl.load(terms + delta_at + start + m, mask=inside, other=0.0)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            if EARLY:  # the product runs while the exponentials are taken, at the price of registers
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            p = tl.math.exp2(s * qk_scale - row_lse[None, :])
            if KEY_MASK:
                p = tl.where(shown[:, None], p, 0.0)
            if CAUSAL:
                if start < split:
                    p = tl.where(slots[:, None] <= start + m[None, :], p, 0.0)
            kept = p
            if DROPOUT:
                state = row_hash(seed, sequence, head, branch, out_base + (start + m) * rate)
                keep = absorb(state[None, :], k_pos[:, None]) >= threshold.to(tl.uint32)
                kept = tl.where(keep, p * keep_scale, 0.0)
            acc_v = tl.dot(kept.to(grad_tile.dtype), grad_tile, acc_v, input_precision=PRECISION)
            if not EARLY:
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - row_delta[None, :])
            acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)

    acc_k *= scale
    at = batch64 * dk_batch + kv_head * dk_head + k_at[:, None] * dk_row + d[None, :]
    if not FIRST:
        acc_k += tl.load(dk + at, mask=tile_mask, other=0.0).to(tl.float32)
        acc_v += tl.load(dv + at, mask=tile_mask, other=0.0).to(tl.float32)
    tl.store(dk + at, acc_k.to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=tile_mask)
