"""Ring attention against one device: real gloo ranks, fp64, random cotangents, every rank, every result."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ring_tasks
import torch
from ring_pool import Pool
from ring_tasks import SPREAD, TOLERANCE, RingCase, drawn, filled_up

from dilated_attention_pytorch import AttentionOutput, DilatedPattern, merge_attention
from dilated_attention_pytorch.ring_attention import LSEAccumulator, RingAttentionConfig, RingDilatedAttention
from dilated_attention_pytorch.ring_attention.call import choose_mode
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
from dilated_attention_pytorch.ring_attention.plan import RingPlan, closed_form_units, equal_bounds, unit_bytes
from dilated_attention_pytorch.testing import relative_norm

WORLD_SIZES = (1, 2, 3, 4, 8)
MODES = ("sparse", "ring", "gather", "auto")
CONFIGURATIONS = 160
BATCH = 10  # configurations a test


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(8, [n for n in WORLD_SIZES if n > 1], "ring_tasks")
    yield pool
    pool.close()


def jobs_of(cases: list[RingCase], world_sizes: tuple[int, ...] = WORLD_SIZES) -> list[tuple[Any, ...]]:
    """Every case at every world size in every mode, but for what is there twice or costs most.

    One rank alone returns before it reads the mode. `"auto"` picks one of the other three modes for the same call, so
    the world sizes take turns with it. Eight ranks cost as much as all fewer ones together: every second case.
    """
    jobs: list[tuple[Any, ...]] = []
    several = [size for size in world_sizes if size > 1]
    for case in cases:
        turns = {(1, "auto"), (several[case.seed % len(several)], "auto")}
        for size, mode in itertools.product(world_sizes, MODES):
            if (size, mode) in turns or (mode != "auto" and (size in (2, 3, 4) or (size == 8 and case.seed % 2 == 0))):
                jobs.append((case, size, mode, torch.float64))
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, BATCH))
def test_every_rank_has_what_one_device_has(pool: Pool, first: int) -> None:
    cases = [drawn(number) for number in range(first, first + BATCH)]
    jobs = jobs_of(cases)
    results = pool.run("run_cases", jobs)
    wanted = {case.seed: case.whole() for case in cases}
    for i, (case, world_size, mode, _) in enumerate(jobs):
        errors = case.errors([results[rank][i] for rank in range(world_size)], wanted[case.seed])
        assert max(errors.values()) <= TOLERANCE, (mode, world_size, errors, case)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(400, 440, BATCH))
def test_segment_shift_is_that_of_one_device(pool: Pool, first: int) -> None:
    cases = [drawn(number) for number in range(first, first + BATCH)]
    for number, case in enumerate(cases):
        case.pattern["segment_shift"] = (1, 5, 8, 16, 30, 33, 64, 100, 150, 200)[number % 10]
    jobs = jobs_of(cases, (1, 2, 3, 4))
    results = pool.run("run_cases", jobs)
    wanted = {case.seed: case.whole(backend="reference") for case in cases}
    for i, (case, world_size, mode, _) in enumerate(jobs):
        errors = case.errors([results[rank][i] for rank in range(world_size)], wanted[case.seed])
        assert max(errors.values()) <= 1e-10, (mode, world_size, errors, case)


def test_an_empty_batch_is_as_good_as_any(pool: Pool) -> None:
    for is_causal, remote_rows in itertools.product((False, True), ("keep", "refetch")):
        case = RingCase(24, 0, 2, 2, 4, SPREAD, is_causal=is_causal, options={"remote_rows": remote_rows})
        for mode in MODES:
            results = pool.run("run_cases", [(case, 3, mode, torch.float64)])
            for rank in range(3):
                assert {name: tuple(x.shape) for name, x in results[rank][0].items()} == {
                    "out": (0, 8, 4, 4), "lse": (0, 4, 8), "dq": (0, 8, 4, 4), "dk": (0, 8, 2, 4), "dv": (0, 8, 2, 4)
                }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 40, BATCH))
def test_zero_keys_are_those_of_one_device(pool: Pool, first: int) -> None:
    cases = [filled_up(number) for number in range(first, first + BATCH)]
    jobs = jobs_of(cases)
    results, filled = pool.run("run_cases", jobs), []
    for case in cases:
        bare = replace(case, padding="none")
        wanted = case.whole()
        assert case.errors([case.whole(backend="reference")], wanted)["lse"] <= TOLERANCE
        for i, (_, world_size, mode, _) in enumerate(jobs):
            if jobs[i][0] is case:
                errors = case.errors([results[rank][i] for rank in range(world_size)], wanted)
                assert max(errors.values()) <= TOLERANCE, (mode, world_size, errors, case)
        filled.append(relative_norm(bare.whole()["out"], wanted["out"]))
    assert max(filled) > 0.01  # it is not for want of zero keys


def test_zero_keys_go_without_what_they_cannot_have(pool: Pool) -> None:
    def errors(config: dict[str, Any], **call: Any) -> set[str]:
        return set(pool.run("refused", {"padding": "zero_keys", **config}, call))

    (moved,) = errors({"segment_lengths": [8, 20], "dilation_rates": [2, 3]})
    assert "got the branch (w=20, r=3) and 64 positions: the official code moves its rows" in moved
    assert errors({"segment_lengths": [8, 64], "dilation_rates": [2, 3]}) == {"nothing"}
    for call in ({"is_causal": True}, {"key_padding_mask": torch.ones(1, 8, dtype=torch.bool)}):
        (refused,) = errors({"segment_lengths": [8]}, **call)
        assert "expected is_causal=False and no key_padding_mask with padding='zero_keys'" in refused


def test_the_oracle_is_the_reference() -> None:
    """One device's sdpa, which the ranks are held to, against the dense definition."""
    for number in range(20):
        case = drawn(number)
        errors = case.errors([case.whole(backend="reference")], case.whole())
        assert max(errors.values()) <= TOLERANCE, (errors, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient_dtype", [None, "input"])
def test_low_precision_errs_at_most_twice_as_much_as_one_device(
    pool: Pool, dtype: torch.dtype, gradient_dtype: str | None
) -> None:
    options = {} if gradient_dtype is None else {"gradient_dtype": dtype}
    pattern = {"segment_lengths": [16, 64, 256], "dilation_rates": [1, 2, 4]}
    shape = {"batch": 2, "kv_heads": 4, "group": 2, "width": 16}
    for settings in ({}, {"is_causal": True}, {"padding": "zero_keys", "length": 250}):
        case = RingCase(**{"length": 256, **settings}, **shape, pattern=pattern, seed=3, options=options)
        alone, rounded = case.whole(dtype), case.whole_of_rounded(dtype)
        for world_size, mode in itertools.product((2, 4), MODES):
            results = pool.run("run_cases", [(case, world_size, mode, dtype)])
            for name in rounded:
                got = torch.cat([results[r][0][name] for r in range(world_size)], 2 if name == "lse" else 1)
                ours, theirs = relative_norm(got, rounded[name]), relative_norm(alone[name], rounded[name])
                assert ours <= 2 * theirs, (mode, world_size, name, ours, theirs)


@pytest.mark.parametrize("mode", ["sparse", "ring"])
@pytest.mark.parametrize("mutation", ring_tasks.MUTATIONS)
def test_broken_routing_is_seen(pool: Pool, mutation: str, mode: str) -> None:
    """A comparison that cannot go red proves nothing."""
    case = RingCase(64, 1, 4, 1, 4, SPREAD, seed=1, options={"remote_rows": "keep"})
    for world_size in (2, 4):
        want = case.whole()
        healthy = pool.run("run_cases", [(case, world_size, mode, torch.float64)])
        assert max(case.errors([healthy[r][0] for r in range(world_size)], want).values()) <= TOLERANCE
        broken = pool.run("run_cases", [(case, world_size, mode, torch.float64)], mutation)
        errors = case.errors([broken[r][0] for r in range(world_size)], want)
        assert max(errors.values()) > 1e-3, (mutation, world_size, errors)


@pytest.mark.parametrize("remote_rows", ["keep", "refetch"])
@pytest.mark.parametrize("mode", ["sparse", "ring"])
def test_bytes_are_the_closed_form(pool: Pool, mode: str, remote_rows: str) -> None:
    options = {"remote_rows": remote_rows}
    for world_size in (2, 4, 8):
        case = RingCase(
            128, 2, 4, 3, 5, {"segment_lengths": [4, 64, 128], "dilation_rates": [1, 2, 4]}, options=options
        )
        pattern = DilatedPattern((4, 64, 128), (1, 2, 4), 4)
        units = closed_form_units(pattern, 128, world_size)
        assert units is not None
        rows = units * unit_bytes(2, 5, 8)
        again = 2 if mode == "ring" or remote_rows == "refetch" else 1
        for rank, traffic in enumerate(pool.run("count", case, world_size, mode, torch.float64)[:world_size]):
            assert traffic["received"] == {"rows": again * rows, "gradients": rows}, rank
            assert traffic["sent"] == traffic["received"]
            per_exchange = 1 if mode == "sparse" else world_size - 1
            assert traffic["calls"] == {"rows": again * per_exchange, "gradients": per_exchange}


def test_bytes_of_any_plan_are_the_plans(pool: Pool) -> None:
    for number, world_size in itertools.product(range(8), (2, 3, 8)):
        case = drawn(number)
        case.options = {"gradient_dtype": torch.float32}
        pattern = DilatedPattern(num_heads=case.kv_heads, **case.pattern)
        for rank, traffic in enumerate(pool.run("count", case, world_size, "sparse", torch.float64)[:world_size]):
            plan = RingPlan(pattern, tuple(case.bounds(world_size)), rank, case.is_causal)
            here = plan.received_bytes(case.batch, case.width, 8), plan.sent_bytes(case.batch, case.width, 8)
            assert (traffic["received"].get("rows", 0), traffic["sent"].get("rows", 0)) == here
            assert traffic["received"].get("gradients", 0) == here[1] // 2  # fp32 on the wire
            assert traffic["sent"].get("gradients", 0) == here[0] // 2


@pytest.mark.parametrize(
    ("seq_len", "world_size", "lengths", "rates", "heads", "mib"),
    [
        (131072, 4, (2048, 32768), (1, 4), 32, 0),
        (1 << 20, 8, (2048, 262144, 1048576), (1, 8, 32), 32, 640),
        (262144, 8, (2048, 65536, 131072, 262144), (1, 2, 4, 8), 32, 768),
    ],
)
def test_published_byte_table(
    seq_len: int, world_size: int, lengths: tuple[int, ...], rates: tuple[int, ...], heads: int, mib: int
) -> None:
    pattern = DilatedPattern(lengths, rates, heads)
    units = closed_form_units(pattern, seq_len, world_size)
    assert units is not None and units * unit_bytes(1, 128, 2) == mib * 2**20
    plan = RingPlan(pattern, equal_bounds(seq_len, world_size), world_size - 1, False)
    assert plan.received_bytes(1, 128, 2) == plan.sent_bytes(1, 128, 2) == mib * 2**20


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_balanced_shards(world_size: int, is_causal: bool) -> None:
    """Against trying all bounds: none of them leaves the busiest rank less to do."""
    pattern, n, step = DilatedPattern((8, 24, 96), (1, 2, 4), 4), 96, 8

    def busiest(bounds: tuple[int, ...]) -> float:
        return max(
            pattern.pairs(n, is_causal=is_causal, q_range=(a, b)) * (1.0 if pattern.repeats_from(a, b) else 1.5)
            for a, b in itertools.pairwise(bounds)
        )

    bounds = balanced_bounds(pattern, n, world_size, is_causal=is_causal, multiple=step)
    assert len(bounds) == world_size + 1 and (bounds[0], bounds[-1]) == (0, n)
    every = itertools.combinations_with_replacement(range(0, n + 1, step), world_size - 1)
    assert busiest(bounds) == min(busiest((0, *inner, n)) for inner in every)


def test_bounds_for_many_ranks_take_a_step_per_pair_of_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(DilatedPattern, "repeats_from", lambda *_: asked.append(1) is None)
    assert len(balanced_bounds(DilatedPattern((8,), (1,), 2), 100, 50, multiple=1)) == 51
    assert len(asked) == 101 * 100 // 2  # whatever the number of ranks


def test_bounds_that_make_no_sense_are_refused() -> None:
    pattern = DilatedPattern((8,), (1,), 2)
    for given, message in (
        ((-5, 2), "expected seq_len to be at least 0, got -5"),
        ((8, 0), "expected world_size to be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            balanced_bounds(pattern, *given)
    with pytest.raises(ValueError, match="expected multiple to be at least 1, got 0"):
        balanced_bounds(pattern, 8, 2, multiple=0)


def test_gathering_costs_what_dense_costs(pool: Pool) -> None:
    case = RingCase(96, 2, 4, 3, 5, {"segment_lengths": [64], "dilation_rates": [2]})
    for world_size in (2, 3, 8):
        dense = (world_size - 1) * (96 // world_size) * 4 * unit_bytes(2, 5, 8)
        for traffic in pool.run("count", case, world_size, "gather", torch.float64)[:world_size]:
            assert traffic["received"] == traffic["sent"] == {"rows": dense, "gradients": dense}


def test_local_branches_move_nothing(pool: Pool) -> None:
    case = RingCase(64, 1, 4, 1, 4, {"segment_lengths": [4, 16], "dilation_rates": [1, 2]}, masked=True)
    for traffic in pool.run("count", case, 4, "sparse", torch.float64)[:4]:
        assert traffic == {"sent": {}, "received": {}, "calls": {}}


def test_auto_decides_from_the_plans_bytes() -> None:
    def chosen(lengths: tuple[int, ...], rates: tuple[int, ...], world_size: int) -> set[str]:
        pattern, bounds = DilatedPattern(lengths, rates, 4), equal_bounds(64, world_size)
        return {choose_mode(RingPlan(pattern, bounds, rank, False)) for rank in range(world_size)}

    assert chosen((8,), (1,), 8) == {"sparse"}
    assert chosen((64,), (4,), 8) == {"sparse"}
    assert chosen((64,), (1,), 8) == {"gather"}
    assert chosen((64,), (1,), 2) == {"gather"}
    assert chosen((128, 64), (2, 3), 8) == {"ring"}


def test_a_backend_over_the_op(pool: Pool) -> None:
    """The ring asks nothing of a backend but its two functions; results may come rounded to the inputs' dtype."""
    cases = [drawn(number) for number in range(300, 308)]
    jobs = list(itertools.product(cases, (2, 3), MODES, (torch.float64,)))
    results = pool.run("run_cases", jobs, "through_the_op")
    for i, (case, world_size, _, _) in enumerate(jobs):
        errors = case.errors([results[rank][i] for rank in range(world_size)], case.whole())
        assert max(errors.values()) <= TOLERANCE, (errors, case)


def test_accumulator_is_the_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        AttentionOutput(
            torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64),
            200 * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64),
        )
        for _ in range(4)
    ]
    parts.append(AttentionOutput(torch.zeros_like(parts[0].out), torch.full_like(parts[0].lse, -torch.inf)))
    want = functools.reduce(merge_attention, parts)
    whole = LSEAccumulator(AttentionOutput(*(x.clone() for x in parts[-1])))
    by_rows = LSEAccumulator(AttentionOutput(*(x.clone() for x in parts[0])), num_kv_heads=2)
    for part in parts:
        whole.add(part)
    rows, heads = torch.arange(5).expand(2, 5), torch.arange(2)
    for part in parts[1:]:
        out = part.out.unflatten(2, (2, 2)).permute(0, 2, 1, 3, 4)
        by_rows.add_rows(rows, heads, out, part.lse.unflatten(1, (2, 2)).transpose(2, 3).unsqueeze(-1))
    for got in (whole, by_rows):
        out, lse = got.result(torch.float64)
        assert relative_norm(out, want.out) < 1e-14 and relative_norm(lse, want.lse) < 1e-14
    kept = [x.clone() for x in (out, lse)]
    by_rows.add(parts[1])
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])  # what was read stays
    with pytest.raises(ValueError, match=r"expected a partial of out \(2, 5, 4, 3\) .* got \(2, 1, 4, 3\)"):
        whole.add(AttentionOutput(parts[0].out[:, :1], parts[0].lse[..., :1]))


@pytest.mark.parametrize("keep", ["keep", "refetch"])
def test_compiles_as_one_graph(pool: Pool, keep: str) -> None:
    assert pool.run("compiled", 2, "aot_eager", keep)[:2] == [True, True]


@pytest.mark.parametrize("keep", [False, True])
def test_op_passes_torchs_own_checks(pool: Pool, keep: bool) -> None:
    for found in pool.run("checked_op", 2, keep)[:2]:
        assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "fsdp2"])
def test_multihead_module(pool: Pool, wrap: bool) -> None:
    results = pool.run("multihead", 3, wrap)[:3]
    attention, x, cotangent = ring_tasks.multihead_inputs(None)
    out = attention(x, is_causal=True)
    (out * cotangent).sum().backward()
    assert relative_norm(torch.cat([r["out"] for r in results], 1), out) <= TOLERANCE
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None
        for result in results:
            # The gradient of k's bias is 0 but for rounding.
            assert relative_norm(result[name], parameter.grad, scale=100.0) <= TOLERANCE, name


def test_it_stands_in_for_the_single_device_module(pool: Pool) -> None:
    results = pool.run("swapped_in", 3)[:3]
    attention, x = ring_tasks.rotary_module()
    want = attention(x, x, x, is_causal=True)[0]
    assert relative_norm(torch.cat(results, 1), want) <= TOLERANCE


def test_a_seed_nobody_gave_is_the_first_ranks(pool: Pool) -> None:
    results = pool.run("drawn_seed", 3)[:3]
    # Equal logits: out counts the kept keys of a query and dv the queries that kept a key; both count the same pairs
    # only if sender and receiver drew the same mask.
    out, dv = (torch.cat([r[i] for r in results], 1) for i in (0, 1))
    assert torch.allclose(out.sum(), dv.sum(), rtol=1e-12)
    torch.manual_seed(100)
    config = RingAttentionConfig(segment_lengths=[64], dilation_rates=[1], dropout=0.5)
    v = torch.ones(1, 24, 2, 4, dtype=torch.float64)
    alone = RingDilatedAttention(config)(torch.zeros_like(v), torch.zeros_like(v), v)
    assert torch.allclose(out, alone, rtol=1e-12)


def test_one_shard_may_change_its_length(pool: Pool) -> None:
    # Logits are 0, so exp(lse) counts the keys: 10 + 3, 10 + 9, 10 + 3.
    assert all(found == pytest.approx([13, 19, 13]) for found in pool.run("changing_lengths", 3)[:3])


def test_autocast(pool: Pool) -> None:
    assert pool.run("under_autocast", 2)[:2] == [True, True]


def test_activation_checkpointing_with_dropout(pool: Pool) -> None:
    assert pool.run("checkpointed", 2)[:2] == [True, True]


def test_a_mesh_dimension_is_a_group(pool: Pool) -> None:
    assert all(pool.run("on_a_mesh", 4))
