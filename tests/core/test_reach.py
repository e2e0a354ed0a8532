"""Reach against brute force on graphs, geometric patterns, and what a shift is given as."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.core import reach
from dilated_attention_pytorch.core.shift import layer_shifts
from dilated_attention_pytorch.ring_attention.plan import RingPlan

LENGTHS, RATES = [1, 2, 3, 4, 5, 8, 12, 16, 24, 40, 2**62], [1, 2, 3, 4, 6, 9, 2**40]
patterns = st.builds(
    lambda branches, heads, offsets: DilatedPattern(*map(tuple, zip(*branches, strict=True)), heads, offsets),
    st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(RATES)), min_size=1, max_size=3),
    st.integers(1, 7),
    st.sampled_from(["modulo", "blocked"]),
)
shifts = st.one_of(
    st.just(0), st.integers(0, 50), st.just("alternate"), st.lists(st.integers(0, 50), min_size=3, max_size=3)
)


def shift_of(given_shift, layer, pattern):
    if given_shift == "alternate":
        return layer % 2 * (max(pattern.segment_lengths) // 2)
    return given_shift if isinstance(given_shift, int) else given_shift[layer]


def keys(pattern, n, head, size, shift, causal):
    """Every key of a query, by the words of docs/spec.md alone: one entry per branch and key."""
    found = []
    for i, (w, r) in enumerate(pattern.branches):
        o = head % r if pattern.offsets == "modulo" else head // math.ceil(pattern.num_heads / r)
        if (n + shift) % w % r == o:
            for m in range(size):
                same = (n + shift) // w == (m + shift) // w and (m + shift) % w % r == o
                if same and (m <= n or not causal):
                    found.append((i, m))
    return found


def brute(pattern, layers, size, causal, shift):
    """The inputs that each position depends on, as sets."""
    known = [{n} for n in range(size)]
    for layer in range(layers):
        c = shift_of(shift, layer, pattern)
        seen = [
            {m for h in range(pattern.num_heads) for _, m in keys(pattern, n, h, size, c, causal)} | {n}
            for n in range(size)
        ]
        known = [set().union(*(known[m] for m in seen[n])) for n in range(size)]
    return known


@settings(max_examples=300, deadline=None)
@given(pattern=patterns, layers=st.integers(1, 3), size=st.integers(1, 24), causal=st.booleans(), shift=shifts)
def test_reach_is_that_of_the_graph(pattern, layers, size, causal, shift):
    layers = len(shift) if isinstance(shift, list) else layers
    known = brute(pattern, layers, size, causal, shift)
    distances = [max(n - min(inputs), max(inputs) - n) for n, inputs in enumerate(known)]
    missing = [min(inputs) + (0 if causal else size - 1 - max(inputs)) for inputs in known]
    counts = []
    for n, layer in itertools.product(range(1, size), range(layers)):
        c = shift_of(shift, layer, pattern)
        if any((n + c) % w == 0 for w in pattern.segment_lengths):
            counts.append(sum(len(keys(pattern, n, h, size, c, causal)) for h in range(pattern.num_heads)))
    found = pattern.reach(layers, size, is_causal=causal, segment_shift=shift)
    assert found == (
        min(d for d, m in zip(distances, missing, strict=True) if m == max(missing)),
        sorted(distances)[(size - 1) // 2],
        max(distances),
        max(missing),
        min(counts) / pattern.num_heads if counts else None,
    )
    members = [[pattern.members(i, o) for o, _ in pattern.head_groups(i)] for i in range(len(pattern.branches))]
    first, last = reach.ends(members, layer_shifts(shift, pattern.segment_lengths, layers), size, is_causal=causal)
    assert first.tolist() == [min(inputs) for inputs in known]
    assert last.tolist() == [max(inputs) for inputs in known]


def test_the_patterns_of_the_benchmarks():
    """A million positions take seconds, and a billion no longer where the pattern repeats."""
    fixed = DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), 12)
    assert fixed.reach(12, 2**20)[:4] == (0, 16383, 32767, 2**20 - 32768)
    assert fixed.reach(12, 2**30)[:4] == (0, 16383, 32767, 2**30 - 32768)
    # One border further back in every second layer: each adds half of the largest segment.
    assert 6 * 32768 < fixed.reach(12, 2**20, segment_shift="alternate").best < 7 * 32768
    with pytest.raises(ValueError, match="at most 134,217,728"):
        fixed.reach(12, 2**30, segment_shift="alternate")
    assert DilatedPattern.geometric(2**20, num_heads=12).reach(4, 2**20).out_of_reach == 0


@settings(max_examples=100, deadline=None)
@given(seq_len=st.integers(1, 10_000), times=st.integers(1, 40), factor=st.integers(2, 12), heads=st.integers(1, 20))
def test_geometric_patterns_nest_and_reach_everything(seq_len, times, factor, heads):
    shortest = times * factor
    pattern = DilatedPattern.geometric(seq_len, shortest, factor, num_heads=heads)
    lengths, rates = pattern.segment_lengths, pattern.dilation_rates
    assert lengths[0] == shortest
    assert lengths[-1] >= seq_len
    assert all(w == shortest * r for w, r in pattern.branches)
    assert all(b % a == 0 and b <= a * factor for a, b in itertools.pairwise(lengths))
    assert all(w < seq_len for w in lengths[:-1])
    # To the start of its segment in each branch, which every next branch keeps.
    assert pattern.reach(len(rates), seq_len).out_of_reach == 0


def test_geometric_as_asked_for():
    assert DilatedPattern.geometric(2**20, num_heads=12).branches == (
        (2048, 1), (8192, 4), (32768, 16), (131072, 64), (524288, 256), (1048576, 512),
    )  # fmt: skip
    assert DilatedPattern.geometric(2**20, num_heads=12, max_rate=64).dilation_rates == (1, 4, 16, 64, 64, 64)
    assert DilatedPattern.geometric(100, num_heads=2).branches == ((2048, 1),)
    assert DilatedPattern.geometric(2**62, 2**61 + 1, num_heads=1).branches[0] == (2**61 + 1, 1)
    for options, message in (
        ({"seq_len": 0}, "seq_len"), ({"factor": 1}, "factor"), ({"shortest": 0}, "shortest"), ({"max_rate": 0}, "max"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DilatedPattern.geometric(**{"seq_len": 8, "num_heads": 1} | options)


def test_shifts_of_layers():
    assert layer_shifts(3, (8, 16), 3) == (3, 3, 3)
    assert layer_shifts("alternate", (8, 16), 4) == (0, 8, 0, 8)
    assert layer_shifts([1, 2], (8, 16), 2) == (1, 2)
    for wrong, error in (([1], ValueError), ([], ValueError), (-1, ValueError), ("half", ValueError),
                         (1.5, TypeError), (None, TypeError), (True, TypeError), ([1, "a"], TypeError)):  # fmt: skip
        with pytest.raises(error, match="segment_shift"):
            layer_shifts(wrong, (8, 16), 2)


def test_bad_input_of_reach():
    pattern = DilatedPattern((8,), (1,), 1)
    assert pattern.reach(1, 0) == (0, 0, 0, 0, None)
    for layers, size, error in ((0, 5, ValueError), (1, -1, ValueError), (1.0, 5, TypeError), (1, "5", TypeError)):
        with pytest.raises(error):
            pattern.reach(layers, size)
    assert pattern.reach(2**16 - 1, 8) == pattern.reach(1, 8)
    with pytest.raises(ValueError, match="num_layers to be below 65536"):
        pattern.reach(2**16, 8)
    with pytest.raises(TypeError, match="is_causal"):
        pattern.reach(1, 5, is_causal=1)
    assert pattern.reach(2, 5, segment_shift=2**62) == pattern.reach(2, 5)
    # torch's slices add such a rate to the end, in 64 bits.
    rarest, rare = (DilatedPattern((n,), (n,), 5, "blocked") for n in (2**63 - 1, 2**40))
    assert rarest.reach(2, 22, segment_shift=3) == rare.reach(2, 22, segment_shift=3)
    with pytest.raises(ValueError, match="below 2"):
        DilatedPattern((2**63 - 1,), (1,), 1).reach(1, 5, segment_shift=2**63 - 5)
    assert torch.equal(reach.ends([], (0,), 3, is_causal=True)[0], torch.arange(3))


def test_geometric_segments_that_no_number_holds():
    with pytest.raises(ValueError, match="expected seq_len to fit into segments below"):
        DilatedPattern.geometric(2**62, 8, 7, num_heads=6, max_rate=7)


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_tables_are_real_where_tensors_are_not(around):
    """Models are built and switched on a device without memory; patterns and rings still have to know themselves."""
    pattern = DilatedPattern((6, 18), (1, 3), 4)
    want = pattern.reach(3, 100), pattern.coverage(100)
    with around():
        assert (pattern.reach(3, 100), pattern.coverage(100)) == want


def test_a_plan_is_real_on_a_device_without_memory():
    with torch.device("meta"):
        plan = RingPlan(DilatedPattern((6, 18), (1, 3), 4), (0, 50, 103), 0, False)
        rectangles = plan.rectangles((1,))
    assert rectangles and all(x.device.type == "cpu" for found in rectangles for x in found[1:])
