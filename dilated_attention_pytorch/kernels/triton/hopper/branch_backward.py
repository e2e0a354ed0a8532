"""dQ, and dK and dV, of one branch: any segment length, any rate, offsets of both rules, heads narrower than a tile.

The pairs, the memory and the step are `backward_step.py`'s. As in `attention_backward.py`, whose twin this is, rows are
counted in *slots*: slot j of a segment is position `base + j * rate`. A tile of 128 slots walks the blocks of the same
segment, and adds to what the branches before gave. Of a block that passes the segment's end the rows too many are
another segment's: as keys they are masked, and as queries they have an lse that no logit reaches.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dilated_attention_pytorch.kernels.triton.hopper import backward_step as shared
from dilated_attention_pytorch.kernels.triton.hopper import branch_tiles, stages


@gluon.jit
def _blocks_met(first, slots, BN: gl.constexpr, DKV: gl.constexpr, CAUSAL: gl.constexpr):
    """The first block that a tile meets, and their end."""
    begin = gl.to_tensor(0)
    end = branch_tiles.blocks_of(slots, BN)
    if CAUSAL:
        if DKV:
            begin = first // BN
        else:
            end = gl.minimum(end, branch_tiles.blocks_of(first + branch_tiles.TILE, BN))
    return begin, end


@gluon.jit
def _produce(
    work, DKV: gl.constexpr, CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr,
    REGISTERS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """The warp that loads."""
    views, memory, _, _, strides, num_tiles, sizes, terms_slots, _ = work
    a1, a2, b1, b2, terms_views = views
    a1_strides, a2_strides, b1_strides, b2_strides, _ = strides
    num_batches, num_heads, group, num_segments, _, _, _, _ = sizes
    BN: gl.constexpr = memory.b1.shape[1]
    terms_length = num_segments * terms_slots
    apart = num_batches * num_heads * terms_length
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head, kv_head, segment, base, slots, first = branch_tiles.tile_of(tile, sizes, DKV, MODULO)
        if first < slots:
            row, residue, is_longer = branch_tiles.rows_from(base, sizes)
            # The stationary pair, then a group's streamed pairs.
            place1 = branch_tiles.place_of(a1_strides, batch, residue, head)
            place2 = branch_tiles.place_of(a2_strides, batch, residue, head)
            shared.load_tile(turn, 0, is_longer, row + first, place1, place2, a1, a2, memory, 1)
            begin, end = _blocks_met(first, slots, BN, DKV, CAUSAL)
            for member in range(0, group if DKV else 1):
                b_head = kv_head * group + member if DKV else kv_head
                place1 = branch_tiles.place_of(b1_strides, batch, residue, b_head)
                place2 = branch_tiles.place_of(b2_strides, batch, residue, b_head)
                terms_at = (batch * num_heads + b_head) * terms_length + segment * terms_slots
                for block in range(begin, end):
                    shared.load_step(
                        it, 0, is_longer, row + block * BN, place1, place2, terms_at + block * BN, apart, b1, b2,
                        terms_views, memory, 1, DKV,
                    )  # fmt: skip
                    it += 1
            turn += 1


@gluon.jit
def _consume(
    work, DKV: gl.constexpr, CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr,
    REGISTERS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: one half of each tile."""
    _, memory, terms, grads, strides, num_tiles, sizes, terms_slots, scales = work
    num_batches, num_heads, group, num_segments, _, _, rate, _ = sizes
    qk_scale, scale = scales
    BN: gl.constexpr = memory.b1.shape[1]
    ROWS: gl.constexpr = gl.SliceLayout(1, stages.layout_of(BN))
    # Steps after the only loop (`backward_step.start`).
    APART: gl.constexpr = 1 if REGISTERS and DKV and not CAUSAL else 0
    terms_length = num_segments * terms_slots
    apart = num_batches.to(gl.int64) * num_heads * terms_length
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, head, _kv_head, segment, base, slots, first = branch_tiles.tile_of(tile, sizes, DKV, MODULO)
        if first < slots:
            begin, end = _blocks_met(first, slots, BN, DKV, CAUSAL)
            own = first + WHICH * shared.HALF
            # lse and delta of the tile's own rows, for dQ: [64] each.
            terms_row = (batch * num_heads + head).to(gl.int64) * terms_length + segment * terms_slots
            _places, row_terms = shared.rows_of(terms, terms_row, own, 1, terms_slots, apart, memory, DKV)
            # Blocks from `masked` to `masked_end` are cut; on either side the half sees all of a block, or none.
            masked = end
            masked_end = end
            edge = slots - 1
            if CAUSAL:
                # Slots of the half's rows: the last keys that these queries see, or the first queries that see them.
                edge = gl.expand_dims(own + gl.arange(0, shared.HALF, ROWS), 1)
                if DKV:
                    masked = gl.minimum(own // BN, end)
                    masked_end = gl.minimum((own + shared.HALF + BN - 2) // BN, end)
                else:
                    masked = gl.minimum((own + 1) // BN, end)
            elif not DKV:
                masked = slots // BN
            pair, acc1, acc2 = shared.start(turn, memory, WHICH, REGISTERS)
            # Keys of a group see the queries of all its heads; a query sees one head's keys.
            for _member in range(0, group if DKV else 1):
                for _block in range(begin, masked - APART):
                    # Queries before a half's first key see none of its keys.
                    if DKV and CAUSAL:
                        shared.skip(it, memory)
                    else:
                        acc1, acc2 = shared.step(
                            it, acc1, acc2, pair, row_terms, 0.0, 0, qk_scale, memory, DKV, False, WIDTH
                        )
                    it += 1
                if APART:
                    acc1, acc2 = shared.step(
                        it, acc1, acc2, pair, row_terms, 0.0, 0, qk_scale, memory, DKV, False, WIDTH
                    )
                    it += 1
                if CAUSAL or not DKV:
                    for block in range(masked, masked_end):
                        acc1, acc2 = shared.step(
                            it, acc1, acc2, pair, row_terms, 0.0, edge - block * BN, qk_scale, memory, DKV, True, WIDTH
                        )
                        it += 1
                if DKV and CAUSAL:
                    for _block in range(masked_end, end):
                        acc1, acc2 = shared.step(
                            it, acc1, acc2, pair, row_terms, 0.0, 0, qk_scale, memory, DKV, False, WIDTH
                        )
                        it += 1
            shared.finish(
                acc1, acc2, batch, head, base + first * rate, rate, base + slots * rate, grads, strides[4], scale,
                memory, DKV, WHICH, WIDTH, ADD, REGISTERS,
            )  # fmt: skip
            turn += 1


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "num_batches", "num_heads", "group", "num_segments", "tiles_each", "length", "rate", "num_rows",
        "terms_slots",
    ],
)  # fmt: skip
def hopper_branch_backward(
    a1, a1_longer, a2, a2_longer, b1, b1_longer, b2, b2_longer, terms_view, terms, grad1, grad2,
    a1_strides, a2_strides, b1_strides, b2_strides, grad_strides,
    num_tiles, num_batches, num_heads, group, num_segments, tiles_each, length, rate, num_rows,
    terms_slots, qk_scale, scale,
    DKV: gl.constexpr, CAUSAL: gl.constexpr, MODULO: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq into grad1; or dk into grad1 and dv into grad2; with ADD to what is there.

    Args:
        a1, a1_longer, ..: views (`views.unit_views`) of the pairs, in halves of tiles and in blocks; their strides
            count in the views' units, those of the gradients in elements.
        terms: `[2, B, H, num_segments, terms_slots]`, lse (log2) and delta of each slot; terms_view is the same, flat.
        group: query heads per key head.
        tiles_each: tiles of a segment.
        WIDTH: columns of the tensors; a view's blocks have zeros beyond.
    """
    memory = shared.allocate(a1, b1, terms_view, STAGES)
    # Of one stride, as `shared` has them.
    views = (
        ((a1,), (a1_longer,)), ((a2,), (a2_longer,)), ((b1,), (b1_longer,)), ((b2,), (b2_longer,)),
        ((terms_view,), (None,)),
    )  # fmt: skip
    strides = a1_strides, a2_strides, b1_strides, b2_strides, grad_strides
    sizes = num_batches, num_heads, group, num_segments, tiles_each, length, rate, num_rows
    work = views, memory, terms, (grad1, grad2), strides, num_tiles, sizes, terms_slots, (qk_scale, scale)
    gl.warp_specialize([
        (_consume, (work, DKV, CAUSAL, MODULO, WIDTH, ADD, REGISTERS, 0)),
        (_consume, (work, DKV, CAUSAL, MODULO, WIDTH, ADD, REGISTERS, 1)),
        (_produce, (work, DKV, CAUSAL, MODULO, WIDTH, ADD, REGISTERS, 0)),
    ], [4, 1], [240, 24])  # fmt: skip
