"""The causal forward for Hopper, over tiles of one level (`tiles.level_tile_at`): only keys of a row's shortest segment
meet a diagonal, all others are seen by the whole tile. One launch, keys once.

A tile takes blocks in this order, so that runs of one multiplicity are loops: the first of its own residue that meets
its diagonal; those of its own segment that all of its rows see; those of other rings; the others on the diagonal, first
what the first half's rows see, then what only the second half's do.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dilated_attention_pytorch.kernels.triton.hopper import stages, tickets, tiles, walk


@gluon.jit
def _fill(context, it, index: gl.constexpr, row, residue, RATES: gl.constexpr):
    """Loads the blocks of one step, of rows at the stride RATES[index]."""
    k_views, v_views, k_column, v_column, k_stride, v_stride, num_keys, smem, bars = context
    k = k_views[0][index], k_views[1][index]
    v = v_views[0][index], v_views[1][index]
    return stages.fill(
        it, k, v, residue < num_keys % RATES[index], k_column + residue * k_stride, v_column + residue * v_stride, row,
        smem, bars,
    )  # fmt: skip


@gluon.jit
def _fill_side(context, it, row, residue, multiplicity):
    """Loads a block that `walk.each_side_block` visits."""
    k_views, v_views, k_column, v_column, k_stride, v_stride, remainder, smem, bars = context
    return stages.fill(
        it, k_views, v_views, residue < remainder, k_column + residue * k_stride, v_column + residue * v_stride, row,
        smem, bars,
    )  # fmt: skip


@gluon.jit
def _produce(
    work, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr, HALF: gl.constexpr
):
    """The producer: a warp."""
    views, smem, bars, _, strides, sizes, _, queue = work
    q_views, k_views, v_views = views
    q_strides, k_strides, v_strides = strides
    num_keys, num_heads, group, num_segments, num_tiles = sizes
    q_smem, k_smem, _ = smem
    NB: gl.constexpr = len(RATES)
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, segment, level, distance, first = tiles.level_tile_at(
            tile, num_tiles, num_segments, num_heads, 2 * HM, LENGTHS, RATES
        )
        kv_head = head // group
        index = walk.stride_index(level, NB)
        stride = walk.pick(RATES, index)
        residue = walk.modulo(kv_head + distance, index, RATES)
        row = segment * walk.divide(LENGTHS[0], index, RATES, 1) + first
        column = batch * q_strides.batch + head * q_strides.head + residue * q_strides.row
        # A descriptor cannot be picked at run time, so the index that picks it is asked for.
        for i in gl.static_range(1 if NB > 1 else 0, NB):
            if index == i:
                q = q_views[0][i], q_views[1][i]
                for w in gl.static_range(2):
                    stages.fill_queries(w, turn, q, residue < num_keys % RATES[i], column, row + w * HM, smem, bars)
        # Places in the segment of the tile's first row, of the first half's last and of the last.
        low = residue + first * stride
        middle = low + (HM - 1) * stride
        high = middle + HM * stride
        k_column = batch * k_strides.batch + kv_head * k_strides.head
        v_column = batch * v_strides.batch + kv_head * v_strides.head
        context = (k_views, v_views, k_column, v_column, k_strides.row, v_strides.row, num_keys, smem, bars)
        for i in gl.static_range(NB):
            if i == level - 1:
                key = kv_head % RATES[i]
                block = walk.blocks_before(key, i, low, high, RATES, BN)[0]
                it = _fill(context, it, i, segment * (LENGTHS[0] // RATES[i]) + block * BN, key, RATES)
        # Keys of its own segment, in blocks of one residue each: those that all rows see; after other rings those that
        # the first half meets on its diagonal; then those that the second half alone sees.
        for part in gl.static_range(3):
            for i in gl.static_range(NB):
                end, ratio, step = walk.residues_at(i, level, RATES)
                base = segment * (LENGTHS[0] // RATES[i])
                for number in range(1, end):
                    key = (kv_head + number % ratio * step) % RATES[i]
                    dense, some = walk.blocks_before(key, i, low, high, RATES, BN)
                    both = walk.blocks_before(key, i, low, middle, RATES, BN)[1]
                    if part == 0:
                        begin, stop = gl.to_tensor(0), dense
                    elif part == 1:
                        # The tile's own residue, which is number `ratio`, has had its first.
                        begin, stop = dense + gl.where(number == ratio, 1, 0), both
                    else:
                        begin, stop = both, some
                    for b in range(begin, stop):
                        it = _fill(context, it, i, base + b * BN, key, RATES)
            if part == 0:
                start = segment * (LENGTHS[0] // RATES[NB - 1])
                k_last = k_views[0][NB - 1], k_views[1][NB - 1]
                v_last = v_views[0][NB - 1], v_views[1][NB - 1]
                remainder = num_keys % RATES[NB - 1]
                side = (k_last, v_last, k_column, v_column, k_strides.row, v_strides.row, remainder, smem, bars)
                it = walk.each_side_block(_fill_side, side, it, start, level, kv_head, 0, False, LENGTHS, RATES, BN)
        tile = tickets.draw(turn, queue)
        turn += 1


@gluon.jit
def _consume(
    work, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr, HALF: gl.constexpr
):
    """A warpgroup, for half of each tile's rows."""
    _, smem, bars, results, _, sizes, qk_scale, queue = work
    num_keys, num_heads, group, num_segments, num_tiles = sizes
    q_smem, k_smem, _ = smem
    q_full, q_empty, _, _, _, _, _ = bars
    NB: gl.constexpr = len(RATES)
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = stages.layout_of(BN)
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, segment, level, distance, first = tiles.level_tile_at(
            tile, num_tiles, num_segments, num_heads, 2 * HM, LENGTHS, RATES
        )
        kv_head = head // group
        index = walk.stride_index(level, NB)
        stride = walk.pick(RATES, index)
        low = walk.modulo(kv_head + distance, index, RATES) + first * stride
        middle = low + (HM - 1) * stride
        high = middle + HM * stride
        # Places of this half's rows in the segment: [HM].
        own_low = low + HALF * HM * stride
        places = own_low + stride * gl.arange(0, HM, gl.SliceLayout(1, S))

        # The tile's rows: [HM, D].
        mbarrier.wait(q_full.index(HALF), turn & 1)
        q = q_smem.index(HALF)
        if Q_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, S, 2))
            # The copy engine may overwrite the rows only after these reads.
            fence_async_shared()
            mbarrier.arrive(q_empty.index(HALF), count=1)

        # The first keys of its own residue that meet the diagonal.
        own_key = walk.modulo(kv_head, level - 1, RATES)
        own_block = walk.blocks_before(own_key, level - 1, low, high, RATES, BN)[0]
        own_edge = gl.expand_dims(walk.divide(places - own_key, level - 1, RATES, 1) - own_block * BN, 1)
        own_bias = walk.bias_of(level, NB)
        state = stages.first_step(it, q, own_bias, own_edge, qk_scale, smem, bars, True, HALF, False)
        # Keys of its own segment that all of its rows see. A loop's bounds are worked out once for all its steps.
        for shown in range(1, level + 1):
            begin, hop, step, at = walk.residues_of(shown, level, RATES)
            bias = walk.bias_of(shown, NB)
            for z in range(begin, hop, step):
                key = walk.modulo(kv_head + z, at, RATES)
                dense = walk.blocks_before(key, at, low, high, RATES, BN)[0]
                for _b in range(0, dense):
                    state = stages.step(state, q, bias, 0, -1, qk_scale, smem, bars, False, HALF, False)
        # Keys of other rings.
        start = segment * (LENGTHS[0] // RATES[NB - 1])
        for multiplicity in range(1, level):
            bias = walk.bias_of(multiplicity, NB)
            for _b in range(0, walk.side_steps(multiplicity, start, level, 0, False, LENGTHS, RATES, BN)):
                state = stages.step(state, q, bias, 0, -1, qk_scale, smem, bars, False, HALF, False)
        # Other keys on the diagonal; `skipped` blocks are for the other half alone.
        skipped = gl.to_tensor(0)
        for part in gl.static_range(1 + HALF):
            for shown in range(1, level + 1):
                begin, hop, step, at = walk.residues_of(shown, level, RATES)
                bias = walk.bias_of(shown, NB)
                for z in range(begin, hop, step):
                    key = walk.modulo(kv_head + z, at, RATES)
                    dense, some = walk.blocks_before(key, at, low, high, RATES, BN)
                    own, both = walk.blocks_before(key, at, own_low, middle, RATES, BN)
                    # The last key that each row sees, in the order of its residue; -1 for none.
                    edge = gl.expand_dims(walk.divide(places + hop - key, at, RATES, 1) - 1, 1)
                    if part == 0:
                        dense += gl.where(shown == level, 1, 0)
                        own = gl.minimum(gl.maximum(own, dense), both)
                        # The second half sees some of what the first half masks as a whole.
                        for _b in range(dense, own):
                            state = stages.step(state, q, bias, 0, -1, qk_scale, smem, bars, False, HALF, False)
                        for b in range(own, both):
                            last = edge - b * BN
                            state = stages.step(state, q, bias, last, -1, qk_scale, smem, bars, True, HALF, False)
                        skipped += some - both
                    else:
                        for b in range(both, some):
                            last = edge - b * BN
                            state = stages.step(state, q, bias, last, -1, qk_scale, smem, bars, True, HALF, False)
        if not Q_REGISTERS:
            mbarrier.arrive(q_empty.index(HALF), count=1)
        it, acc, row_lse = stages.finish(state, smem, bars)
        # Stages count arrivals of both halves, so the first lets go of what it does not take.
        if HALF == 0:
            it = stages.skip(it, skipped, smem, bars)
        stages.write(
            results, acc, row_lse, batch, head, segment * LENGTHS[0] + own_low, stride, num_keys, num_heads, S, EVEN
        )
        tile = tickets.take(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=["num_keys", "num_heads", "group", "num_segments", "num_tiles"])
def hopper_forward_causal(
    q0, q1, q2, q3, q4, q0_longer, q1_longer, q2_longer, q3_longer, q4_longer,
    k0, k1, k2, k3, k4, k0_longer, k1_longer, k2_longer, k3_longer, k4_longer,
    v0, v1, v2, v3, v4, v0_longer, v1_longer, v2_longer, v3_longer, v4_longer,
    out, lse, counter, q_strides, k_strides, v_strides,
    num_keys, num_heads, group, num_segments, num_tiles, qk_scale,
    LENGTHS: gl.constexpr, RATES: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out and lse.

    Args:
        q0, q0_longer, ..: views by residue of each rate (`views.residue_views`); None beyond the last rate.
        counter: of tiles that are handed out, 0 (`tickets.py`).
        group: query heads per key head.
        num_segments: segments of the shortest branch.
    """
    smem, bars = stages.allocate(q0, k0, STAGES)
    q = (q0, q1, q2, q3, q4), (q0_longer, q1_longer, q2_longer, q3_longer, q4_longer)
    k = (k0, k1, k2, k3, k4), (k0_longer, k1_longer, k2_longer, k3_longer, k4_longer)
    v = (v0, v1, v2, v3, v4), (v0_longer, v1_longer, v2_longer, v3_longer, v4_longer)
    strides = q_strides, k_strides, v_strides
    sizes = num_keys, num_heads, group, num_segments, num_tiles
    work = (q, k, v), smem, bars, (out, lse), strides, sizes, qk_scale, tickets.allocate(counter)
    gl.warp_specialize([
        (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, 0)),
        (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, 1)),
        (_produce, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, 0)),
    ], [4, 1], [240, 24])  # fmt: skip
