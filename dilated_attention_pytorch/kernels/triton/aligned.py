"""The fast kernels: all branches in one launch, free of masks inside, for lengths that align.

R is the least common multiple of the rates. A tile is BLOCK rows at stride R, `base + c + R * t`: its residue c decides
for every branch alike whether the whole tile belongs to it, and where each w is a multiple of BLOCK * R (or covers the
sequence) the whole tile lies in one segment. So all of its rows see the same keys, and the walk over the keys of all
branches is one dense loop with one accumulator and one write. Where segments nest, a key that several branches show is
taken once (docs/design.md, D37). Where every w covers the sequence, queries and keys may differ in number, as rows that
arrive from other ranks do.

The keys of a branch of rate r are the residues o, o + r, o + 2r, ... below R; each is a run of rows at stride R, so
that all branches read K through one view `[N / R, R * row]`, where (residue, head) is a column. Order does not matter
to a softmax without a diagonal.
"""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import geometry, softmax

# A step that no walk reaches.
_NEVER = tl.constexpr(2147483647)
_RUNTIME = ["num_queries", "num_keys", "view_rows", "num_heads", "num_kv_heads", "num_batches", "num_tiles"]


@triton.jit
def walk(
    position, residue, kv_head, num_kv_heads, reach,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, MODULO: tl.constexpr,
    ONCE: tl.constexpr, AFTER: tl.constexpr = False,
):  # fmt: skip
    """The branches that a tile at a position with a residue belongs to, and their keys before position reach; with
    AFTER, those from the tile on.

    With ONCE a branch's keys are a ring: those of its segment outside the segment of the last shorter branch that the
    tile belongs to. Lengths ascend and nest and each rate divides the next, so that all keys of a ring are residues of
    its own branch. Without, a branch's keys are all of its segment's, and rings have no hole.

    Returns:
        number of steps of the walk, and for each branch: the step it begins at, the first row of its segment in the
        view, the row at which its hole begins, the rows of the hole, its first residue (-1 for no member).
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
        offset = geometry.head_offset(kv_head, RATES[i], num_kv_heads, MODULO)
        start = position // LENGTHS[i] * LENGTHS[i]
        end = start + tl.minimum(reach - start, LENGTHS[i])
        member = residue % RATES[i] == offset
        if i == 0 or not ONCE:
            hole = start
            hole_end = start
        # Behind the tile a ring is what follows its hole, and the innermost one what follows the tile itself.
        first = start
        gap = hole
        gap_end = hole_end
        if AFTER:
            first = tl.maximum(position // (R * BLOCK) * (R * BLOCK), hole_end)
            gap = first
            gap_end = first
        # Tiles per residue: whole ones before the hole; behind it the sequence's last may be cut.
        tiles = (gap - first) // (R * BLOCK) + tl.cdiv(tl.cdiv(end - gap_end, R), BLOCK)
        begins = begins + (tl.where(member, total, _NEVER),)
        rows = rows + (first // R,)
        holes = holes + (gap // R,)
        jumps = jumps + ((gap_end - gap) // R,)
        offsets = offsets + (tl.where(member, offset, -1),)
        # The branch keeps R / r residues.
        total += tl.where(member, tiles * (R // RATES[i]), 0)
        # What the tile does not belong to leaves no hole.
        if ONCE:
            hole = tl.where(member, start, hole)
            hole_end = tl.where(member, end, hole_end)
    return total, (begins, rows, holes, jumps, offsets)


@triton.jit
def walk_step(step, rings, RATES: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """First row (in the view) and residue of the tile that a step of the walk takes, and log2 of its multiplicity.

    A key that m branches show has weight m * exp(s): log(m) is added to its logit. All keys of a tile lie in one ring
    and have one residue, so m is one number: the branches of this ring and the longer ones that keep the residue.
    """
    begins, rows, holes, jumps, offsets = rings
    row = rows[0]
    residue = offsets[0]
    ring = 0
    for i in tl.static_range(len(RATES)):
        # The last branch that has begun wins; one that the tile does not belong to never begins.
        local = step - begins[i]
        reached = local >= 0
        # Unsigned division by a power of two is a shift.
        count = local.to(tl.uint32)
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
def tile_of(num_tiles, num_heads, R: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head, residue, first row) of a program. Programs that share keys follow one another."""
    pid = tl.program_id(0)
    residue = pid % R
    pid = pid // R
    tile = pid % num_tiles
    pid = pid // num_tiles
    return pid // num_heads, pid % num_heads, residue, tile * BLOCK


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_forward(
    q, k, v, k_view, v_view, out, lse, q_strides, k_strides, v_strides, out_strides, lse_batch, lse_head,
    num_queries, num_keys, view_rows, num_heads, num_kv_heads, num_tiles, qk_scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, NEGATE: tl.constexpr,
    VIEW: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse: a tile of queries walks the keys of its branches."""
    # No row and no column of any tile has to be masked.
    WHOLE: tl.constexpr = EVEN and D == BLOCK_D

    # The queries' tile: [BM, D].
    batch, head, residue, first = tile_of(num_tiles, num_heads, R, BM)
    reach = num_keys
    # The tiles with most keys first: the short ones fill the gaps at the launch's end.
    if CAUSAL:
        first = (num_tiles - 1) * BM - first
        reach = tl.minimum(num_keys, (first + BM) * R)
    kv_head = head // (num_heads // num_kv_heads)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BM)) * R + residue
    inside = positions < num_queries
    rows64 = positions.to(tl.int64)
    q_at = geometry.rows_at(q, q_strides, batch64, head, rows64, d)
    tile_mask = inside[:, None] & d_mask
    q_tile = tl.load(q_at) if WHOLE else tl.load(q_at, mask=tile_mask, other=0.0)
    # `softmax.step` scales the maximum after it was taken, which a negative scale would turn into a minimum.
    if NEGATE:
        q_tile = -q_tile

    # Walk the keys of all its branches.
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    steps, rings = walk(first * R, residue, kv_head, num_kv_heads, reach, LENGTHS, RATES, R, BN, MODULO, ONCE)
    n = tl.arange(0, BN)
    k_at, v_at = geometry.head_at(k, k_strides, batch64, kv_head), geometry.head_at(v, v_strides, batch64, kv_head)
    k_source = k_view, k_at, geometry.steps_to(k_strides, R, d, BN), k_strides
    v_source = v_view, v_at, geometry.steps_to(v_strides, R, d, BN), v_strides
    for step in tl.range(0, steps):
        row, k_residue, bias = walk_step(step, rings, RATES, R, BN, ONCE)
        position = row * R + k_residue
        load_mask = None if WHOLE else (position + n * R < num_keys)[:, None] & d_mask
        k_tile, v_tile = geometry.load_pair(
            k_source, v_source, batch, kv_head, view_rows, row, k_residue, position.to(tl.int64), load_mask, load_mask,
            VIEW,
        )  # fmt: skip
        # Logits: [BM, D] x [D, BN] -> [BM, BN].
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if CAUSAL:
            # A tile of slots has a diagonal whatever the residues are. Rows past the end are later than any query.
            if row + BN > first:
                s = tl.where(position + (n * R)[None, :] <= positions[:, None], s, -float("inf"))
        elif not EVEN:
            # Segments other than the sequence's last are whole numbers of tiles.
            if position + (BN - 1) * R >= num_keys:
                s = tl.where((position + n * R < num_keys)[None, :], s, -float("inf"))
        # Softmax online, then P V: [BM, BN] x [BN, D] -> [BM, D].
        p, acc, m, l = softmax.step(s, acc, m, l, qk_scale, CAUSAL or not EVEN, ONCE, bias)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    # Write the rows.
    result, result_lse = softmax.finish(acc, m, l)
    out_at = geometry.rows_at(out, out_strides, batch64, head, rows64, d)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=tile_mask)
    tl.store(lse + batch64 * lse_batch + head * lse_head + rows64, result_lse, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_backward_dq(
    q, k, v, k_view, v_view, out, grad_out, lse, grad_lse, row_terms, dq,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides, lse_batch, lse_head,
    num_queries, num_keys, view_rows, terms_row, num_heads, num_kv_heads, num_tiles, qk_scale, scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, VIEW: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and on the way the two terms of each row that the dK/dV pass needs.

    They go to row_terms `[2, B * H * R, rows]`: the lse in units of log2 (+inf where there is no row) and delta, laid
    out as the tiles of that pass read them.
    """
    # No row and no column of any tile has to be masked.
    WHOLE: tl.constexpr = EVEN and D == BLOCK_D

    # The queries' tile: q, dO and out [BM, D].
    batch, head, residue, first = tile_of(num_tiles, num_heads, R, BM)
    reach = num_keys
    if CAUSAL:
        first = (num_tiles - 1) * BM - first
        reach = tl.minimum(num_keys, (first + BM) * R)
    kv_head = head // (num_heads // num_kv_heads)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BM)) * R + residue
    inside = positions < num_queries
    tile_mask = inside[:, None] & d_mask
    rows64 = positions.to(tl.int64)
    q_tile = geometry.load_rows(q, q_strides, batch64, head, rows64, d, tile_mask)
    grad_tile = geometry.load_rows(grad_out, grad_strides, batch64, head, rows64, d, tile_mask)
    out_tile = geometry.load_rows(out, out_strides, batch64, head, rows64, d, tile_mask)

    # Its rows' lse and delta [BM], also for the dK/dV pass.
    lse_at = batch64 * lse_batch + head * lse_head + rows64
    row_lse = softmax.load_lse(lse + lse_at, inside)
    row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + lse_at, mask=inside, other=0.0)
    # Every row of the buffer is written, also those past the last query: +inf and 0 are what that pass skips them by.
    terms = ((batch64 * num_heads + head) * R + residue) * terms_row + first + tl.arange(0, BM)
    tl.store(row_terms + terms, row_lse)
    tl.store(row_terms + terms + tl.num_programs(0).to(tl.int64) * BM, row_delta)

    # Walk the keys of all its branches.
    steps, rings = walk(first * R, residue, kv_head, num_kv_heads, reach, LENGTHS, RATES, R, BN, MODULO, ONCE)
    n = tl.arange(0, BN)
    k_at, v_at = geometry.head_at(k, k_strides, batch64, kv_head), geometry.head_at(v, v_strides, batch64, kv_head)
    k_source = k_view, k_at, geometry.steps_to(k_strides, R, d, BN), k_strides
    v_source = v_view, v_at, geometry.steps_to(v_strides, R, d, BN), v_strides
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    for step in tl.range(0, steps):
        row, k_residue, bias = walk_step(step, rings, RATES, R, BN, ONCE)
        position = row * R + k_residue
        load_mask = None if WHOLE else (position + n * R < num_keys)[:, None] & d_mask
        k_tile, v_tile = geometry.load_pair(
            k_source, v_source, batch, kv_head, view_rows, row, k_residue, position.to(tl.int64), load_mask, load_mask,
            VIEW,
        )  # fmt: skip
        # Logits: [BM, D] x [D, BN] -> [BM, BN].
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        # dP = dO V^T: [BM, D] x [D, BN] -> [BM, BN].
        dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        # The lse is of all branches: no maximum has to be found, and no weight exceeds 1.
        p = tl.math.exp2(s * qk_scale - (row_lse - bias)[:, None])
        if CAUSAL:
            if row + BN > first:
                p = tl.where(position + (n * R)[None, :] <= positions[:, None], p, 0.0)
        elif not EVEN:
            if position + (BN - 1) * R >= num_keys:
                p = tl.where((position + n * R < num_keys)[None, :], p, 0.0)
        # dQ += dS K: [BM, BN] x [BN, D] -> [BM, D]; scaled once, after the walk.
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    # Write the rows.
    dq_at = geometry.rows_at(dq, dq_strides, batch64, head, rows64, d)
    tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=_RUNTIME)
def aligned_backward_dkv(
    q, k, v, q_view, grad_view, grad_out, row_terms, dk, dv, q_strides, k_strides, v_strides, grad_strides, dk_strides,
    num_queries, num_keys, view_rows, num_batches, num_heads, num_kv_heads, num_tiles, qk_scale, scale,
    LENGTHS: tl.constexpr, RATES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MODULO: tl.constexpr, ONCE: tl.constexpr, GROUP: tl.constexpr,
    VIEW: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: a tile of keys walks the queries of its branches, which are the same positions that it would see."""
    # No row and no column of any tile has to be masked.
    WHOLE: tl.constexpr = EVEN and D == BLOCK_D

    # The keys' tile: k and v [BN, D].
    batch, kv_head, residue, first = tile_of(num_tiles, num_kv_heads, R, BN)
    batch64 = batch.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < D)[None, :]
    positions = (first + tl.arange(0, BN)) * R + residue
    tile_mask = (positions < num_keys)[:, None] & d_mask
    rows64 = positions.to(tl.int64)
    k_tile = geometry.load_rows(k, k_strides, batch64, kv_head, rows64, d, tile_mask)
    v_tile = geometry.load_rows(v, v_strides, batch64, kv_head, rows64, d, tile_mask)

    # Walk the queries of all its branches, for each head that shares the keys.
    steps, rings = walk(
        first * R, residue, kv_head, num_kv_heads, num_queries, LENGTHS, RATES, R, BM, MODULO, ONCE, CAUSAL
    )
    m = tl.arange(0, BM)
    q_steps = geometry.steps_to(q_strides, R, d, BM)
    grad_steps = geometry.steps_to(grad_strides, R, d, BM)
    acc_k = tl.zeros((BN, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BN, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_source = q_view, geometry.head_at(q, q_strides, batch64, head), q_steps, q_strides
        grad_source = grad_view, geometry.head_at(grad_out, grad_strides, batch64, head), grad_steps, grad_strides
        for step in tl.range(0, steps):
            row, q_residue, bias = walk_step(step, rings, RATES, R, BM, ONCE)
            position = row * R + q_residue
            load_mask = None if WHOLE else (position + m * R < num_queries)[:, None] & d_mask
            q_tile, grad_tile = geometry.load_pair(
                q_source, grad_source, batch, head, view_rows, row, q_residue, position.to(tl.int64), load_mask,
                load_mask, VIEW,
            )  # fmt: skip
            # A row past the end has lse +inf, so its weights vanish: no other mask is needed.
            terms_row = (batch * num_heads + head) * R + q_residue
            row_lse = row_terms.load([terms_row, row]).reshape(BM)
            row_delta = row_terms.load([num_batches * num_heads * R + terms_row, row]).reshape(BM)
            # Transposed logits: [BN, D] x [D, BM] -> [BN, BM], so that P and dS need no transpose below.
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            # Early, the product runs while the exponentials are taken, at the price of registers.
            if EARLY:
                # dP^T = V dO^T: [BN, D] x [D, BM] -> [BN, BM].
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            p = tl.math.exp2(s * qk_scale - (row_lse - bias)[None, :])
            if CAUSAL:
                if row < first + BN:
                    p = tl.where(position + (m * R)[None, :] >= positions[:, None], p, 0.0)
            # dV += P^T dO: [BN, BM] x [BM, D] -> [BN, D].
            acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision=PRECISION)
            if not EARLY:
                dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
            # dK += dS^T Q: [BN, BM] x [BM, D] -> [BN, D].
            ds = p * (dp - row_delta[None, :])
            acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)

    # Write the rows; the gradients lie alike.
    at = geometry.offsets_of(dk_strides, batch64, kv_head, rows64, d)
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=tile_mask)
