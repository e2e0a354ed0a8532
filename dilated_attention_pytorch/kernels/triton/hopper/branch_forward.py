"""The forward of one branch: `attention.branch_forward`'s twin for Hopper, where a call has no masks.

A tile of 128 or 192 slots of one segment walks the segment's keys, from the (out, lse) of the branches before on. Rows
past a segment's end are another segment's: as keys they are masked, as queries not written.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dilated_attention_pytorch.kernels.triton.hopper import branch_tiles, stages


@gluon.jit
def _produce(
    work, CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr, PINGPONG: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """The producer: a warp."""
    views, smem, bars, _, strides, num_tiles, sizes, _ = work
    q_views, k_views, v_views = views
    q_strides, k_strides, v_strides = strides
    q_smem, k_smem, _ = smem
    GROUPS: gl.constexpr = q_smem.shape[0]
    HM: gl.constexpr = q_smem.shape[1]
    ROWS: gl.constexpr = GROUPS * HM
    BN: gl.constexpr = k_smem.shape[1]
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head, kv_head, _segment, base, slots, first = branch_tiles.tile_of(tile, sizes, False, MODULO, ROWS)
        if first < slots:
            row, residue, is_longer = branch_tiles.rows_from(base, sizes)
            place = branch_tiles.place_of(q_strides, batch, residue, head)
            for w in gl.static_range(GROUPS):
                stages.fill_queries(w, turn, q_views, is_longer, place, row + first + w * HM, smem, bars)
            # Its keys: [BN, D] a block.
            k_place = branch_tiles.place_of(k_strides, batch, residue, kv_head)
            v_place = branch_tiles.place_of(v_strides, batch, residue, kv_head)
            end = branch_tiles.blocks_of(slots, BN)
            # The block that is masked first: at the diagonal's start, where every row sees a key, or that the segment's
            # end cuts.
            begun = end - 1
            if CAUSAL:
                begun = first // BN
                end = gl.minimum(end, branch_tiles.blocks_up_to(first, ROWS, BN))
            it = stages.fill(it, k_views, v_views, is_longer, k_place, v_place, row + begun * BN, smem, bars)
            for block in range(0, begun):
                it = stages.fill(it, k_views, v_views, is_longer, k_place, v_place, row + block * BN, smem, bars)
            if CAUSAL:
                for block in range(begun + 1, end):
                    it = stages.fill(it, k_views, v_views, is_longer, k_place, v_place, row + block * BN, smem, bars)
            turn += 1


@gluon.jit
def _consume(
    work, CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr, PINGPONG: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """A warpgroup, for its rows of each tile."""
    _, smem, bars, results, _, num_tiles, sizes, qk_scale = work
    q_smem, k_smem, _ = smem
    q_full, q_empty, _, _, _, _, _ = bars
    GROUPS: gl.constexpr = q_smem.shape[0]
    HM: gl.constexpr = q_smem.shape[1]
    ROWS: gl.constexpr = GROUPS * HM
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    S: gl.constexpr = stages.layout_of(BN)
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head, _kv_head, _segment, base, slots, first = branch_tiles.tile_of(tile, sizes, False, MODULO, ROWS)
        if first < slots:
            own = first + WHICH * HM
            # Blocks that the tile meets; stages count arrivals of all groups, so each lets go of what it does not take.
            met = branch_tiles.blocks_of(slots, BN)
            if CAUSAL:
                met = gl.minimum(met, branch_tiles.blocks_up_to(first, ROWS, BN))
            end = it + met
            mbarrier.wait(q_full.index(WHICH), turn & 1)
            if own < slots:
                q = q_smem.index(WHICH)
                # Of the branches before.
                before = None
                if ADD:
                    lse_at, lse_inside, out_at, inside = _places(
                        results, batch, head, base, own, slots, sizes, HM, D, S, WIDTH
                    )
                    lse_before = gl.load(lse_at, mask=lse_inside, other=0.0) * stages.LOG2E
                    before = lse_before, gl.load(out_at, mask=inside, other=0.0)
                # Of the masked blocks, the last column that counts.
                begun = met - 1
                edge = slots - 1
                if CAUSAL:
                    begun = first // BN
                    edge = gl.expand_dims(own + gl.arange(0, HM, gl.SliceLayout(1, S)), 1)
                last = edge - begun * BN
                state = stages.first_step(it, q, 0.0, last, qk_scale, smem, bars, True, WHICH, PINGPONG, WIDTH, before)
                for _block in range(0, begun):
                    state = stages.step(state, q, 0.0, 0, -1, qk_scale, smem, bars, False, WHICH, PINGPONG, WIDTH)
                if CAUSAL:
                    for block in range(begun + 1, gl.minimum((own + HM - 1) // BN + 1, met)):
                        last = edge - block * BN
                        state = stages.step(state, q, 0.0, last, -1, qk_scale, smem, bars, True, WHICH, PINGPONG, WIDTH)
                mbarrier.arrive(q_empty.index(WHICH), count=1)
                it, acc, row_lse = stages.finish(state, smem, bars)
                it = stages.skip(it, end - it, smem, bars, WHICH, PINGPONG)
                # For a first branch not above the steps, where it would spill; for the others the compiler has it
                # there.
                lse_at, lse_inside, out_at, inside = _places(
                    results, batch, head, base, own, slots, sizes, HM, D, S, WIDTH
                )
                gl.store(lse_at, row_lse, mask=lse_inside)
                gl.store(out_at, acc.to(q_smem.dtype), mask=inside)
            else:
                mbarrier.arrive(q_empty.index(WHICH), count=1)
                it = stages.skip(it, end - it, smem, bars, WHICH, PINGPONG)
            turn += 1


@gluon.jit
def _places(
    results, batch, head, base, own, slots, sizes, HM: gl.constexpr, D: gl.constexpr, S: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """Where a half's rows are in lse (B, H, N) and out (B, N, H, D), both contiguous, and which of them are."""
    out, lse = results
    _, num_heads, _, _, _, _, rate, num_rows = sizes
    A: gl.constexpr = stages.layout_of(D)
    batch64 = batch.to(gl.int64)
    # lse lies as the logits' rows do, out as the accumulator's.
    lse_slots = own + gl.arange(0, HM, gl.SliceLayout(1, S))
    lse_at = lse + (batch64 * num_heads + head) * num_rows + base + lse_slots * rate
    out_slots = own + gl.arange(0, HM, gl.SliceLayout(1, A))
    columns = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, A)), 0)
    out_at = out + (batch64 * num_rows * num_heads + head) * WIDTH
    out_at += gl.expand_dims((base + out_slots * rate).to(gl.int64) * (num_heads * WIDTH), 1) + columns
    inside = gl.expand_dims(out_slots < slots, 1)
    if WIDTH < D:
        inside = inside & (columns < WIDTH)
    return lse_at, lse_slots < slots, out_at, inside


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "group", "num_segments", "tiles_each", "length", "rate", "num_rows", "num_batches",
    ],
)  # fmt: skip
def hopper_branch_forward(
    q, q_longer, k, k_longer, v, v_longer, out, lse, q_strides, k_strides, v_strides,
    num_tiles, num_batches, num_heads, group, num_segments, tiles_each, length, rate, num_rows, qk_scale,
    CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """out and lse of one branch; with ADD, merged into what is there.

    Args:
        q, q_longer, ..: views (`views.unit_views`), whose units the strides count in.
        group: query heads per key head.
        tiles_each: tiles of a segment.
        WIDTH: columns of the tensors; a view's blocks have zeros beyond.
    """
    smem, bars = stages.allocate(q, k, STAGES, GROUPS)
    views = (q, q_longer), (k, k_longer), (v, v_longer)
    strides = q_strides, k_strides, v_strides
    sizes = num_batches, num_heads, group, num_segments, tiles_each, length, rate, num_rows
    work = views, smem, bars, (out, lse), strides, num_tiles, sizes, qk_scale
    # Warpgroups, of which the first is the kernel's own warps, and one warp that loads; the registers of the others.
    if GROUPS == 3:
        gl.warp_specialize([
            (_consume, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 0)),
            (_consume, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 1)),
            (_consume, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 2)),
            (_produce, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 0)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 0)),
            (_consume, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 1)),
            (_produce, (work, CAUSAL, MODULO, WIDTH, ADD, PINGPONG, 0)),
        ], [4, 1], [240, 24])  # fmt: skip
