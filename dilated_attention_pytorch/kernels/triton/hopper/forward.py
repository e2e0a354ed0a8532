"""The forward without a causal mask: `aligned.aligned_forward`'s twin for Hopper, keys once.

One program per multiprocessor walks tiles of 128 rows. Where the sequence's length is no multiple of a block, the
last block of each residue is cut off and walked at the end, masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dilated_attention_pytorch.kernels.triton.hopper import stages, tickets, walk


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
    PINGPONG: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The producer: a warp."""
    views, smem, bars, _, strides, sizes, _, queue = work
    q_views, k_views, v_views = views
    q_strides, k_strides, v_strides = strides
    num_keys, num_heads, group, num_blocks, num_tiles = sizes
    q_smem, k_smem, _ = smem
    R: gl.constexpr = RATES[len(RATES) - 1]
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    remainder = num_keys % R
    whole = num_keys // (R * BN) * BN
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, residue, block = walk.tile_at(tile, num_blocks, num_heads, R)
        kv_head = head // group
        row = block * 2 * HM
        column = batch * q_strides.batch + head * q_strides.head + residue * q_strides.row
        stages.fill_queries(turn, q_views, residue < remainder, column, row, smem, bars)
        level = walk.level_of((residue + R - kv_head % R) % R, RATES)
        # Its keys. Batch and head are the offset of a column, which a step adds its residue to.
        context = (
            k_views, v_views, batch * k_strides.batch + kv_head * k_strides.head,
            batch * v_strides.batch + kv_head * v_strides.head, k_strides.row, v_strides.row, remainder, smem, bars,
        )  # fmt: skip
        it = walk.each_block(_load, context, it, row, level, kv_head, whole, LENGTHS, RATES, BN)
        if not EVEN:
            it = walk.each_cut_block(_load, context, it, row, level, kv_head, whole, LENGTHS, RATES)
        tile = tickets.draw(turn, queue)
        turn += 1


@gluon.jit
def _cut_step(context, state, row, residue, multiplicity):
    """A step of the walk whose last keys do not exist."""
    q, num_keys, begun, qk_scale, smem, bars, R, HALF, PINGPONG = context
    # The residue's last row, counted from the block's first; -1 where it has none in the block.
    last = (num_keys - 1 - residue) // R - row
    bias = gl.log2(multiplicity.to(gl.float32))
    return stages.step(state, q, bias, last, begun, qk_scale, smem, bars, True, HALF, PINGPONG)


@gluon.jit
def _consume(
    work, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A warpgroup, for half of each tile's rows."""
    _, smem, bars, results, _, sizes, qk_scale, queue = work
    num_keys, num_heads, group, num_blocks, num_tiles = sizes
    q_smem, k_smem, _ = smem
    q_full, q_empty, _, _, _, _, _ = bars
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = stages.layout_of(BN)
    whole = num_keys // (R * BN) * BN
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, residue, block = walk.tile_at(tile, num_blocks, num_heads, R)
        kv_head = head // group
        row = block * 2 * HM
        level = walk.level_of((residue + R - kv_head % R) % R, RATES)
        ends = walk.steps_up_to(row, level, whole, LENGTHS, RATES, BN)

        # The tile's rows: [HM, D].
        mbarrier.wait(q_full.index(HALF), turn & 1)
        q = q_smem.index(HALF)
        if Q_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, S, 2))
            # The copy engine may overwrite the rows only after these reads.
            fence_async_shared()
            mbarrier.arrive(q_empty.index(HALF), count=1)

        # Its keys.
        if EVEN:
            bias = walk.bias_at(0, ends, NB)
            state = stages.first_step(it, q, bias, 0, qk_scale, smem, bars, False, HALF, PINGPONG)
            # One loop for all multiplicities: a step compares its number with where each ends.
            for j in range(1, ends[NB - 1]):
                bias = walk.bias_at(j, ends, NB)
                state = stages.step(state, q, bias, 0, -1, qk_scale, smem, bars, False, HALF, PINGPONG)
        else:
            # There may be no whole block at all, so no step is the first.
            state = stages.begin(it, smem, bars)
            for j in range(0, ends[NB - 1]):
                bias = walk.bias_at(j, ends, NB)
                state = stages.step(state, q, bias, 0, it, qk_scale, smem, bars, False, HALF, PINGPONG)
            context = (q, num_keys, it, qk_scale, smem, bars, R, HALF, PINGPONG)
            state = walk.each_cut_block(_cut_step, context, state, row, level, kv_head, whole, LENGTHS, RATES)
        if not Q_REGISTERS:
            mbarrier.arrive(q_empty.index(HALF), count=1)
        it, acc, row_lse = stages.finish(state, smem, bars)
        stages.write(
            results, acc, row_lse, batch, head, (row + HALF * HM) * R + residue, R,
            num_keys, num_heads, S, EVEN,
        )  # fmt: skip
        tile = tickets.take(turn, queue)
        turn += 1


@gluon.jit(do_not_specialize=["num_keys", "num_heads", "group", "num_blocks", "num_tiles"])
def hopper_forward(
    q, q_longer, k, k_longer, v, v_longer, out, lse, counter, q_strides, k_strides, v_strides,
    num_keys, num_heads, group, num_blocks, num_tiles, qk_scale,
    LENGTHS: gl.constexpr, RATES: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, Q_REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr,
):  # fmt: skip
    """out and lse.

    Args:
        q, q_longer, ..: views by residue (`launch.residue_views`).
        counter: of tiles that are handed out, 0 (`tickets.py`).
        group: query heads per key head.
        num_blocks: tiles per residue.
    """
    smem, bars = stages.allocate(q, k, STAGES)
    views = (q, q_longer), (k, k_longer), (v, v_longer)
    strides = q_strides, k_strides, v_strides
    sizes = num_keys, num_heads, group, num_blocks, num_tiles
    work = views, smem, bars, (out, lse), strides, sizes, qk_scale, tickets.allocate(counter)
    # Two warpgroups, of which the first is the kernel's own warps, and one warp that loads; the registers of the latter
    # two, of 504 that three times 168 make.
    gl.warp_specialize([
        (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
        (_consume, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 1)),
        (_produce, (work, LENGTHS, RATES, EVEN, Q_REGISTERS, PINGPONG, 0)),
    ], [4, 1], [240, 24])  # fmt: skip
