"""dQ, and dK and dV, without a causal mask: tiles of one residue walk the blocks of `walk.each_block`.

The pairs, the memory and the step are `backward_step.py`'s. Queries and keys of a tile see each other through the same
branches, so both passes walk alike. Where the sequence's length is no multiple of a block, the last block of each
residue is cut off and walked at the end. Rows past the end come as zeros: keys are masked, lest an exponential
overflow, and queries have an lse that no logit reaches.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dilated_attention_pytorch.kernels.triton.hopper import backward_step as shared
from dilated_attention_pytorch.kernels.triton.hopper import tickets, tiles, walk

_TILE = gl.constexpr(2 * shared.HALF)


@gluon.jit
def _load_keys(context, it, row, residue, multiplicity):
    _load(context, it, row, residue, False)
    return it + 1


@gluon.jit
def _load_queries(context, it, row, residue, multiplicity):
    _load(context, it, row, residue, True)
    return it + 1


@gluon.jit
def _load(context, it, row, residue, DKV: gl.constexpr):
    """Loads a block of the streamed pair."""
    column1, column2, strides1, strides2, terms_row, length, apart, remainder, b1, b2, terms, memory = context
    shared.load_step(
        it, 0, residue < remainder, row, residue * strides1.row + column1, residue * strides2.row + column2,
        (terms_row + residue) * length + row, apart, b1, b2, terms, memory, 1, DKV,
    )  # fmt: skip


@gluon.jit
def _tile_of(tile, sizes, DKV: gl.constexpr, RATES: gl.constexpr):
    """(batch, head, key head, residue, first row, level) of a tile; its heads are key heads for dK, dV."""
    _, _, num_heads, group, num_blocks, _, _ = sizes
    R: gl.constexpr = RATES[len(RATES) - 1]
    heads = num_heads // group if DKV else num_heads
    batch, head, residue, block = tiles.tile_at(tile, num_blocks, heads, R)
    kv_head = head if DKV else head // group
    return batch, head, kv_head, residue, block * _TILE, walk.level_of((residue + R - kv_head % R) % R, RATES)


@gluon.jit
def _produce(
    work, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, REGISTERS: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """The warp that loads."""
    views, memory, _, _, strides, sizes, _, queue = work
    a1, a2, b1, b2, terms_views = views
    a1_strides, a2_strides, b1_strides, b2_strides, _ = strides
    num_tiles, num_batches, num_heads, group, _, num_rows, length = sizes
    R: gl.constexpr = RATES[len(RATES) - 1]
    BN: gl.constexpr = memory.b1.shape[1]
    remainder = num_rows % R
    whole = num_rows // (R * BN) * BN
    apart = num_batches * num_heads * R * length
    visit: gl.constexpr = _load_queries if DKV else _load_keys
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, kv_head, residue, row, level = _tile_of(tile, sizes, DKV, RATES)
        shared.load_tile(
            turn, 0, residue < remainder, row,
            batch * a1_strides.batch + residue * a1_strides.row + head * a1_strides.head,
            batch * a2_strides.batch + residue * a2_strides.row + head * a2_strides.head, a1, a2, memory, 1,
        )  # fmt: skip
        for member in range(0, group if DKV else 1):
            b_head = kv_head * group + member if DKV else kv_head
            column1 = batch * b1_strides.batch + b_head * b1_strides.head
            column2 = batch * b2_strides.batch + b_head * b2_strides.head
            context = (
                column1, column2, b1_strides, b2_strides, (batch * num_heads + b_head) * R, length, apart, remainder,
                b1, b2, terms_views, memory,
            )  # fmt: skip
            it = walk.each_block(visit, context, it, row, level, kv_head, whole, LENGTHS, RATES, BN)
            if not EVEN:
                it = walk.each_cut_block(visit, context, it, row, level, kv_head, whole, LENGTHS, RATES)
        tile = tickets.draw(turn, queue)
        turn += 1


@gluon.jit
def _cut_keys(context, state, row, residue, multiplicity):
    """A step of dQ whose last keys do not exist."""
    it, acc1, acc2 = state
    pair, row_terms, num_rows, R, qk_scale, memory = context
    last = (num_rows - 1 - residue) // R - row
    bias = gl.log2(multiplicity.to(gl.float32))
    acc1, acc2 = shared.step(it, acc1, acc2, pair, row_terms, bias, last, qk_scale, memory, False, True)
    return it + 1, acc1, acc2


@gluon.jit
def _cut_queries(context, state, row, residue, multiplicity):
    """A step of dK, dV whose last queries do not exist."""
    it, acc1, acc2 = state
    pair, row_terms, _, _, qk_scale, memory = context
    bias = gl.log2(multiplicity.to(gl.float32))
    acc1, acc2 = shared.step(it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, True, False)
    return it + 1, acc1, acc2


@gluon.jit
def _consume(
    work, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, EVEN: gl.constexpr, REGISTERS: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: one half of each tile."""
    _, memory, terms, grads, strides, sizes, scales, queue = work
    num_tiles, num_batches, num_heads, group, _, num_rows, length = sizes
    qk_scale, scale = scales
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    BN: gl.constexpr = memory.b1.shape[1]
    # Steps after the loop (`backward_step.start`).
    APART: gl.constexpr = 1 if REGISTERS and EVEN else 0
    whole = num_rows // (R * BN) * BN
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, kv_head, residue, row, level = _tile_of(tile, sizes, DKV, RATES)
        ends = walk.steps_up_to(row, level, whole, LENGTHS, RATES, BN)
        terms_row = ((batch * num_heads + head) * R + residue).to(gl.int64) * length
        _places, row_terms = shared.rows_of(
            terms, terms_row, row + WHICH * shared.HALF, 1, length, num_batches.to(gl.int64) * num_heads * R * length,
            memory, DKV,
        )  # fmt: skip
        pair, acc1, acc2 = shared.start(turn, memory, WHICH, REGISTERS)
        for _member in range(0, group if DKV else 1):
            for j in range(0, ends[NB - 1] - APART):
                bias = walk.bias_at(j, ends, NB)
                acc1, acc2 = shared.step(it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, DKV, False)
                it += 1
            if APART:
                bias = walk.bias_at(ends[NB - 1] - 1, ends, NB)
                acc1, acc2 = shared.step(it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, DKV, False)
                it += 1
            if not EVEN:
                visit: gl.constexpr = _cut_queries if DKV else _cut_keys
                context = (pair, row_terms, num_rows, R, qk_scale, memory)
                state = (it, acc1, acc2)
                it, acc1, acc2 = walk.each_cut_block(visit, context, state, row, level, kv_head, whole, LENGTHS, RATES)
        shared.finish(
            acc1, acc2, batch, head, row * R + residue, R, num_rows, grads, strides[4], scale, memory, DKV, WHICH,
            memory.a1.shape[2], False, REGISTERS,
        )  # fmt: skip
        tile = tickets.take(turn, queue)
        turn += 1


@gluon.jit(
    do_not_specialize=["num_tiles", "num_batches", "num_heads", "group", "num_blocks", "num_rows", "length"],
)
def hopper_backward(
    a1, a1_longer, a2, a2_longer, b1, b1_longer, b2, b2_longer, terms_view, terms, grad1, grad2, counter,
    a1_strides, a2_strides, b1_strides, b2_strides, grad_strides,
    num_tiles, num_batches, num_heads, group, num_blocks, num_rows, length, qk_scale, scale,
    DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """dq into grad1; or dk into grad1 and dv into grad2.

    Args:
        a1, a1_longer, ..: views by residue (`views.stride_views`) of the pairs, in halves of tiles and in blocks.
        terms: `[2, B, H, R, length]`, lse (log2) and delta of each query; terms_view is the same, flat.
        counter: of tiles that are handed out, 0 (`tickets.py`).
        group: query heads per key head.
        num_blocks: tiles per residue.
        EVEN: whether the sequence is a whole number of tiles.
    """
    memory = shared.allocate(a1, b1, terms_view, STAGES)
    views = (
        ((a1,), (a1_longer,)), ((a2,), (a2_longer,)), ((b1,), (b1_longer,)), ((b2,), (b2_longer,)),
        ((terms_view,), (None,)),
    )  # fmt: skip
    strides = a1_strides, a2_strides, b1_strides, b2_strides, grad_strides
    sizes = num_tiles, num_batches, num_heads, group, num_blocks, num_rows, length
    work = views, memory, terms, (grad1, grad2), strides, sizes, (qk_scale, scale), tickets.allocate(counter)
    gl.warp_specialize([
        (_consume, (work, DKV, LENGTHS, RATES, EVEN, REGISTERS, 0)),
        (_consume, (work, DKV, LENGTHS, RATES, EVEN, REGISTERS, 1)),
        (_produce, (work, DKV, LENGTHS, RATES, EVEN, REGISTERS, 0)),
    ], [4, 1], [240, 24])  # fmt: skip
