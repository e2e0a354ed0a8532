"""Attention along a curve: against the dense definition, causality by original position, and real ranks against one."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import hilbert_tasks as tasks
import pytest
import torch
from ring_pool import Pool
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, MultiheadDilatedAttention, dilated_attention
from dilated_attention_pytorch.kernels.hilbert import CurveOrder, grid_coords, hilbert_order
from dilated_attention_pytorch.ring_attention import (
    HilbertRingAttention,
    RingAttentionConfig,
    RingDilatedAttentionHilbert,
)
from dilated_attention_pytorch.ring_attention.variants.hilbert import causal_layout
from dilated_attention_pytorch.testing import relative_norm

# Routing in fp64: sums over the same terms in another order.
TOLERANCE = 1e-12

PATTERNS: tuple[dict[str, Any], ...] = (
    {"segment_lengths": [7, 16, 64], "dilation_rates": [1, 3, 2]},
    {"segment_lengths": [4, 32, 200], "dilation_rates": [1, 2, 4], "offsets": "blocked"},
    {"segment_lengths": [5], "dilation_rates": [8]},
    {"segment_lengths": [6, 30], "dilation_rates": [1, 2], "segment_shift": 11},
)
PLACES: tuple[dict[str, Any], ...] = (
    {"grid": (9, 7)},
    {"grid": (3, 3, 5)},
    {"coords": torch.randint(0, 6, (50, 2), generator=torch.Generator().manual_seed(0)).double()},
)


def length_of(place: dict[str, Any]) -> int:
    return len(hilbert_order(**place).order)


def dense(
    order: CurveOrder, pattern: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in original order: branches along the curve, "later" in the original sequence."""
    pattern = dict(pattern)
    shift = pattern.pop("segment_shift", 0)
    branches = DilatedPattern(num_heads=k.shape[2], **pattern)
    group, place = q.shape[2] // k.shape[2], order.inverse + shift
    member = branches.membership(place).repeat_interleave(group, 1)
    count = torch.zeros(q.shape[2], len(place), len(place), dtype=q.dtype)
    for i, (length, _) in enumerate(branches.branches):
        same = (place // length)[:, None] == (place // length)[None, :]
        count += member[i, :, :, None] & member[i, :, None, :] & same
    if is_causal:
        count = count.tril()
    count = count * mask[:, None, None, :] * mask[:, None, :, None]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    weights = count * (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).exp()
    total = weights.sum(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weights / total.where(total > 0, 1.0)[..., None], v)
    return out, total.where(total > 0, 1.0).log().masked_fill(total == 0, -torch.inf)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("pattern", range(len(PATTERNS)))
@pytest.mark.parametrize("kind", tasks.CLASSES)
def test_the_definition(kind: str, pattern: int, place: int, masked: bool, is_causal: bool) -> None:
    order, heads = hilbert_order(**PLACES[place]), (4, 2)
    length = len(order.order)
    *tensors, mask = tasks.inputs(length, heads, masked)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    out, lse = dense(order, PATTERNS[pattern], q, k, v, mask, is_causal)
    seen = ~torch.isneginf(lse)
    objective = (out * tensors[3]).sum() + (lse[seen] * tensors[4][seen]).sum()
    want = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(objective, (q, k, v)), strict=True))
    want |= {"out": out.detach(), "lse": lse.detach().transpose(1, 2)}
    got = tasks.attend(None, 1, kind, length, heads, masked, is_causal, None, PATTERNS[pattern], PLACES[place])
    assert got is not None
    for name, expected in want.items():
        result = order.undo(got[name]) if kind == "curve" else got[name]
        assert relative_norm(result, expected) <= TOLERANCE, name


@pytest.mark.parametrize("kind", tasks.CLASSES)
def test_no_future_token_leaks(kind: str) -> None:
    """By gradient and by perturbing: what comes later in the original sequence changes nothing, wherever it stands."""
    order = hilbert_order(grid=(6, 7))
    attention = tasks.make(kind, None, {"segment_lengths": [5, 16, 42], "dilation_rates": [1, 2, 1]}, grid=(6, 7))
    qkv = [torch.randn(1, 42, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "original":
            return attention(q, k, v, is_causal=True)
        return order.undo(attention(*(order.apply(x) for x in (q, k, v)), is_causal=True))

    for i in (1, 2):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, i=i: run(*qkv[:i], x, *qkv[i + 1 :]).sum((0, 2, 3)), qkv[i]
        ).square().sum((1, 3, 4))  # fmt: skip
        assert bool((jacobian.triu(1) == 0).all())
        if i == 2:  # and the past is not cut off: everybody sees at least itself, most see more
            assert bool((jacobian.diagonal() > 0).all())
            assert int((jacobian.tril(-1) > 0).sum()) > 42
    before = run(*qkv)
    for n in (0, 13, 30):
        changed = [x.clone() for x in qkv]
        for x in changed:
            x[:, n + 1 :] = 1e3
        after = run(*changed)
        assert torch.equal(before[:, : n + 1], after[:, : n + 1])
        assert not torch.equal(before[:, n + 1 :], after[:, n + 1 :])


def test_along_the_curve_is_another_causality() -> None:
    """What one gets for the asking: a plain causal call on the ordered sequence, which does look ahead."""
    pattern = {"segment_lengths": [8, 42], "dilation_rates": [1, 2]}
    order = hilbert_order(grid=(6, 7))
    q, k, v = tasks.inputs(42, (2, 2), False)[:3]
    want = order.undo(dilated_attention(*(order.apply(x) for x in (q, k, v)), **pattern, is_causal=True))
    for kind in tasks.CLASSES:
        along = tasks.make(kind, None, pattern, grid=(6, 7), causal_along="curve")
        by_position = tasks.make(kind, None, pattern, grid=(6, 7))
        if kind == "original":
            got, other = along(q, k, v, is_causal=True), by_position(q, k, v, is_causal=True)
        else:
            ordered = [order.apply(x) for x in (q, k, v)]
            got, other = (order.undo(a(*ordered, is_causal=True)) for a in (along, by_position))
        assert torch.equal(got, want)
        assert relative_norm(other, want) > 0.01


def test_the_layout_moves_rows_only_among_their_own() -> None:
    order = hilbert_order(grid=(11, 9))
    place = torch.arange(99)
    for length, rate in ((1, 1), (7, 3), (32, 4), (200, 8), (4, 9)):
        layout = causal_layout(order, length, rate)
        assert torch.equal(layout.sort().values, place)
        assert torch.equal(layout // length, place // length)
        assert torch.equal(layout % length % rate, place % length % rate)
        for segment, residue in itertools.product(range(-(-99 // length)), range(rate)):
            row = order.order[layout[segment * length : (segment + 1) * length][residue::rate]]
            assert bool((row.diff() > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_a_plain_call(dtype: torch.dtype) -> None:
    """Branches merge in fp32 and are rounded once more than in a call of all of them."""
    pattern = {"segment_lengths": [16, 64, 256], "dilation_rates": [1, 2, 4]}
    q, k, v = (torch.randn(2, 256, 4, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    exact = [x.double() for x in (q, k, v)]
    config = RingAttentionConfig(**pattern)
    attention = HilbertRingAttention(config, grid=(16, 16))
    ours = relative_norm(attention(q, k, v, is_causal=True), attention(*exact, is_causal=True))
    plain = relative_norm(
        dilated_attention(q, k, v, **pattern, is_causal=True), dilated_attention(*exact, **pattern, is_causal=True)
    )
    assert ours <= 2 * plain
    assert attention(q, k, v, is_causal=True).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """The kernels that CUDA chooses, forward and backward, judged as above."""
    pattern = {"segment_lengths": [64, 1000, 5000], "dilation_rates": [1, 2, 4]}
    attention = HilbertRingAttention(RingAttentionConfig(**pattern), grid=(70, 61))
    drawn = [torch.randn(1, 4270, 4, 64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]

    def run(cotangent: Tensor, *qkv: Tensor, plain: bool) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in qkv]
        if plain:
            out = dilated_attention(*inputs, **pattern, is_causal=True)
        else:
            out = attention(*inputs, is_causal=True)
        return out.cpu(), *(g.cpu() for g in torch.autograd.grad(out, inputs, cotangent))

    errors = []
    for plain in (False, True):
        got = run(*(x.cuda() for x in drawn), plain=plain)
        want = run(*(x.double() for x in drawn), plain=plain)
        errors.append([relative_norm(a, b) for a, b in zip(got, want, strict=True)])
    assert all(ours <= 2 * plain for ours, plain in zip(*errors, strict=True)), errors
    coords = grid_coords((70, 61))
    assert torch.equal(hilbert_order(coords.cuda()).order.cpu(), hilbert_order(coords).order)


WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(3, [1, 2, 3], "hilbert_tasks")
    yield pool
    pool.close()


def gathered(pool: Pool, world_size: int, *arguments: Any) -> dict[str, Tensor]:
    shards = pool.run("attend", world_size, *arguments)[:world_size]
    return {name: torch.cat([shard[name] for shard in shards], 1) for name in shards[0]}


CASES: list[tuple[int, int, bool, bool, int | None, dict[str, Any]]] = [
    # pattern, place, masked, causal, dropout seed, further settings
    (0, 0, True, True, None, {}),
    (0, 0, False, False, None, {}),
    (1, 1, True, True, None, {"mode": "ring"}),
    (1, 2, False, True, 7, {"dropout": 0.4}),
    (2, 0, False, True, None, {"check": "always"}),
    (1, 0, True, False, 3, {"dropout": 0.4, "mode": "gather"}),
    (0, 0, False, True, None, {"causal_along": "curve"}),
    (0, 2, False, True, None, {"curve": "morton", "check": "never"}),
]


@pytest.mark.parametrize("kind", tasks.CLASSES)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_world_size_gives_what_one_device_gives(pool: Pool, kind: str, number: int) -> None:
    pattern, place, masked, is_causal, seed, more = CASES[number]
    length = length_of(PLACES[place])
    if more.get("check") == "never":  # for which shards must be equally long
        length = 48
        settings = {"coords": PLACES[place]["coords"][:48], **more}
    else:
        settings = {**PLACES[place], **more}
    arguments = (kind, length, (4, 2), masked, is_causal, seed, PATTERNS[pattern], settings)
    want = tasks.attend(None, 1, *arguments)
    assert want is not None
    for world_size in WORLD_SIZES:
        got = gathered(pool, world_size, *arguments)
        for name in want:
            assert relative_norm(got[name], want[name]) <= TOLERANCE, (world_size, name)


def test_both_classes_give_the_same(pool: Pool) -> None:
    order = hilbert_order(grid=(9, 7))
    for is_causal in (False, True):
        arguments = (63, (4, 2), True, is_causal, None, PATTERNS[0], {"grid": (9, 7)})
        along, original = (gathered(pool, 3, kind, *arguments) for kind in ("curve", "original"))
        for name in along:
            assert relative_norm(order.undo(along[name]), original[name]) <= TOLERANCE


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (5, 1)])
def test_fewer_tokens_than_would_fill_the_ranks(pool: Pool, grid: tuple[int, int]) -> None:
    for kind in tasks.CLASSES:
        arguments = (kind, grid[0] * grid[1], (2, 1), False, True, None, PATTERNS[0], {"grid": grid})
        want, got = tasks.attend(None, 1, *arguments), gathered(pool, 3, *arguments)
        assert want is not None
        for name in want:
            assert relative_norm(got[name], want[name]) <= TOLERANCE, name


def test_rows_put_in_the_wrong_place_are_seen(pool: Pool) -> None:
    arguments = ("original", 63, (4, 2), False, True, None, PATTERNS[0], {"grid": (9, 7)})
    want = tasks.attend(None, 1, *arguments)
    assert want is not None
    broken = gathered(pool, 3, *arguments, True)
    assert relative_norm(broken["out"], want["out"]) > 1e-3


def test_ranks_with_different_orders_all_say_so(pool: Pool) -> None:
    errors = pool.run("different_orders", 3)
    assert len(set(errors)) == 1 and "ranks disagree on curve order" in errors[0], errors


def test_each_rank_owns_a_compact_region() -> None:
    for world_size, sides in ((4, (16, 16)), (16, (8, 8)), (2, (16, 32))):
        attention = RingDilatedAttentionHilbert(
            RingAttentionConfig(segment_lengths=[64], dilation_rates=[1]), grid=(32, 32)
        )
        attention.world_size = world_size
        for rank in range(world_size):
            attention.rank = rank
            held = attention.own_rows(attention.apply_hilbert_ordering(grid_coords((32, 32)), 0), 0)
            assert tuple((held.amax(0) - held.amin(0) + 1).tolist()) == sides


def test_a_drop_in_inside_a_multi_head_module() -> None:
    torch.manual_seed(0)
    pattern = {"segment_lengths": [16, 64], "dilation_rates": [1, 2]}
    plain = MultiheadDilatedAttention(8, 2, **pattern, dtype=torch.float64)
    ordered = copy.deepcopy(plain)
    ordered.attention = HilbertRingAttention(RingAttentionConfig(**pattern), grid=(10, 8))
    x, order = torch.randn(2, 80, 8, dtype=torch.float64), hilbert_order(grid=(10, 8))
    want = order.undo(plain(*[order.apply(x)] * 3)[0])
    assert relative_norm(ordered(x, x, x)[0], want) <= TOLERANCE
    assert set(plain.state_dict()) == set(ordered.state_dict())


def test_copies_pickles_and_the_next_slide() -> None:
    attention = HilbertRingAttention(RingAttentionConfig(segment_lengths=[16], dilation_rates=[2]), grid=(6, 6))
    x = torch.randn(1, 36, 2, 4)
    want = attention(x, x, x, is_causal=True)
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(x, x, x, is_causal=True), want)
    attention.set_order(grid=(4, 9))
    other = attention(x, x, x, is_causal=True)
    assert not torch.equal(other, want)
    attention.set_order(grid=(6, 6))
    assert torch.equal(attention(x, x, x, is_causal=True), want)
    assert "curve='hilbert'" in repr(attention)


def test_dropout_is_on_in_training_alone() -> None:
    config = RingAttentionConfig(segment_lengths=[16, 36], dilation_rates=[1, 1], dropout=0.5)
    attention = HilbertRingAttention(config, grid=(6, 6))
    x = torch.randn(1, 36, 2, 4)
    first, again = (attention(x, x, x, is_causal=True, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, attention(x, x, x, is_causal=True, seed=torch.tensor(5)))
    assert not torch.equal(first, attention(x, x, x, is_causal=True, seed=6))
    attention.eval()
    assert torch.equal(*(attention(x, x, x, is_causal=True) for _ in range(2)))


def test_bad_input_is_named() -> None:
    config = RingAttentionConfig(segment_lengths=[16], dilation_rates=[1])
    x = torch.randn(1, 36, 2, 4)
    with pytest.raises(ValueError, match="expected the tokens' places by grid=, coords= or set_order"):
        HilbertRingAttention(config)(x, x, x)
    with pytest.raises(ValueError, match=r"expected 42 positions on rank 0 of 1, .* got 36"):
        HilbertRingAttention(config, grid=(6, 7))(x, x, x)
    with pytest.raises(TypeError, match="expected config to be of RingAttentionConfig, got tuple"):
        HilbertRingAttention((8,), (1,), grid=(6, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected causal_along to be one of"):
        HilbertRingAttention(config, causal_along="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected curve to be one of"):
        HilbertRingAttention(config, curve="peano")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got both"):
        HilbertRingAttention(config, grid=(6, 6), coords=torch.zeros(36, 2))
