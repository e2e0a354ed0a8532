"""One decoding step of a layer: a query per sequence over all branches, split over keys; then a merge.

A branch that takes part at position n has n itself as a member, so that its keys are n - r * t for t = 0, 1, ... back
to the start of its segment; a head's offset decides only *whether* the branch takes part. A key at distance d counts
once for every branch that takes part, reaches back to d and whose rate divides d. The densest of them reads it, with
log2 of that count added to its logit (docs/design.md, D37).

Positions are read from the device and the grid is the same at every position, so that a CUDA graph can replay the step.
Split 0 rotates the new key, keeps it in registers and writes it to the buffer; it lands on a row that is out of sight,
so no split waits for another. The buffer is that of `kernels.decode_layout`.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import geometry


@triton.jit
def reaches_at(
    position, kv_head, num_kv_heads, LENGTHS: tl.constexpr, RATES: tl.constexpr, SHIFT: tl.constexpr,
    MODULO: tl.constexpr,
):  # fmt: skip
    """How far back each branch sees: a distance, -1 where the head takes no part."""
    reaches = ()
    for i in tl.static_range(len(RATES)):
        place = (position + SHIFT) % LENGTHS[i]
        member = place % RATES[i] == geometry.head_offset(kv_head, RATES[i], num_kv_heads, MODULO)
        # A first segment that the shift has cut begins at position 0.
        reaches = reaches + (tl.where(member, tl.minimum(place, position), -1).to(tl.int32),)
    return reaches


@triton.jit
def steps_of(reaches, RATES: tl.constexpr, BN: tl.constexpr):
    """For each branch its first step back that no denser branch has read, and the tile it ends before; all tiles."""
    total = 0
    firsts = ()
    ends = ()
    for i in tl.static_range(len(RATES)):
        # Step 0 is the new key.
        first = 1
        for j in tl.static_range(i):
            if RATES[i] % RATES[j] == 0:
                first = tl.maximum(first, reaches[j] // RATES[i] + 1)
        total += tl.maximum(tl.cdiv(reaches[i] // RATES[i] - first + 1, BN), 0)
        firsts = firsts + (first,)
        ends = ends + (total,)
    return firsts, ends, total


@triton.jit
def load_turned(x, d, mask, cos, sin, batch, D: tl.constexpr, ROTARY: tl.constexpr):
    """Rows `[.., BLOCK_D]`, rotated: pairs are channels d and d + D / 2. cos and sin are tables `[B, D / 2]`."""
    rows = tl.load(x + d, mask=mask, other=0.0)
    if ROTARY:
        other = tl.load(x + (d + D // 2) % D, mask=mask, other=0.0)
        sign = tl.where(d < D // 2, -1.0, 1.0)
        at = batch * (D // 2) + d % (D // 2)
        c = tl.load(cos + at)
        s = tl.load(sin + at)
        rows = (rows.to(tl.float32) * c + sign * other.to(tl.float32) * s).to(rows.dtype)
    return rows


@triton.jit
def decode_split(
    q, k, v, q_cos, q_sin, k_cos, k_sin, keys, values, positions, part, part_lse,
    q_row, k_row, v_row, cache_batch, cache_head, qk_scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, BASES: tl.constexpr, RING: tl.constexpr, SHIFT: tl.constexpr,
    MODULO: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, ROTARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of one split: part `[B, H, SPLITS, D]` and its lse, in units of log2. RING is 0 for compact buffers."""
    batch = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    split = tl.program_id(1)
    position = tl.load(positions + batch)
    reaches = reaches_at(position, kv_head, NUM_KV_HEADS, LENGTHS, RATES, SHIFT, MODULO)
    firsts, ends, total = steps_of(reaches, RATES, BN)
    share = tl.cdiv(total, SPLITS)
    first_tile = split * share
    last_tile = tl.minimum(first_tile + share, total)

    # The queries of the heads that share a key head: [BLOCK_G, BLOCK_D].
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    q_at = q + batch * q_row + (kv_head * GROUP + g)[:, None] * D
    q_mask = (g < GROUP)[:, None] & inside[None, :]
    q_tile = load_turned(q_at, d[None, :], q_mask, q_cos, q_sin, batch, D, ROTARY)

    m = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    cache = batch * cache_batch + kv_head.to(tl.int64) * cache_head
    if split == 0:
        # The new key and value [BLOCK_D]: seen by the query itself, and written for later ones.
        k_new = load_turned(k + batch * k_row + kv_head * D, d, inside, k_cos, k_sin, batch, D, ROTARY)
        v_new = tl.load(v + batch * v_row + kv_head * D + d, mask=inside, other=0.0)
        times = 0
        for i in tl.static_range(len(RATES)):
            takes_part = reaches[i] >= 0
            times += takes_part.to(tl.int32)
            if RING == 0:
                at = cache + (BASES[i] + (position + SHIFT) % LENGTHS[i] // RATES[i]) * D + d
                tl.store(keys + at, k_new, mask=inside & takes_part)
                tl.store(values + at, v_new, mask=inside & takes_part)
        if RING > 0:
            at = cache + position % RING * D + d
            tl.store(keys + at, k_new, mask=inside)
            tl.store(values + at, v_new, mask=inside)
        if times > 0:
            s = tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * qk_scale
            m = s + tl.math.log2(tl.maximum(times, 1).to(tl.float32))
            l = tl.full((BLOCK_G,), 1.0, tl.float32)
            acc += v_new.to(tl.float32)[None, :]

    # Its tiles of earlier keys, branch by branch.
    begin = 0
    for i in tl.static_range(len(RATES)):
        for tile in tl.range(tl.maximum(begin, first_tile), tl.minimum(ends[i], last_tile)):
            step = firsts[i] + (tile - begin) * BN + tl.arange(0, BN)
            distance = step * RATES[i]
            mine = distance <= reaches[i]
            times = tl.zeros((BN,), tl.int32)
            for j in tl.static_range(len(RATES)):
                shown = (distance <= reaches[j]) & (distance % RATES[j] == 0)
                times += shown.to(tl.int32)
                # Where rates do not divide, single keys have been read by the denser branch.
                if j < i and RATES[i] % RATES[j] != 0:
                    mine = mine & (shown == 0)
            if RING == 0:
                slot = BASES[i] + ((position + SHIFT) % LENGTHS[i]).to(tl.int32) // RATES[i] - step
            else:
                slot = (position % RING).to(tl.int32) - distance
                slot = tl.where(slot < 0, slot + RING, slot)
            at = cache + slot.to(tl.int64)[:, None] * D + d[None, :]
            wanted = mine[:, None] & inside[None, :]
            k_tile = tl.load(keys + at, mask=wanted, other=0.0)
            v_tile = tl.load(values + at, mask=wanted, other=0.0)
            # Logits: [BLOCK_G, D] x [D, BN] -> [BLOCK_G, BN].
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * qk_scale
            weight = tl.where(mine, tl.math.log2(tl.maximum(times, 1).to(tl.float32)), -float("inf"))
            s += weight[None, :]
            m_new = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.math.exp2(m - safe)
            p = tl.math.exp2(s - safe[:, None])
            l = l * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        begin = ends[i]

    heads = (batch * NUM_KV_HEADS + kv_head) * GROUP + g
    empty = l == 0.0
    at = heads * SPLITS + split
    tl.store(part_lse + at, tl.where(empty, -float("inf"), m + tl.math.log2(tl.where(empty, 1.0, l))), mask=g < GROUP)
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    tl.store(part + at[:, None] * D + d[None, :], acc, mask=q_mask)


@triton.jit
def decode_merge(
    part, part_lse, out, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """out `[B, H, D]` of the splits' shares; 0 where no key is seen."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse + row * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    top = tl.max(lse, 0)
    weight = tl.math.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    # What an empty split left behind is never read.
    used = (lse > -float("inf"))[:, None] & (d < D)[None, :]
    shares = tl.load(part + (row * SPLITS + split)[:, None] * D + d[None, :], mask=used, other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(shares * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * D + d, merged.to(out.dtype.element_ty), mask=d < D)
