"""dQ, and dK and dV, under a causal mask: tiles of one level, in one segment of the shortest branch.

Keys of that segment lie at the strides of their levels (`walk.residues_of`) and meet a diagonal; those of other rings
are met by a whole tile, or not at all. Queries of a tile of keys come after it: the same walk, mirrored. The last
segment may be cut: rows past the end come as zeros, are later than any query, and have an lse that no logit reaches.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dilated_attention_pytorch.kernels.triton.hopper import backward_step as shared
from dilated_attention_pytorch.kernels.triton.hopper import tickets, tiles, walk

_TILE = gl.constexpr(2 * shared.HALF)


@gluon.jit
def _tile_of(tile, sizes, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr):
    """(batch, head, key head, segment, level, index of its stride, first place) of a tile; heads are key heads for
    dK, dV."""
    num_tiles, _, num_heads, group, num_segments, _ = sizes
    heads = num_heads // group if DKV else num_heads
    batch, head, segment, level, distance, first = tiles.level_tile_at(
        tile, num_tiles, num_segments, heads, _TILE, LENGTHS, RATES
    )
    kv_head = head if DKV else head // group
    index = walk.stride_index(level, len(RATES))
    low = walk.modulo(kv_head + distance, index, RATES) + first * walk.pick(RATES, index)
    return batch, head, kv_head, segment, level, index, low


@gluon.jit
def _blocks_met(
    residue, index, low, high, BN: gl.constexpr, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr
):
    """Of a residue's blocks in the segment: the first that the places low .. high meet, and their end."""
    if DKV:
        first, _ = walk.blocks_after(residue, index, low, high, LENGTHS, RATES, BN)
        return first, walk.divide(LENGTHS[0], index, RATES, BN)
    else:
        _, end = walk.blocks_before(residue, index, low, high, RATES, BN)
        return gl.to_tensor(0), end


@gluon.jit
def _blocks_masked(
    residue, index, low, high, BN: gl.constexpr, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr
):
    """Of the same, those on the diagonal: the first, and their end."""
    if DKV:
        return walk.blocks_after(residue, index, low, high, LENGTHS, RATES, BN)
    else:
        return walk.blocks_before(residue, index, low, high, RATES, BN)


# The warp that loads.


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
    """Loads a block of another ring."""
    column1, column2, strides1, strides2, terms_at, length, apart, remainder, b1, b2, terms, memory = context
    shared.load_step(
        it, 0, residue < remainder, row, residue * strides1.row + column1, residue * strides2.row + column2,
        terms_at + residue * length + row, apart, b1, b2, terms, memory, 1, DKV,
    )  # fmt: skip


@gluon.jit
def _produce(
    work, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, REGISTERS: gl.constexpr, WHICH: gl.constexpr
):
    """The warp that loads."""
    views, memory, _, _, strides, sizes, _, queue = work
    a1, a2, b1, b2, terms_views = views
    a1_strides, a2_strides, b1_strides, b2_strides, _ = strides
    num_tiles, num_batches, num_heads, group, num_segments, num_rows = sizes
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    BN: gl.constexpr = memory.b1.shape[1]
    visit: gl.constexpr = _load_queries if DKV else _load_keys
    padded = num_segments * LENGTHS[0]
    apart = num_batches * num_heads * padded
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, kv_head, segment, level, index, low = _tile_of(tile, sizes, DKV, LENGTHS, RATES)
        residue = walk.modulo(low, index, RATES)
        shared.load_tile(
            turn, index, residue < walk.modulo(num_rows, index, RATES),
            walk.divide(segment * LENGTHS[0] + low, index, RATES, 1),
            batch * a1_strides.batch + residue * a1_strides.row + head * a1_strides.head,
            batch * a2_strides.batch + residue * a2_strides.row + head * a2_strides.head, a1, a2, memory, NB,
        )  # fmt: skip
        high = low + walk.pick(RATES, index) * (_TILE - 1)
        for member in range(0, group if DKV else 1):
            b_head = kv_head * group + member if DKV else kv_head
            column1 = batch * b1_strides.batch + b_head * b1_strides.head
            column2 = batch * b2_strides.batch + b_head * b2_strides.head
            terms_at = (batch * num_heads + b_head) * padded
            # The segment's own keys, or queries, by their levels.
            for i in gl.static_range(NB):
                end, ratio, step = walk.residues_at(i, level, RATES)
                start = segment * (LENGTHS[0] // RATES[i])
                for number in range(1, end):
                    place = (kv_head + number % ratio * step) % RATES[i]
                    first, last = _blocks_met(place, i, low, high, BN, DKV, LENGTHS, RATES)
                    for block in range(first, last):
                        row = start + block * BN
                        shared.load_step(
                            it, i, place < num_rows % RATES[i], row, place * b1_strides.row + column1,
                            place * b2_strides.row + column2,
                            terms_at + place * (padded // RATES[i]) + row, apart, b1, b2, terms_views, memory, NB, DKV,
                        )  # fmt: skip
                        it += 1
            # Those of the other rings.
            b1_last = (b1[0][NB - 1],), (b1[1][NB - 1],)
            b2_last = (b2[0][NB - 1],), (b2[1][NB - 1],)
            terms_last = (terms_views[0][NB - 1],), (None,)
            context = (
                column1, column2, b1_strides, b2_strides, terms_at, padded // R, apart, num_rows % R, b1_last, b2_last,
                terms_last, memory,
            )  # fmt: skip
            it = walk.each_side_block(
                visit, context, it, segment * (LENGTHS[0] // R), level, kv_head, padded // R, DKV, LENGTHS, RATES, BN
            )
        tile = tickets.draw(turn, queue)
        turn += 1


# A warpgroup that multiplies.


@gluon.jit
def _consume(
    work, DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, REGISTERS: gl.constexpr, WHICH: gl.constexpr
):
    """One half of each tile."""
    _, memory, terms, grads, strides, sizes, scales, queue = work
    num_tiles, num_batches, num_heads, group, num_segments, num_rows = sizes
    qk_scale, scale = scales
    NB: gl.constexpr = len(RATES)
    R: gl.constexpr = RATES[NB - 1]
    BN: gl.constexpr = memory.b1.shape[1]
    padded = num_segments * LENGTHS[0]
    it = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        batch, head, kv_head, segment, level, index, low = _tile_of(tile, sizes, DKV, LENGTHS, RATES)
        stride = walk.pick(RATES, index)
        high = low + stride * (_TILE - 1)
        own_low = low + stride * (WHICH * shared.HALF)
        own_high = own_low + stride * (shared.HALF - 1)
        places, row_terms = shared.rows_of(
            terms, (batch * num_heads + head).to(gl.int64) * padded + segment * LENGTHS[0], own_low, stride, LENGTHS[0],
            num_batches.to(gl.int64) * num_heads * padded, memory, DKV,
        )  # fmt: skip
        pair, acc1, acc2 = shared.start(turn, memory, WHICH, REGISTERS)
        for _member in range(0, group if DKV else 1):
            for shown in range(1, level + 1):
                begin, hop, every, at = walk.residues_of(shown, level, RATES)
                bias = walk.bias_of(shown, NB)
                for z in range(begin, hop, every):
                    place = walk.modulo(kv_head + z, at, RATES)
                    first, end = _blocks_met(place, at, low, high, BN, DKV, LENGTHS, RATES)
                    masked, masked_end = _blocks_masked(place, at, own_low, own_high, BN, DKV, LENGTHS, RATES)
                    # The last column that a row meets; the first, for keys.
                    if DKV:
                        edge = walk.divide(places + hop - 1 - place, at, RATES, 1)
                    else:
                        edge = walk.divide(places + hop - place, at, RATES, 1) - 1
                    edge = gl.expand_dims(edge, 1)
                    # In the order in which they come. Those that only the other half meets are let pass.
                    if DKV:
                        it = _pass(it, masked - first, memory)
                    else:
                        for _block in range(first, masked):
                            acc1, acc2 = shared.step(
                                it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, DKV, False
                            )
                            it += 1
                    for block in range(masked, masked_end):
                        acc1, acc2 = shared.step(
                            it, acc1, acc2, pair, row_terms, bias, edge - block * BN, qk_scale, memory, DKV, True
                        )
                        it += 1
                    if DKV:
                        for _block in range(masked_end, end):
                            acc1, acc2 = shared.step(
                                it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, DKV, False
                            )
                            it += 1
                    else:
                        it = _pass(it, end - masked_end, memory)
            row = segment * (LENGTHS[0] // R)
            for multiplicity in range(1, level):
                bias = walk.bias_of(multiplicity, NB)
                for _block in range(0, walk.side_steps(multiplicity, row, level, padded // R, DKV, LENGTHS, RATES, BN)):
                    acc1, acc2 = shared.step(it, acc1, acc2, pair, row_terms, bias, 0, qk_scale, memory, DKV, False)
                    it += 1
        shared.finish(
            acc1, acc2, batch, head, segment * LENGTHS[0] + low, stride, num_rows, grads, strides[4], scale, memory,
            DKV, WHICH, memory.a1.shape[2], False, REGISTERS,
        )  # fmt: skip
        tile = tickets.take(turn, queue)
        turn += 1


@gluon.jit
def _pass(it, number, memory):
    """Gives back blocks that only the other half meets."""
    for i in range(0, number):
        shared.skip(it + i, memory)
    return it + number


@gluon.jit(do_not_specialize=["num_tiles", "num_batches", "num_heads", "group", "num_segments", "num_rows"])
def hopper_backward_causal(
    a1_0, a1_1, a1_2, a1_3, a1_4, a1_longer_0, a1_longer_1, a1_longer_2, a1_longer_3, a1_longer_4,
    a2_0, a2_1, a2_2, a2_3, a2_4, a2_longer_0, a2_longer_1, a2_longer_2, a2_longer_3, a2_longer_4,
    b1_0, b1_1, b1_2, b1_3, b1_4, b1_longer_0, b1_longer_1, b1_longer_2, b1_longer_3, b1_longer_4,
    b2_0, b2_1, b2_2, b2_3, b2_4, b2_longer_0, b2_longer_1, b2_longer_2, b2_longer_3, b2_longer_4,
    terms_0, terms_1, terms_2, terms_3, terms_4, terms, grad1, grad2, counter,
    a1_strides, a2_strides, b1_strides, b2_strides, grad_strides,
    num_tiles, num_batches, num_heads, group, num_segments, num_rows, qk_scale, scale,
    DKV: gl.constexpr, LENGTHS: gl.constexpr, RATES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq into grad1; or dk into grad1 and dv into grad2.

    Args:
        a1_0, a1_longer_0, ..: views by residue of each rate (`views.stride_views`) of the pairs, in halves of tiles and
            in blocks; None beyond the last rate.
        terms_0, ..: flat, `[2, B, H, r, length]` for each rate r, in whole segments: lse (log2) and delta.
        terms: the same at rate 1.
        counter: of tiles that are handed out, 0 (`tickets.py`).
        group: query heads per key head.
        num_segments: segments of the shortest branch.
    """
    memory = shared.allocate(a1_0, b1_0, terms_0, STAGES)
    a1 = (a1_0, a1_1, a1_2, a1_3, a1_4), (a1_longer_0, a1_longer_1, a1_longer_2, a1_longer_3, a1_longer_4)
    a2 = (a2_0, a2_1, a2_2, a2_3, a2_4), (a2_longer_0, a2_longer_1, a2_longer_2, a2_longer_3, a2_longer_4)
    b1 = (b1_0, b1_1, b1_2, b1_3, b1_4), (b1_longer_0, b1_longer_1, b1_longer_2, b1_longer_3, b1_longer_4)
    b2 = (b2_0, b2_1, b2_2, b2_3, b2_4), (b2_longer_0, b2_longer_1, b2_longer_2, b2_longer_3, b2_longer_4)
    terms_views = (terms_0, terms_1, terms_2, terms_3, terms_4), (None, None, None, None, None)
    views = a1, a2, b1, b2, terms_views
    strides = a1_strides, a2_strides, b1_strides, b2_strides, grad_strides
    sizes = num_tiles, num_batches, num_heads, group, num_segments, num_rows
    work = views, memory, terms, (grad1, grad2), strides, sizes, (qk_scale, scale), tickets.allocate(counter)
    gl.warp_specialize([
        (_consume, (work, DKV, LENGTHS, RATES, REGISTERS, 0)),
        (_consume, (work, DKV, LENGTHS, RATES, REGISTERS, 1)),
        (_produce, (work, DKV, LENGTHS, RATES, REGISTERS, 0)),
    ], [4, 1], [240, 24])  # fmt: skip
