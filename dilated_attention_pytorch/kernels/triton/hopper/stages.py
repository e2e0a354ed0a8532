"""What the programs of the forward kernels are made of: a producer warp fills stages with K and V through the copy
engine (TMA), and two or three warpgroups compute 64 of a tile's rows each from them.

A *stage* is room in shared memory for one block of K and one of V, [BN, D] each. Step number `it` of a program uses
stage it % STAGES for the (it // STAGES)-th time. Barriers say when a stage is full, and when it is empty again.

The product of a step's keys runs while the softmax of the step before is taken: a step issues Q K^T of its own keys and
P V of the last step's, and `state` carries what the next one needs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dilated_attention_pytorch.kernels.triton.hopper import rescale

# Below every logit that is finite; a maximum of -inf would make -inf - -inf.
_LOWEST = gl.constexpr(-3.0e38)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
# Threads of a warpgroup.
GROUP = gl.constexpr(128)


@gluon.jit
def arrive(bar):
    """GROUP arrivals of a warpgroup. Before Gluon's own arrival, which is one thread's, all of them meet (`bar.sync`);
    here no thread waits for another. It is that of a thread's copies to shared memory, of which there are none."""
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.constexpr_function
def layout_of(columns):
    """How a warpgroup holds a product with so many columns, in registers."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that each wait for so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def allocate(q_view, k_view, STAGES: gl.constexpr, GROUPS: gl.constexpr = 2):
    """Shared memory q, k, v and its barriers: q, k and v full and empty, and whose turn it is (`take_turn`)."""
    # A view's blocks are [rows, D], or [1, rows, D].
    RANK: gl.constexpr = len(k_view.block_shape)
    HM: gl.constexpr = q_view.block_shape[RANK - 2]
    BN: gl.constexpr = k_view.block_shape[RANK - 2]
    D: gl.constexpr = k_view.block_shape[RANK - 1]
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HM, D], q_view.dtype)
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], k_view.dtype)
    q = gl.allocate_shared_memory(q_view.dtype, [GROUPS, HM, D], Q)
    k = gl.allocate_shared_memory(k_view.dtype, [STAGES, BN, D], K)
    v = gl.allocate_shared_memory(k_view.dtype, [STAGES, BN, D], K)
    q_full, k_full, v_full = barriers(GROUPS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_empty, k_empty, v_empty = barriers(GROUPS, 1), barriers(STAGES, GROUPS), barriers(STAGES, GROUPS)
    turn = barriers(2, 1)
    fence_async_shared()
    return (q, k, v), (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)


# The producer.


@gluon.jit
def copy_rows(views, is_longer, place, row, bar, to):
    """Starts to load a block: rows from `row` on, at a place.

    Args:
        views: of `views.residue_views`, whose places are columns, or `views.unit_views`, whose places are units; or of
            one dimension, which has rows alone. The second view is of residues that have a row more.
    """
    every, longer = views
    RANK: gl.constexpr = len(every.block_shape)
    if RANK == 1:
        at = [row]
    elif RANK == 2:
        at = [row, place]
    else:
        at = [place, row, 0]
        to = to._reinterpret(every.dtype, every.block_shape, every.layout)
    if longer is None:
        tma.async_copy_global_to_shared(every, at, bar, to)
    else:
        # Two branches of one `if` are merged: the view's address is then in a register, and this warp has few.
        if is_longer:
            tma.async_copy_global_to_shared(longer, at, bar, to)
        if not is_longer:
            tma.async_copy_global_to_shared(every, at, bar, to)


@gluon.jit
def fill(it, k_views, v_views, is_longer, k_place, v_place, row, smem, bars):
    """Loads the blocks of one step, as soon as its stage is empty. Returns the number of the next."""
    _, k_smem, v_smem = smem
    _, _, k_full, k_empty, v_full, v_empty, _ = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    stage = it % STAGES
    phase = (it // STAGES) & 1
    # A barrier that was never passed counts as passed for the phase before the first: a fresh stage is empty.
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), k_views[0].block_type.nbytes)
    copy_rows(k_views, is_longer, k_place, row, k_full.index(stage), k_smem.index(stage))
    mbarrier.wait(v_empty.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), v_views[0].block_type.nbytes)
    copy_rows(v_views, is_longer, v_place, row, v_full.index(stage), v_smem.index(stage))
    return it + 1


@gluon.jit
def fill_queries(which: gl.constexpr, turn, views, is_longer, place, row, smem, bars):
    """Loads a group of a tile's rows, which the warpgroup that reads it lets go."""
    q_smem, _, _ = smem
    q_full, q_empty, _, _, _, _, _ = bars
    mbarrier.wait(q_empty.index(which), (turn & 1) ^ 1)
    mbarrier.expect(q_full.index(which), views[0].block_type.nbytes)
    copy_rows(views, is_longer, place, row, q_full.index(which), q_smem.index(which))


# A warpgroup.


@gluon.constexpr_function
def rest_of(width, columns):
    """Columns of a second, shorter product, where half of a tile's columns and these hold all that a tensor has; 0
    where one product over all columns is no longer."""
    rest = 16
    while rest < width - columns // 2:
        rest *= 2
    return rest if rest < columns // 2 else 0


@gluon.jit
def contract(a, b, WIDTH: gl.constexpr, zero):
    """a b' over WIDTH columns, in flight: what lies beyond is zero in both. Two products where `rest_of` says so."""
    D: gl.constexpr = b.shape[1]
    REST: gl.constexpr = rest_of(WIDTH, D)
    if REST == 0:
        return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    else:
        half = b.slice(0, D // 2, 1).permute((1, 0))
        x = warpgroup_mma(a.slice(0, D // 2, 1), half, zero, use_acc=False, is_async=True)
        return warpgroup_mma(a.slice(D // 2, REST, 1), b.slice(D // 2, REST, 1).permute((1, 0)), x, is_async=True)


@gluon.jit
def take_turn(turn, it, WHICH: gl.constexpr, PINGPONG: gl.constexpr):
    """Where it pays, the warpgroups issue their products in turns, so that one's softmax meets the other's products."""
    if PINGPONG:
        mbarrier.wait(turn.index(WHICH), (it & 1) ^ (1 - WHICH))


@gluon.jit
def give_turn(turn, WHICH: gl.constexpr, PINGPONG: gl.constexpr):
    """The turn is the other warpgroup's."""
    if PINGPONG:
        mbarrier.arrive(turn.index(1 - WHICH), count=1)


@gluon.jit
def begin(it, smem, bars):
    """The state before a tile's first step: P is zero, and V that of the first step, so that P V adds nothing."""
    q_smem, k_smem, _ = smem
    _, _, _, _, v_full, _, _ = bars
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    S: gl.constexpr = layout_of(BN)
    A: gl.constexpr = layout_of(D)
    last = it % STAGES
    mbarrier.wait(v_full.index(last), (it // STAGES) & 1)
    acc = gl.zeros([HM, D], gl.float32, A)
    m = gl.full([HM], _LOWEST, gl.float32, gl.SliceLayout(1, S))
    l = gl.zeros([HM], gl.float32, gl.SliceLayout(1, S))
    p = gl.zeros([HM, BN], q_smem.dtype, gl.DotOperandLayout(0, A, 2))
    return it, last, acc, m, l, p


@gluon.jit
def first_step(
    it, q, bias, edge, qk_scale, smem, bars, MASKED: gl.constexpr, WHICH: gl.constexpr,
    PINGPONG: gl.constexpr, WIDTH: gl.constexpr = 1 << 20, before=None,
):  # fmt: skip
    """`begin` and the first step in one, a product fewer; arguments as those of `step`.

    With `before`, lse (log2) [HM] and out [HM, D] of other keys, the softmax goes on from there.
    """
    q_smem, k_smem, _ = smem
    _, _, k_full, k_empty, v_full, _, turn = bars
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    S: gl.constexpr = layout_of(BN)
    A: gl.constexpr = layout_of(D)
    stage = it % STAGES
    phase = (it // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    take_turn(turn, it, WHICH, PINGPONG)
    zero = gl.zeros([HM, BN], gl.float32, S)
    s = contract(q, k_smem.index(stage), WIDTH, zero)
    give_turn(turn, WHICH, PINGPONG)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
        s = gl.where(columns <= edge, s, -float("inf"))
    # A row of the second half may see none of these keys yet.
    m = gl.maximum(gl.max(s, 1) * qk_scale + bias, _LOWEST)
    if before is not None:
        m = gl.maximum(m, before[0])
    p = gl.exp2(s * qk_scale - gl.expand_dims(m - bias, 1))
    l = gl.sum(p, 1)
    p = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, A, 2))
    mbarrier.wait(v_full.index(stage), phase)
    if before is None:
        acc = gl.zeros([HM, D], gl.float32, A)
    else:
        # As of one key, whose value is that out.
        weight = gl.exp2(before[0] - m)
        l += weight
        acc = before[1].to(gl.float32) * gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(1, A)), 1)
    return it + 1, stage, acc, m, l, p


@gluon.jit
def step(
    state, q, bias, edge, begun, qk_scale, smem, bars, MASKED: gl.constexpr, WHICH: gl.constexpr,
    PINGPONG: gl.constexpr, WIDTH: gl.constexpr = 1 << 20,
):  # fmt: skip
    """Takes one block of keys into a tile's state.

    Args:
        q: the rows [HM, D], in shared memory or registers.
        bias: log2 of the keys' multiplicity.
        edge: with MASKED, the last column that counts, a number or one for each row [HM, 1].
        WIDTH: columns that q and k have; those beyond are zero, if q is in shared memory.
        begun: number of the tile's first step, if `begin` made the state; else one before it.
    """
    it, last, acc, m, l, p = state
    q_smem, k_smem, v_smem = smem
    _, _, k_full, k_empty, v_full, v_empty, turn = bars
    HM: gl.constexpr = q_smem.shape[1]
    BN: gl.constexpr = k_smem.shape[1]
    STAGES: gl.constexpr = k_smem.shape[0]
    S: gl.constexpr = layout_of(BN)
    A: gl.constexpr = layout_of(k_smem.shape[2])
    stage = it % STAGES
    phase = (it // STAGES) & 1

    # Logits of this step's keys, [HM, D] x [D, BN]; P V of the last step's, [HM, BN] x [BN, D], goes on beside them.
    mbarrier.wait(k_full.index(stage), phase)
    take_turn(turn, it, WHICH, PINGPONG)
    # What a product starts from has to be given, though it is not read.
    zero = gl.zeros([HM, BN], gl.float32, S)
    s = contract(q, k_smem.index(stage), WIDTH, zero)
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    give_turn(turn, WHICH, PINGPONG)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)

    # Softmax online. The bias is subtracted once per row, not added to each logit.
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0)
        s = gl.where(columns <= edge, s, -float("inf"))
    SELDOM: gl.constexpr = rescale.is_seldom(k_smem.shape[2], BN)
    m_new = rescale.moved(m, gl.max(s, 1) * qk_scale + bias, SELDOM)
    p = gl.exp2(s * qk_scale - gl.expand_dims(m_new - bias, 1))
    alpha = gl.exp2(m - m_new)
    l = l * alpha + gl.sum(p, 1)
    # Three warpgroups have registers for one P: it is made in those of the last step's, once its product is done.
    LATE: gl.constexpr = q_smem.shape[0] == 3
    if not LATE:
        p = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, A, 2))

    # A wait for a barrier ends a basic block: without it ptxas moves the softmax below the wait for the product.
    mbarrier.wait(v_full.index(stage), phase)
    acc, p, l, alpha = warpgroup_mma_wait(0, deps=[acc, p, l, alpha])
    if LATE:
        p = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, A, 2))
    mbarrier.arrive(v_empty.index(last), count=1, pred=it > begun)
    # The product with this step's P starts from the rescaled sum, one step later.
    acc = rescale.rescaled(acc, gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1), SELDOM)
    return it + 1, stage, acc, m_new, l, p


@gluon.jit
def finish(state, smem, bars):
    """The last step's P V. Returns the number of the next step, out [HM, D] and lse [HM]."""
    it, last, acc, m, l, p = state
    _, _, v_smem = smem
    _, _, _, _, _, v_empty, _ = bars
    A: gl.constexpr = layout_of(v_smem.shape[2])
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l, gl.SliceLayout(1, A)), 1)
    return it, acc, (m + gl.log2(l)) * LN2


@gluon.jit
def write(
    results, value, value_lse, batch, head, first, stride, num_rows, num_heads, S: gl.constexpr, EVEN: gl.constexpr
):
    """Stores rows first, first + stride, .. to out (B, N, H, D) and lse (B, H, N), both contiguous."""
    out, lse = results
    A: gl.constexpr = layout_of(value.shape[1])
    HM: gl.constexpr = value.shape[0]
    D: gl.constexpr = value.shape[1]
    batch64 = batch.to(gl.int64)
    # lse lies as the logits' rows do, out as the accumulator's.
    rows = first + stride * gl.arange(0, HM, gl.SliceLayout(1, S))
    lse_at = lse + (batch64 * num_heads + head) * num_rows + rows
    out_rows = first + stride * gl.arange(0, HM, gl.SliceLayout(1, A))
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, A)), 0)
    out_at = out + (batch64 * num_rows * num_heads + head) * D
    out_at += gl.expand_dims(out_rows.to(gl.int64) * (num_heads * D), 1) + d
    if EVEN:
        gl.store(lse_at, value_lse)
        gl.store(out_at, value.to(out.dtype.element_ty))
    else:
        gl.store(lse_at, value_lse, mask=rows < num_rows)
        gl.store(out_at, value.to(out.dtype.element_ty), mask=gl.expand_dims(out_rows < num_rows, 1))


@gluon.jit
def skip(it, number, smem, bars, WHICH: gl.constexpr = 0, PINGPONG: gl.constexpr = False):
    """Lets steps pass that only other warpgroups take."""
    _, k_smem, _ = smem
    _, _, k_full, k_empty, v_full, v_empty, turn = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    for _i in range(0, number):
        stage = it % STAGES
        phase = (it // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        take_turn(turn, it, WHICH, PINGPONG)
        give_turn(turn, WHICH, PINGPONG)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)
        it += 1
    return it
