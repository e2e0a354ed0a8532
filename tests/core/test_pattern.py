"""DilatedPattern against brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import DilatedPattern

patterns = st.builds(
    lambda branches, heads, offsets: DilatedPattern(*map(tuple, zip(*branches, strict=True)), heads, offsets),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 5, 8, 12, 40]), st.sampled_from([1, 2, 3, 4, 6, 9])), min_size=1, max_size=3
    ),
    st.integers(1, 7),
    st.sampled_from(["modulo", "blocked"]),
)


def brute_pairs(pattern, q_range, k_range, causal):
    total = 0
    for i, (w, r) in enumerate(pattern.branches):
        for h in range(pattern.num_heads):
            o = pattern.offset(i, h)
            members = [n for n in range(max(q_range[1], k_range[1], 0)) if (n % w) % r == o]
            total += sum(
                n // w == m // w and (m <= n or not causal)
                for n in members
                if n in range(*q_range)
                for m in members
                if m in range(*k_range)
            )
    return total


@settings(max_examples=150)
@given(pattern=patterns, ends=st.lists(st.integers(0, 30), min_size=4, max_size=4), causal=st.booleans())
def test_pairs_and_spans_of_ranges(pattern, ends, causal):
    q_range, k_range = tuple(sorted(ends[:2])), tuple(sorted(ends[2:]))
    want = brute_pairs(pattern, q_range, k_range, causal)
    assert pattern.pairs(30, is_causal=causal, q_range=q_range, k_range=k_range) == want


@settings(max_examples=100)
@given(pattern=patterns, ends=st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_spans_hold_each_pair_once(pattern, ends):
    q_range, k_range = tuple(sorted(ends[:2])), tuple(sorted(ends[2:]))
    for branch, (w, r) in enumerate(pattern.branches):
        offset = pattern.offset(branch, pattern.num_heads - 1)
        found = []
        for first, count, q_lo, q_hi, k_lo, k_hi in pattern.spans(branch, offset, q_range, k_range):
            for base in range(first * w + offset, (first + count) * w + offset, w):
                found += itertools.product(
                    range(base + q_lo * r, base + q_hi * r, r), range(base + k_lo * r, base + k_hi * r, r)
                )
        members = [n for n in range(60) if n % w % r == offset]
        want = [(n, m) for n in members for m in members if n // w == m // w and n in range(*q_range)]
        assert sorted(found) == [(n, m) for n, m in want if m in range(*k_range)]


@settings(max_examples=100)
@given(pattern=patterns, n=st.integers(1, 50), causal=st.booleans())
def test_keys_of_membership_and_pairs_agree(pattern, n, causal):
    members = pattern.membership(torch.arange(n))
    total = 0
    for h in range(pattern.num_heads):
        for p in range(n):
            ranges = pattern.keys_of(p, h, n, is_causal=causal)
            total += sum(map(len, ranges))
            assert len(ranges) == int(members[:, h, p].sum())
            for keys in ranges:
                assert p in keys
                assert all(0 <= m < n and (m <= p or not causal) for m in keys)
    assert total == pattern.pairs(n, is_causal=causal)
    assert pattern.coverage(n) == pytest.approx(members.any(0).double().mean().item())


@given(pattern=patterns)
def test_head_groups_are_the_heads_by_offset(pattern):
    for i in range(len(pattern.branches)):
        seen = {}
        for offset, heads in pattern.head_groups(i):
            for h in range(pattern.num_heads)[heads]:
                assert h not in seen
                seen[h] = offset
        assert seen == {h: pattern.offset(i, h) for h in range(pattern.num_heads)}
        assert all(o < pattern.dilation_rates[i] for o in seen.values())


def test_the_two_rules():
    modulo = DilatedPattern((8,), (4,), 6)
    blocked = DilatedPattern((8,), (4,), 6, "blocked")
    assert [modulo.offset(0, h) for h in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [blocked.offset(0, h) for h in range(6)] == [h // math.ceil(6 / 4) for h in range(6)] == [0, 0, 1, 1, 2, 2]


def test_plans_stay_short_at_a_billion_tokens():
    pattern = DilatedPattern((2048, 32768, 185363), (1, 4, 16), 16, "blocked")
    n = 2**30
    spans = [s for i in range(3) for o, _ in pattern.head_groups(i) for s in pattern.spans(i, o, (0, n), (5, n - 3))]
    assert len(spans) <= 9 * 21
    assert pattern.pairs(n) > n * 2048 * 16


def test_negative_positions_belong_to_nothing():
    assert not DilatedPattern((8,), (1,), 1).membership(torch.tensor([-8, -1])).any()


def test_rough_cost():
    assert DilatedPattern((64, 256), (1, 4), 4).keys_per_query == 64 + 256 / 16
    assert DilatedPattern((64, 256), (1, 4), 4).pairs(2**16) / 2**16 / 4 == pytest.approx(80)


def test_a_range_that_repeats_the_pattern_has_the_same_pairs():
    """What counts positions from a range's start may only do so where every query keeps its keys."""

    def pairs(pattern, start, stop):
        keys = [
            [
                [k - start for part in pattern.keys_of(n, head, stop) for k in part if start <= k]
                for n in range(start, stop)
            ]
            for head in range(pattern.num_heads)
        ]
        return keys

    found = 0
    for lengths, rates in [((4,), (1,)), ((4, 12), (1, 3)), ((3, 20), (2, 4)), ((5, 10), (1, 5))]:
        pattern = DilatedPattern(lengths, rates, 3)
        for start, stop in itertools.combinations(range(25), 2):
            if pattern.repeats_from(start, stop):
                found += start > 0
                assert pairs(pattern, start, stop) == pairs(pattern, 0, stop - start)
    assert found > 100
