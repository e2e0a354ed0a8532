"""The fast kernels: all branches in one launch, free of masks inside, for lengths that align.

R is the least common multiple of the rates. A tile is BLOCK rows at stride R, `base + c + R * t`: its residue c decides
for every branch alike whether the whole tile belongs to it, and where each w is a multiple of BLOCK * R (or covers the
sequence) the whole tile lies in one segment. So all of its rows see the same keys, and the walk over the keys of all
branches is one dense loop with one accumulator and one write. Where every w covers the sequence, queries and keys may
differ in number, as rows that arrive from other ranks do.

The keys of a branch of rate r are the residues o, o + r, o + 2r, ... below R; each is a run of rows at stride R, so
that all branches read K through one view `[N / R, R * row]`, where (residue, head) is a column. Order does not matter
to a softmax without a diagonal.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton.attention import finish, softmax_step
from dilated_attention_pytorch.kernels.triton.attention_backward import load_lse
from dilated_attention_pytorch.kernels.triton.geometry import head_offset

_NEVER = tl.constexpr(2147483647)
_RUNTIME = ["num_queries", "num_keys", "view_rows", "num_heads", "num_kv_heads", "num_batches", "num_tiles"]


@triton.jit
def walk(
    position, residue, kv_head, num_kv_heads, reach,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, MODULO: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """The branches that a tile at a position with a residue belongs to, and their keys before position reach.

    ONCE: a branch's keys are those of its segment outside the segment of the last shorter branch that the tile belongs
    to, a ring; lengths ascend and nest, and each rate divides the next, so that a ring's keys are residues of its
    branch alone. Otherwise a branch's keys are all of its segment's, and the ring has no hole.

    Returns:
        number of steps of the walk; for each branch the step it begins at, its segment's first row in the view, the row
        at which its hole begins, the rows of the hole, and its first residue (-1 where the tile does not belong).
    """
    total = 0
    begins = ()
    rows = ()
    holes = ()
    jumps = ()
    offsets = ()
    hole = 0
    hole_end = 0
    for i in tl.static_range(len(RATES)):
        offset = head_offset(kv_head, RATES[i], num_kv_heads, MODULO)
        start = position // LENGTHS[i] * LENGTHS[i]
        end = start + tl.minimum(reach - start, LENGTHS[i])
        member = residue % RATES[i] == offset
        if i == 0 or not ONCE:
            hole = start
            hole_end = start
        # Whole tiles lie before the hole, and whole ones but for the sequence's last behind it.
        blocks = (hole - start) // (R * BLOCK) + tl.cdiv(tl.cdiv(end - hole_end, R), BLOCK)
        begins = begins + (tl.where(member, total, _NEVER),)
        rows = rows + (start // R,)
        holes = holes + (hole // R,)
        jumps = jumps + ((hole_end - hole) // R,)
        offsets = offsets + (tl.where(member, offset, -1),)
        total += tl.where(member, blocks * (R // RATES[i]), 0)
        if ONCE:
            hole = tl.where(member, start, hole)
            hole_end = tl.where(member, end, hole_end)
    return total, begins, rows, holes, jumps, offsets


@triton.jit
def walk_step(
    step, begins, rows, holes, jumps, offsets,
    RATES: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """First row (in the view) and residue of the tile that a step of the walk takes, and log2 of how many branches show
    it: a key that m branches show has weight m * exp(s), which is m's logarithm added to the logit."""
    row = rows[0]
    residue = offsets[0]
    ring = 0
    for i in tl.static_range(len(RATES)):
        local = step - begins[i]
        reached = local >= 0
        count = local.to(tl.uint32)  # unsigned division by a power of two is a shift
        here = rows[i] + (count // (R // RATES[i])).to(tl.int32) * BLOCK
        if ONCE and i > 0:
            here += tl.where(here >= holes[i], jumps[i], 0)
        row = tl.where(reached, here, row)
        residue = tl.where(reached, offsets[i] + (count % (R // RATES[i])).to(tl.int32) * RATES[i], residue)
        ring = tl.where(reached, i, ring)
    bias = 0.0
    if ONCE:
        shown = 0
        for i in tl.static_range(len(RATES)):
            shown += tl.where((ring <= i) & (residue % RATES[i] == offsets[i]), 1, 0)
        bias = tl.math.log2(shown.to(tl.float32))
    return row, residue, bias


@triton.jit
def tile_of(pid, num_tiles, num_heads, R: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head, residue, first row) of a program. Programs that share keys follow one another."""
    residue = pid % R
    pid = pid // R
    tile = pid % num_tiles
    pid = pid // num_tiles
    return pid // num_heads, pid % num_heads, residue, tile * BLOCK


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_forward(
    q, k, v, k_view, v_view, out, lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, lse_batch, lse_head,
    num_queries, num_keys, view_rows, num_heads, num_kv_heads, num_tiles, qk_scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, NEGATE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, residue, first = tile_of(tl.program_id(0), num_tiles, num_heads, R, BM)
    reach = num_keys
    if CAUSAL:  # the tiles with most keys first
        first = (num_tiles - 1) * BM - first
        reach = tl.minimum(num_keys, (first + BM) * R)
    kv_head = head // (num_heads // num_kv_heads)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BM)) * R + residue
    inside = positions < num_queries
    rows64 = positions.to(tl.int64)
    q_at = q + batch64 * q_batch + head * q_head + rows64[:, None] * q_row + d[None, :]
    if EVEN and D == BLOCK_D:
        q_tile = tl.load(q_at)
    else:
        q_tile = tl.load(q_at, mask=inside[:, None] & d_mask, other=0.0)
    if NEGATE:
        q_tile = -q_tile
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)

    steps, begins, rows, holes, jumps, offsets = walk(
        first * R, residue, kv_head, num_kv_heads, reach, LENGTHS, RATES, R, BN, MODULO, ONCE
    )
    n = tl.arange(0, BN)
    k_at = k + batch64 * k_batch + kv_head * k_head
    v_at = v + batch64 * v_batch + kv_head * v_head
    k_steps = (n * R).to(tl.int64)[:, None] * k_row + d[None, :]
    v_steps = (n * R).to(tl.int64)[:, None] * v_row + d[None, :]
    for step in tl.range(0, steps):
        row, k_residue, bias = walk_step(step, begins, rows, holes, jumps, offsets, RATES, R, BN, ONCE)
        position = row * R + k_residue
        if DESCRIPTORS:
            k_tile = k_view.load([batch * view_rows + row, k_residue * k_row + kv_head * k_head])
            v_tile = v_view.load([batch * view_rows + row, k_residue * v_row + kv_head * v_head])
        elif EVEN and D == BLOCK_D:
            k_tile = tl.load(k_at + position.to(tl.int64) * k_row + k_steps)
            v_tile = tl.load(v_at + position.to(tl.int64) * v_row + v_steps)
        else:
            load_mask = (position + n * R < num_keys)[:, None] & d_mask
            k_tile = tl.load(k_at + position.to(tl.int64) * k_row + k_steps, mask=load_mask, other=0.0)
            v_tile = tl.load(v_at + position.to(tl.int64) * v_row + v_steps, mask=load_mask, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if CAUSAL:
            # A tile of slots has a diagonal whatever the residues are. Rows past the end are later than any query.
            if row + BN > first:
                s = tl.where(position + (n * R)[None, :] <= positions[:, None], s, -float("inf"))
        elif not EVEN:
            # Segments other than the sequence's last are whole numbers of tiles.
            if position + (BN - 1) * R >= num_keys:
                s = tl.where((position + n * R < num_keys)[None, :], s, -float("inf"))
        p, acc, m, l = softmax_step(s, acc, m, l, qk_scale, CAUSAL or not EVEN, ONCE, bias)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    result, result_lse = finish(acc, m, l)
    out_at = out + batch64 * out_batch + head * out_head + rows64[:, None] * out_row + d[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside[:, None] & d_mask)
    tl.store(lse + batch64 * lse_batch + head * lse_head + rows64, result_lse, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_backward_dq(
    q, k, v, k_view, v_view, out, grad_out, lse, grad_lse, row_terms, dq,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    grad_batch, grad_row, grad_head, dq_batch, dq_row, dq_head, lse_batch, lse_head,
    num_queries, num_keys, view_rows, terms_row, num_heads, num_kv_heads, num_tiles, qk_scale, scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, GRAD_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and on the way the two terms of each row that the dK/dV pass needs.

    They go to row_terms `[2, B * H * R, rows]`: the lse in units of log2 (+inf where there is no row) and delta, laid
    out as the tiles of that pass read them.
    """
    batch, head, residue, first = tile_of(tl.program_id(0), num_tiles, num_heads, R, BM)
    kv_head = head // (num_heads // num_kv_heads)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BM)) * R + residue
    inside = positions < num_queries
    tile_mask = inside[:, None] & d_mask
    rows64 = positions.to(tl.int64)
    q_tile = tl.load(
        q + batch64 * q_batch + head * q_head + rows64[:, None] * q_row + d[None, :], mask=tile_mask, other=0.0
    )
    grad_at = grad_out + batch64 * grad_batch + head * grad_head + rows64[:, None] * grad_row + d[None, :]
    grad_tile = tl.load(grad_at, mask=tile_mask, other=0.0)
    out_at = out + batch64 * out_batch + head * out_head + rows64[:, None] * out_row + d[None, :]
    out_tile = tl.load(out_at, mask=tile_mask, other=0.0)
    lse_at = batch64 * lse_batch + head * lse_head + rows64
    row_lse = load_lse(lse + lse_at, inside)
    row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if GRAD_LSE:
        row_delta -= tl.load(grad_lse + lse_at, mask=inside, other=0.0)
    terms = ((batch64 * num_heads + head) * R + residue) * terms_row + first + tl.arange(0, BM)
    tl.store(row_terms + terms, row_lse)
    tl.store(row_terms + terms + tl.num_programs(0).to(tl.int64) * BM, row_delta)

    steps, begins, rows, holes, jumps, offsets = walk(
        first * R, residue, kv_head, num_kv_heads, num_keys, LENGTHS, RATES, R, BN, MODULO, ONCE
    )
    n = tl.arange(0, BN)
    k_at = k + batch64 * k_batch + kv_head * k_head
    v_at = v + batch64 * v_batch + kv_head * v_head
    k_steps = (n * R).to(tl.int64)[:, None] * k_row + d[None, :]
    v_steps = (n * R).to(tl.int64)[:, None] * v_row + d[None, :]
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    for step in tl.range(0, steps):
        row, k_residue, bias = walk_step(step, begins, rows, holes, jumps, offsets, RATES, R, BN, ONCE)
        position = row * R + k_residue
        if DESCRIPTORS:
            k_tile = k_view.load([batch * view_rows + row, k_residue * k_row + kv_head * k_head])
            v_tile = v_view.load([batch * view_rows + row, k_residue * v_row + kv_head * v_head])
        elif EVEN and D == BLOCK_D:
            k_tile = tl.load(k_at + position.to(tl.int64) * k_row + k_steps)
            v_tile = tl.load(v_at + position.to(tl.int64) * v_row + v_steps)
        else:
            load_mask = (position + n * R < num_keys)[:, None] & d_mask
            k_tile = tl.load(k_at + position.to(tl.int64) * k_row + k_steps, mask=load_mask, other=0.0)
            v_tile = tl.load(v_at + position.to(tl.int64) * v_row + v_steps, mask=load_mask, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        p = tl.math.exp2(s * qk_scale - (row_lse - bias)[:, None])
        if not EVEN:
            if position + (BN - 1) * R >= num_keys:
                p = tl.where((position + n * R < num_keys)[None, :], p, 0.0)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    dq_at = dq + batch64 * dq_batch + head * dq_head + rows64[:, None] * dq_row + d[None, :]
    tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_backward_dkv(
    q, k, v, q_view, grad_view, grad_out, row_terms, dk, dv,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dk_batch, dk_row, dk_head,
    num_queries, num_keys, view_rows, num_batches, num_heads, num_kv_heads, num_tiles, qk_scale, scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EARLY: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: a tile of keys walks the queries of its branches, which are the same positions that it would see."""
    batch, kv_head, residue, first = tile_of(tl.program_id(0), num_tiles, num_kv_heads, R, BN)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BN)) * R + residue
    tile_mask = (positions < num_keys)[:, None] & d_mask
    rows64 = positions.to(tl.int64)
    k_tile = tl.load(
        k + batch64 * k_batch + kv_head * k_head + rows64[:, None] * k_row + d[None, :], mask=tile_mask, other=0.0
    )
    v_tile = tl.load(
        v + batch64 * v_batch + kv_head * v_head + rows64[:, None] * v_row + d[None, :], mask=tile_mask, other=0.0
    )

    steps, begins, rows, holes, jumps, offsets = walk(
        first * R, residue, kv_head, num_kv_heads, num_queries, LENGTHS, RATES, R, BM, MODULO, ONCE
    )
    m = tl.arange(0, BM)
    q_steps = (m * R).to(tl.int64)[:, None] * q_row + d[None, :]
    grad_steps = (m * R).to(tl.int64)[:, None] * grad_row + d[None, :]
    acc_k = tl.zeros((BN, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BN, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_at = q + batch64 * q_batch + head * q_head
        grad_at = grad_out + batch64 * grad_batch + head * grad_head
        for step in tl.range(0, steps):
            row, q_residue, bias = walk_step(step, begins, rows, holes, jumps, offsets, RATES, R, BM, ONCE)
            position = row * R + q_residue
            if DESCRIPTORS:
                q_tile = q_view.load([batch * view_rows + row, q_residue * q_row + head * q_head])
                grad_tile = grad_view.load([batch * view_rows + row, q_residue * grad_row + head * grad_head])
            elif EVEN and D == BLOCK_D:
                q_tile = tl.load(q_at + position.to(tl.int64) * q_row + q_steps)
                grad_tile = tl.load(grad_at + position.to(tl.int64) * grad_row + grad_steps)
            else:
                load_mask = (position + m * R < num_queries)[:, None] & d_mask
                q_tile = tl.load(q_at + position.to(tl.int64) * q_row + q_steps, mask=load_mask, other=0.0)
                grad_tile = tl.load(grad_at + position.to(tl.int64) * grad_row + grad_steps, mask=load_mask, other=0.0)
            # A row past the end has lse +inf, so its weights vanish: no other mask is needed.
            row_at = (batch * num_heads + head) * R + q_residue
            row_lse = row_terms.load([row_at, row]).reshape(BM)
            row_delta = row_terms.load([num_batches * num_heads * R + row_at, row]).reshape(BM)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            if EARLY:  # the product runs while the exponentials are taken, at the price of registers
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            p = tl.math.exp2(s * qk_scale - (row_lse - bias)[None, :])
            acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision=PRECISION)
            if not EARLY:
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            ds = p * (dp - row_delta[None, :])
            acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)

    at = batch64 * dk_batch + kv_head * dk_head + rows64[:, None] * dk_row + d[None, :]
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=tile_mask)
