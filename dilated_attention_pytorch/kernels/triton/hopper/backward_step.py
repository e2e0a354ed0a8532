"""What the backward kernels for Hopper share: their memory, what a step loads and what it computes.

One warp loads through the copy engine, two warpgroups of 64 rows each multiply. A tile of 128 rows of a stationary
pair (a1, a2) meets tile after tile of a streamed pair (b1, b2), and both passes are the same code:

    dQ:     a = q, dO   b = k, v    x = q k'   y = dO v'                   dq += dS k
    dK, dV: a = k, v    b = q, dO   x = k q'   y = v dO'   dv += P' dO     dk += dS' q

with P = exp2(x * qk_scale + bias - lse) and dS = P * (y - delta); the bias is log2 of a key's multiplicity. P and dS go
from accumulators to operands through registers alone. Every gradient is written once, by one program: the same bits
each time.

Based on FlashAttention-3 (Shah et al., 2024, section 3.1: producer and consumers).
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dilated_attention_pytorch.kernels.triton.hopper import stages

# Rows of a warpgroup's half of a tile.
HALF = gl.constexpr(64)


class Memory(NamedTuple):
    """Shared memory, and the barriers by which its readers and its writer wait for each other.

    Attributes:
        a1: `[2, 64, D]`, the halves of the stationary tile. So is a2.
        b1: `[stages, BN, D]`, a ring of slots for the streamed tiles. So is b2.
        terms: `[2 * stages, BN]` fp32, lse and delta of the streamed queries.
        a_full, a_empty: per half. The other barriers are per slot, but for
        passed: which nobody waits for, since it counts as passed from the start.
    """

    a1: gl.shared_memory_descriptor
    a2: gl.shared_memory_descriptor
    b1: gl.shared_memory_descriptor
    b2: gl.shared_memory_descriptor
    terms: gl.shared_memory_descriptor
    a_full: gl.shared_memory_descriptor
    a_empty: gl.shared_memory_descriptor
    b1_full: gl.shared_memory_descriptor
    b1_empty: gl.shared_memory_descriptor
    b2_full: gl.shared_memory_descriptor
    b2_empty: gl.shared_memory_descriptor
    passed: gl.shared_memory_descriptor


@gluon.jit
def allocate(a_view, b_view, terms_view, STAGES: gl.constexpr):
    """The memory of a program, its barriers ready."""
    # A view's blocks are [rows, D], or [1, rows, D].
    RANK: gl.constexpr = len(b_view.block_shape)
    D: gl.constexpr = b_view.block_shape[RANK - 1]
    BN: gl.constexpr = b_view.block_shape[RANK - 2]
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], a_view.dtype)
    B: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], b_view.dtype)
    a1 = gl.allocate_shared_memory(a_view.dtype, [2, HALF, D], A)
    a2 = gl.allocate_shared_memory(a_view.dtype, [2, HALF, D], A)
    b1 = gl.allocate_shared_memory(b_view.dtype, [STAGES, BN, D], B)
    b2 = gl.allocate_shared_memory(b_view.dtype, [STAGES, BN, D], B)
    terms = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BN], terms_view.layout)
    a_full, b1_full, b2_full = stages.barriers(2, 1), stages.barriers(STAGES, 1), stages.barriers(STAGES, 1)
    a_empty, passed = stages.barriers(2, 1), stages.barriers(1, 1)
    b1_empty, b2_empty = stages.barriers(STAGES, 2 * stages.GROUP), stages.barriers(STAGES, 2 * stages.GROUP)
    fence_async_shared()
    return Memory(a1, a2, b1, b2, terms, a_full, a_empty, b1_full, b1_empty, b2_full, b2_empty, passed)


# The warp that loads.


# `views` of a tensor are two tuples over strides: of the residues that have `N // stride` rows, and of the first ones,
# which have one more; None where there are none. `number` says which of the STRIDES, `is_longer` which residues.


@gluon.jit
def load_tile(turn, number, is_longer, row, place1, place2, views1, views2, memory, STRIDES: gl.constexpr):
    """A program's next stationary tile, half by half; places as `stages.copy_rows` has them."""
    for half in gl.static_range(2):
        mbarrier.wait(memory.a_empty.index(half), (turn & 1) ^ 1)
        full = memory.a_full.index(half)
        mbarrier.expect(full, 2 * views1[0][0].block_type.nbytes)
        _copy(views1, number, is_longer, place1, row + half * HALF, full, memory.a1.index(half), STRIDES)
        _copy(views2, number, is_longer, place2, row + half * HALF, full, memory.a2.index(half), STRIDES)


@gluon.jit
def load_step(
    it, number, is_longer, row, place1, place2, terms_at, terms_apart, views1, views2, terms_views, memory,
    STRIDES: gl.constexpr, DKV: gl.constexpr,
):  # fmt: skip
    """A streamed tile of both tensors, and its terms."""
    STAGES: gl.constexpr = memory.b1.shape[0]
    slot = it % STAGES
    phase = (it // STAGES) & 1
    size: gl.constexpr = views1[0][0].block_type.nbytes + (terms_views[0][0].block_type.nbytes if DKV else 0)
    mbarrier.wait(memory.b1_empty.index(slot), phase ^ 1)
    full = memory.b1_full.index(slot)
    mbarrier.expect(full, size)
    if DKV:
        _copy(terms_views, number, False, 0, terms_at, full, memory.terms.index(slot * 2), STRIDES)
    _copy(views1, number, is_longer, place1, row, full, memory.b1.index(slot), STRIDES)
    mbarrier.wait(memory.b2_empty.index(slot), phase ^ 1)
    full = memory.b2_full.index(slot)
    mbarrier.expect(full, size)
    if DKV:
        _copy(terms_views, number, False, 0, terms_at + terms_apart, full, memory.terms.index(slot * 2 + 1), STRIDES)
    _copy(views2, number, is_longer, place2, row, full, memory.b2.index(slot), STRIDES)


@gluon.jit
def _copy(views, number, is_longer, place, row, full, to, STRIDES: gl.constexpr):
    """Starts to load a block."""
    every, longer = views
    if STRIDES == 1:
        stages.copy_rows((every[0], longer[0]), is_longer, place, row, full, to)
    else:
        for i in gl.static_range(STRIDES):
            if number == i:
                stages.copy_rows((every[i], longer[i]), is_longer, place, row, full, to)


# The warpgroups that multiply.


@gluon.jit
def step(
    it, acc1, acc2, pair, row_terms, bias, edge, qk_scale, memory, DKV: gl.constexpr, MASKED: gl.constexpr,
    WIDTH: gl.constexpr = 1 << 20,
):  # fmt: skip
    """Takes one streamed tile into the accumulators.

    Args:
        acc1, acc2: `[64, D]`: of dq; or of dk and dv.
        pair: half of the stationary tile, from `start`.
        row_terms: lse (log2) and delta of its rows, for dQ.
        edge: for MASKED, the last column that counts, for dK, dV the first: a number, or one for each row `[64, 1]`.
    """
    a1, a2 = pair
    STAGES: gl.constexpr = memory.b1.shape[0]
    BN: gl.constexpr = memory.b1.shape[1]
    D: gl.constexpr = memory.b1.shape[2]
    S: gl.constexpr = stages.layout_of(BN)
    P: gl.constexpr = gl.DotOperandLayout(0, stages.layout_of(D), 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    slot = it % STAGES
    phase = (it // STAGES) & 1
    b1 = memory.b1.index(slot)
    b2 = memory.b2.index(slot)
    # Both products are issued before the first is waited for: [64, D] x [D, BN] -> [64, BN].
    zero = gl.zeros([HALF, BN], gl.float32, S)
    mbarrier.wait(memory.b1_full.index(slot), phase)
    x = stages.contract(a1, b1, WIDTH, zero)
    mbarrier.wait(memory.b2_full.index(slot), phase)
    y = stages.contract(a2, b2, WIDTH, zero)
    if DKV:
        shift = gl.expand_dims(memory.terms.index(slot * 2).load(COLUMNS) - bias, 0)
        delta = gl.expand_dims(memory.terms.index(slot * 2 + 1).load(COLUMNS), 0)
    else:
        shift = gl.expand_dims(row_terms[0] - bias, 1)
        delta = gl.expand_dims(row_terms[1], 1)
    # The exponentials run beside the second product. The lse is of all keys: no weight exceeds 1.
    x = warpgroup_mma_wait(2 if stages.rest_of(WIDTH, D) else 1, deps=[x])
    p = gl.exp2(x * qk_scale - shift)
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, BN, COLUMNS), 0)
        met = columns >= edge if DKV else columns <= edge
        p = gl.where(met, p, 0.0)
    # ptxas moves the exponentials below the next wait unless a basic block ends between them: a wait that is over.
    if DKV:
        weights = gl.convert_layout(p.to(memory.b2.dtype), P)
        mbarrier.wait(memory.passed.index(0), 1)
        y, weights, p = warpgroup_mma_wait(0, deps=[y, weights, p])
        # dV += P' dO: [64, BN] x [BN, D] -> [64, D].
        acc2 = warpgroup_mma(weights, b2, acc2, is_async=True)
    else:
        mbarrier.wait(memory.passed.index(0), 1)
        y, p = warpgroup_mma_wait(0, deps=[y, p])
        stages.arrive(memory.b2_empty.index(slot))
    # dQ += dS K, or dK += dS' Q; scaled once, at the end.
    ds = gl.convert_layout((p * (y - delta)).to(memory.b1.dtype), P)
    acc1 = warpgroup_mma(ds, b1, acc1, is_async=True)
    if DKV:
        acc2 = warpgroup_mma_wait(1, deps=[acc2])
        stages.arrive(memory.b2_empty.index(slot))
    acc1 = warpgroup_mma_wait(0, deps=[acc1])
    stages.arrive(memory.b1_empty.index(slot))
    return acc1, acc2


@gluon.jit
def skip(it, memory):
    """Gives back a streamed tile that only the other half meets."""
    STAGES: gl.constexpr = memory.b1.shape[0]
    slot = it % STAGES
    phase = (it // STAGES) & 1
    mbarrier.wait(memory.b1_full.index(slot), phase)
    stages.arrive(memory.b1_empty.index(slot))
    mbarrier.wait(memory.b2_full.index(slot), phase)
    stages.arrive(memory.b2_empty.index(slot))


# The ends of a tile.


@gluon.jit
def rows_of(terms, base, first, stride, num_places, apart, memory, DKV: gl.constexpr):
    """The places of a half's rows, first + stride * t, and lse (log2) and delta at `base` and a place: `[64]` each.

    For dK, dV these come with the queries.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, stages.layout_of(memory.b1.shape[1]))
    places = first + stride * gl.arange(0, HALF, ROWS)
    lse = gl.zeros([HALF], gl.float32, ROWS)
    delta = lse
    if not DKV:
        inside = places < num_places
        lse = gl.load(terms + base + places, mask=inside, other=0.0)
        delta = gl.load(terms + base + apart + places, mask=inside, other=0.0)
    return places, (lse, delta)


@gluon.jit
def start(turn, memory, WHICH: gl.constexpr, REGISTERS: gl.constexpr = False):
    """Waits for the program's next tile: this half of the pair, and its accumulators.

    With REGISTERS the pair is in registers: the next tile is loaded meanwhile, and products over 64 columns, which else
    read as much shared memory per cycle as there is, read half. `finish` has to know.

    What only one loop reads, and nothing after it, ptxas 12.8 takes to be free after its last use in a step, though the
    next step uses it again: P and dS came to lie there, and every gradient was wrong. So a walk of one loop takes its
    last step after it; `test_triton_compile.py` looks for the fault.
    """
    D: gl.constexpr = memory.b1.shape[2]
    mbarrier.wait(memory.a_full.index(WHICH), turn & 1)
    a1 = memory.a1.index(WHICH)
    a2 = memory.a2.index(WHICH)
    if REGISTERS:
        A: gl.constexpr = gl.DotOperandLayout(0, stages.layout_of(memory.b1.shape[1]), 2)
        a1 = a1.load(A)
        a2 = a2.load(A)
        # The copy engine may overwrite the rows only after these reads.
        fence_async_shared()
        mbarrier.arrive(memory.a_empty.index(WHICH), count=1)
    acc = gl.zeros([HALF, D], gl.float32, stages.layout_of(D))
    return (a1, a2), acc, acc


@gluon.jit
def finish(
    acc1, acc2, batch, head, first, stride, num_rows, grads, strides, scale, memory, DKV: gl.constexpr,
    WHICH: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr = False, REGISTERS: gl.constexpr = False,
):  # fmt: skip
    """Gives the tile's memory back and writes the gradients of its half: WIDTH columns of the rows first,
    first + stride, ..; with ADD, to what is there."""
    D: gl.constexpr = memory.b1.shape[2]
    A: gl.constexpr = stages.layout_of(D)
    if not REGISTERS:
        mbarrier.arrive(memory.a_empty.index(WHICH), count=1)
    rows = first + stride * (WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, A)))
    inside = gl.expand_dims(rows < num_rows, 1)
    at = batch.to(gl.int64) * strides.batch + head * strides.head
    at += gl.expand_dims(rows.to(gl.int64) * strides.row, 1)
    columns = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, A)), 0)
    at += columns
    acc1 = acc1 * scale
    if WIDTH < D:
        inside = inside & (columns < WIDTH)
    if ADD:
        acc1 += gl.load(grads[0] + at, mask=inside, other=0.0).to(gl.float32)
        if DKV:
            acc2 += gl.load(grads[1] + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(grads[0] + at, acc1.to(memory.a1.dtype), mask=inside)
    if DKV:
        gl.store(grads[1] + at, acc2.to(memory.a1.dtype), mask=inside)
