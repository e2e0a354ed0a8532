"""The forward without a causal mask: `aligned.aligned_forward`'s twin for Hopper, keys once.

A tile is two or three groups of 64 rows, each a warpgroup's, of one segment of the shortest branch, in the order of
their levels: of the tile's blocks a group takes the first, ring by ring, up to its own level's. Where the sequence's
length is no multiple of a block, the last block of each residue is cut off and walked before, masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dilated_attention_pytorch.kernels.triton.hopper import stages, tickets, tiles, walk


@gluon.jit
def _load(context, it, row, residue, multiplicity):
    """Fills a stage with the block that a step of the walk visits."""
    k_views, v_views, k_column, v_column, k_stride, v_stride, remainder, smem, bars = context
    return stages.fill(
        it, k_views, v_views, residue < remainder, k_column + residue * k_stride, v_column + residue * v_stride, row,
        smem, bars,
    )  # fmt: skip


@gluon.jit
def _produce(
    work, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """The producer: a warp."""
    views, smem, bars, _, strides, sizes, _, queue = work
    q_views, k_views, v_views = views
    q_strides, k_strides, v_strides = strides
    num_keys, num_heads, group, num_segments, num_tiles = sizes
    q_smem, k_smem, _ = smem
    R: gl.constexpr = RATES[len(RATES) - 1]
    GROUPS: gl.constexpr = q_smem.shape[0]
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    remainder = num_keys % R
    whole = num_keys // (R * BN) * BN
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    loaded = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, segment, number = tiles.group_tile_at(
            tile, num_tiles, num_segments, num_heads, GROUPS, HM, LENGTHS, RATES
        )
        kv_head = head // group
        if tiles.has_rows(number, kv_head, segment, num_keys, GROUPS, HM, LENGTHS, RATES):
            column = batch * q_strides.batch + head * q_strides.head
            for w in gl.static_range(GROUPS):
                _level, residue, row, _there = tiles.group_at(
                    number + w, kv_head, segment, num_keys, HM, LENGTHS, RATES
                )
                place = column + residue * q_strides.row
                stages.fill_queries(w, loaded, q_views, residue < remainder, place, row, smem, bars)
            # Its keys. Batch and head are the offset of a column, which a step adds its residue to.
            context = (
                k_views, v_views, batch * k_strides.batch + kv_head * k_strides.head,
                batch * v_strides.batch + kv_head * v_strides.head, k_strides.row, v_strides.row, remainder, smem, bars,
            )  # fmt: skip
            start = segment * (LENGTHS[0] // R)
            level = tiles.group_at(number, kv_head, segment, num_keys, HM, LENGTHS, RATES)[0]
            if not EVEN:
                it = walk.each_cut_block(_load, context, it, start, level, kv_head, whole, LENGTHS, RATES)
            it = walk.each_block(_load, context, it, start, level, kv_head, whole, LENGTHS, RATES, BN, True)
            loaded += 1
        tile = tickets.draw(turn, queue)
        turn += 1


@gluon.jit
def _count(context, state, row, residue, multiplicity):
    """Counts the blocks that a walk visits."""
    return state + 1


@gluon.jit
def _cut_step(context, state, row, residue, multiplicity):
    """A step of the walk whose last keys do not exist."""
    q, num_keys, most, begun, qk_scale, smem, bars, R, WHICH, PINGPONG = context
    # The residue's last row, counted from the block's first; -1 where it has none in the block.
    last = (num_keys - 1 - residue) // R - row
    bias = gl.log2(gl.minimum(multiplicity, most).to(gl.float32))
    return stages.step(state, q, bias, last, begun, qk_scale, smem, bars, True, WHICH, PINGPONG)


@gluon.jit
def _consume(
    work, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A warpgroup, for a group of each tile's rows."""
    _, smem, bars, results, _, sizes, qk_scale, queue = work
    num_keys, num_heads, group, num_segments, num_tiles = sizes
    q_smem, k_smem, _ = smem
    q_full, q_empty, _, _, _, _, _ = bars
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    GROUPS: gl.constexpr = q_smem.shape[0]
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = stages.layout_of(BN)
    whole = num_keys // (R * BN) * BN
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    loaded = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, segment, number = tiles.group_tile_at(
            tile, num_tiles, num_segments, num_heads, GROUPS, HM, LENGTHS, RATES
        )
        kv_head = head // group
        if tiles.has_rows(number, kv_head, segment, num_keys, GROUPS, HM, LENGTHS, RATES):
            start = segment * (LENGTHS[0] // R)
            own, residue, row, is_there = tiles.group_at(number + WHICH, kv_head, segment, num_keys, HM, LENGTHS, RATES)
            # The tile's level is that of its first group. Its steps: blocks that the end cuts, then ring by ring.
            level = tiles.group_at(number, kv_head, segment, num_keys, HM, LENGTHS, RATES)[0]
            end = it
            for i in range(0, level):
                end += walk.ring_steps(start, i, whole, LENGTHS, RATES, BN) * walk.divide(R, i, RATES, 1)
            cut = gl.to_tensor(0)
            if not EVEN:
                cut = walk.each_cut_block(_count, None, cut, start, level, kv_head, whole, LENGTHS, RATES)
                end += cut
            mbarrier.wait(q_full.index(WHICH), loaded & 1)
            if is_there:
                # The group's rows: [HM, D].
                q = q_smem.index(WHICH)
                if Q_REGISTERS:
                    q = q.load(gl.DotOperandLayout(0, S, 2))
                    # The copy engine may overwrite the rows only after these reads.
                    fence_async_shared()
                    mbarrier.arrive(q_empty.index(WHICH), count=1)

                # Its keys.
                lowest = walk.first_shown(own, RATES)
                if EVEN:
                    bias = walk.bias_of(lowest, NB)
                    state = stages.first_step(it, q, bias, 0, qk_scale, smem, bars, False, WHICH, PINGPONG)
                    begun = gl.to_tensor(-1)
                else:
                    # There may be no whole block at all, so no step is the first.
                    ring = walk.cut_ring(start, level, whole, LENGTHS, RATES)
                    it = stages.skip(it, gl.where(ring < own, 0, cut), smem, bars, WHICH, PINGPONG)
                    begun = it
                    state = stages.begin(it, smem, bars)
                    context = (q, num_keys, own - ring, begun, qk_scale, smem, bars, R, WHICH, PINGPONG)
                    met = gl.where(ring < own, level, 0)
                    state = walk.each_cut_block(_cut_step, context, state, start, met, kv_head, whole, LENGTHS, RATES)
                for i in range(0, own):
                    number_each = walk.ring_steps(start, i, whole, LENGTHS, RATES, BN)
                    for shown in range(i + 1, own + 1):
                        bias = walk.bias_of(shown - i, NB)
                        steps = number_each * walk.residue_count(shown, own, RATES)
                        taken = gl.where((i == 0) & (shown == lowest), 1, 0) if EVEN else 0
                        for _b in range(taken, steps):
                            state = stages.step(state, q, bias, 0, begun, qk_scale, smem, bars, False, WHICH, PINGPONG)
                if not Q_REGISTERS:
                    mbarrier.arrive(q_empty.index(WHICH), count=1)
                it, acc, row_lse = stages.finish(state, smem, bars)
                # What only the tile's rows of higher levels see.
                it = stages.skip(it, end - it, smem, bars, WHICH, PINGPONG)
                stages.write(results, acc, row_lse, batch, head, row * R + residue, R, num_keys, num_heads, S, EVEN)
            else:
                # A segment's last tile may have fewer groups, and the sequence's end cuts some.
                mbarrier.arrive(q_empty.index(WHICH), count=1)
                it = stages.skip(it, end - it, smem, bars, WHICH, PINGPONG)
            loaded += 1
        tile = tickets.take(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=["num_keys", "num_heads", "group", "num_segments", "num_tiles"])
def hopper_forward(
    q, q_longer, k, k_longer, v, v_longer, out, lse, counter, q_strides, k_strides, v_strides,
    num_keys, num_heads, group, num_segments, num_tiles, qk_scale,
    LENGTHS: gl.constexpr, RATES: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """out and lse.

    Args:
        q, q_longer, k, ..: views by residue (`views.residue_views`).
        counter: of tiles that are handed out, 0 (`tickets.py`).
        group: query heads per key head.
        num_segments: segments of the shortest branch.
    """
    smem, bars = stages.allocate(q, k, STAGES, GROUPS)
    views = (q, q_longer), (k, k_longer), (v, v_longer)
    strides = q_strides, k_strides, v_strides
    sizes = num_keys, num_heads, group, num_segments, num_tiles
    work = views, smem, bars, (out, lse), strides, sizes, qk_scale, tickets.allocate(counter, GROUPS)
    # Warpgroups, of which the first is the kernel's own warps, and one warp that loads; the registers of the others.
    if GROUPS == 3:
        gl.warp_specialize([
            (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
            (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 1)),
            (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 2)),
            (_produce, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
            (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 1)),
            (_produce, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
        ], [4, 1], [240, 24])  # fmt: skip
