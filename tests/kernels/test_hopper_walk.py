"""The walks of the Hopper kernels, run as plain Python, against the definition: every key of every tile, counted."""

import heapq
import importlib.util
import math
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton.hopper import support
from dilated_attention_pytorch.types import NO_MASKS, QKV

HOPPER = Path(dilated_attention_pytorch.__file__).parent / "kernels/triton/hopper"
WHOLE = 1 << 30


@pytest.fixture(scope="module")
def walk():
    return as_python("walk")


@pytest.fixture(scope="module")
def tiles():
    return as_python("tiles")


def as_python(name):
    """A module, with Python in place of Gluon."""
    language = types.SimpleNamespace(
        where=lambda condition, a, b: a if condition else b, minimum=min, maximum=max, static_range=range,
        to_tensor=lambda x: x, constexpr=object,
    )  # fmt: skip
    fakes = {"triton": types.ModuleType("triton"), "triton.experimental": types.ModuleType("triton.experimental")}
    fakes["triton.experimental.gluon"] = types.ModuleType("gluon")
    fakes["triton.experimental"].gluon = fakes["triton.experimental.gluon"]
    fakes["triton.experimental.gluon"].jit = lambda function: function
    fakes["triton.experimental.gluon"].constexpr_function = lambda function: function
    fakes["triton.experimental.gluon"].language = language
    spec = importlib.util.spec_from_file_location(f"hopper_{name}_as_python", HOPPER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setitem(sys.modules, name, fake)
        spec.loader.exec_module(module)
    return module


# Lengths, rates, N, heads, rows of a tile, rows of a block.
PATTERNS = [
    ((32, 64, 128, 256), (1, 2, 4, 8), 1024, 3, 4, 4),
    ((32, 64, 128, 256), (1, 2, 4, 8), 1024, 9, 4, 2),
    ((64, 256, 1024), (1, 4, 16), 1024, 5, 4, 4),
    ((72, 216, 648), (1, 3, 9), 648, 4, 4, 2),
    ((16, 16, 96, WHOLE), (1, 2, 2, 4), 384, 3, 4, 2),
    ((32, 32), (1, 4), 128, 2, 8, 4),
    ((16,), (1,), 64, 1, 8, 4),
    ((48, WHOLE), (1, 2), 100, 2, 4, 4),
    ((32, 64, 128, 256), (1, 2, 4, 8), 997, 3, 4, 4),
    ((32, 64, 128, 256), (1, 2, 4, 8), 1000, 1, 4, 2),
    ((64, 256, 1024), (1, 4, 16), 1023, 3, 4, 4),
    ((72, 216, WHOLE), (1, 3, 9), 700, 4, 4, 2),
    ((16, 32), (1, 2), 17, 2, 8, 8),
]


def branches_of(position, head, lengths, rates):
    return [i for i, (w, r) in enumerate(zip(lengths, rates, strict=True)) if position % w % r == head % r]


def keys_of(position, head, lengths, rates, n):
    """The multiset of the specification."""
    keys = Counter()
    for i in branches_of(position, head, lengths, rates):
        start = position // lengths[i] * lengths[i]
        for m in range(start + head % rates[i], min(start + lengths[i], n), rates[i]):
            keys[m] += 1
    return keys


def collect(context, state, row, residue, multiplicity):
    return [*state, (row, residue, multiplicity)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_without_a_mask(walk, tiles, pattern):
    lengths, rates, n, heads, bm, b = pattern
    rate = rates[-1]
    blocks = -(-n // (rate * bm))
    whole = n // (rate * b) * b
    seen = Counter()
    for tile in range(2 * heads * rate * blocks):
        batch, head, residue, block = tiles.tile_at(tile, blocks, heads, rate)
        row = block * bm
        seen[batch, head, residue, block] += 1
        level = walk.level_of((residue + rate - head % rate) % rate, rates)
        visits = walk.each_block(collect, None, [], row, level, head, whole, lengths, rates, b)
        ends = walk.steps_up_to(row, level, whole, lengths, rates, b)
        # The consumer knows a step's multiplicity by its number alone.
        assert len(visits) == ends[-1]
        biases = [walk.bias_at(j, ends, len(rates)) for j in range(len(visits))]
        assert biases == [math.log2(m) for *_, m in visits] == [walk.bias_of(m, len(rates)) for *_, m in visits]
        cut = []
        if n % (rate * b):
            cut = walk.each_cut_block(collect, None, [], row, level, head, whole, lengths, rates)
        keys = Counter()
        for at, place, multiplicity in visits + cut:
            for t in range(at, at + b):
                if t * rate + place < n:
                    keys[t * rate + place] += multiplicity
        assert all(at + b <= whole for at, *_ in visits)
        for t in range(row, row + bm):
            position = t * rate + residue
            if position < n:
                assert len(branches_of(position, head, lengths, rates)) == level
                assert keys == keys_of(position, head, lengths, rates, n)
    assert len(seen) == 2 * heads * rate * blocks


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_of_groups_of_rows(walk, tiles, pattern, groups):
    """Every row is in one group, and sees the tile's first blocks, as far as its own level goes."""
    lengths, rates, n, heads, bm, b = pattern
    if lengths[0] % (rates[-1] * bm):
        bm = lengths[0] // rates[-1]
    rate, segments = rates[-1], -(-n // lengths[0])
    whole = n // (rate * b) * b
    per, _ = tiles.group_tiles(groups, bm, lengths, rates)
    rows, number_of_tiles = Counter(), 2 * heads * segments * per
    for tile in range(number_of_tiles):
        batch, head, segment, number = tiles.group_tile_at(
            tile, number_of_tiles, segments, heads, groups, bm, lengths, rates
        )
        found = [tiles.group_at(number + w, head, segment, n, bm, lengths, rates) for w in range(groups)]
        assert tiles.has_rows(number, head, segment, n, groups, bm, lengths, rates) == any(there for *_, there in found)
        level, start = found[0][0], segment * (lengths[0] // rate)
        visits = walk.each_block(collect, None, [], start, level, head, whole, lengths, rates, b, True)
        assert len(visits) == sum(
            walk.ring_steps(start, i, whole, lengths, rates, b) * (rate // rates[i]) for i in range(level)
        )
        cut, ring = [], level
        if n % (rate * b):
            cut = walk.each_cut_block(collect, None, [], start, level, head, whole, lengths, rates)
            ring = walk.cut_ring(start, level, whole, lengths, rates)
        for own, residue, row, is_there in found:
            if not is_there:
                continue
            taken = []  # the warpgroup's loops
            for i in range(own):
                for shown in range(i + 1, own + 1):
                    steps = walk.ring_steps(start, i, whole, lengths, rates, b)
                    taken += steps * walk.residue_count(shown, own, rates) * [shown - i]
            assert not taken or taken[0] == walk.first_shown(own, rates)
            met = [(*visit[:2], m) for visit, m in zip(visits, taken, strict=False)]
            assert len(met) == len(taken)
            if ring < own:
                met += [(at, place, min(m, own - ring)) for at, place, m in cut]
            keys = Counter()
            for at, place, m in met:
                for position in range(at * rate + place, (at + b) * rate, rate):
                    if position < n:
                        keys[position] += m
            for position in range(row * rate + residue, n, rate)[:bm]:
                rows[batch, head, position] += 1
                assert len(branches_of(position, head, lengths, rates)) == own
                assert keys == keys_of(position, head, lengths, rates, n)
    assert rows == Counter({(i, h, p): 1 for i in range(2) for h in range(heads) for p in range(n)})


CAUSAL = [pattern for pattern in PATTERNS if pattern[0][0] < pattern[2]]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_tiles_of_one_level(walk, tiles, pattern, after):
    """Keys before the rows of a tile, or queries after them: dense blocks, blocks on the diagonal, other rings."""
    lengths, rates, n, heads, bm, b = pattern
    if lengths[0] % (rates[-1] * max(bm, b)):
        bm = b = lengths[0] // rates[-1]
    rate, span = rates[-1], lengths[0]
    segments, per = -(-n // span), span // bm
    padded = segments * span
    rows = Counter()
    for tile in range(heads * segments * per):
        batch, head, segment, level, distance, first = tiles.level_tile_at(
            tile, heads * segments * per, segments, heads, bm, lengths, rates
        )
        assert batch == 0
        stride = rates[walk.stride_index(level, len(rates))]
        low = (head + distance) % stride + first * stride
        high = low + stride * (bm - 1)
        places = range(low, high + 1, stride)
        seen = {place: Counter() for place in places}
        by_stride = []  # the producer's loops
        for i in range(len(rates)):
            end, ratio, step = walk.residues_at(i, level, rates)
            by_stride += [(number % ratio * step, i) for number in range(1, end)]
        for shown in range(1, level + 1):
            begin, hop, step, index = walk.residues_of(shown, level, rates)
            assert hop == rates[index]
            for z in range(begin, hop, step):
                assert by_stride.pop(0) == (z, index)
                residue = walk.modulo(head + z, index, rates)
                count = span // (hop * b)
                if after:
                    some, dense = walk.blocks_after(residue, index, low, high, lengths, rates, b)
                    all_see, masked = range(dense, count), range(some, dense)
                else:
                    dense, some = walk.blocks_before(residue, index, low, high, rates, b)
                    all_see, masked = range(dense), range(dense, some)
                assert min(dense, some) >= 0 and max(dense, some) <= count
                for block in (*all_see, *masked):
                    for t in range(block * b, block * b + b):
                        other = residue + t * hop
                        for place in places:
                            visible = other >= place if after else other <= place
                            assert visible or block in masked
                            seen[place][segment * span + other] += shown * visible
        assert not by_stride
        row = segment * span // rate
        end = padded // rate
        visits = walk.each_side_block(collect, None, [], row, level, head, end, after, lengths, rates, b)
        for multiplicity in range(1, level):
            steps = walk.side_steps(multiplicity, row, level, end, after, lengths, rates, b)
            assert steps == sum(m == multiplicity for *_, m in visits)
        assert [m for *_, m in visits] == sorted(m for *_, m in visits)
        for place in places:
            position = segment * span + place
            rows[head, position] += 1
            assert len(branches_of(position, head, lengths, rates)) == level
            for at, residue, multiplicity in visits:
                for t in range(at, at + b):
                    seen[place][t * rate + residue] += multiplicity
            want = keys_of(position, head, lengths, rates, padded)
            want = Counter({m: x for m, x in want.items() if (m >= position if after else m <= position)})
            assert +seen[place] == want
    assert len(rows) == heads * padded and set(rows.values()) == {1}


@pytest.mark.parametrize("programs", [132, 114])
def test_tiles_that_are_drawn_make_like_shares(walk, tiles, programs):
    """A program draws its next tile when it is done; were every 132nd its share, the fullest would have 14% more work
    than the mean, or on 114 multiprocessors 38%."""
    lengths, rates, heads, b = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), 6, 64
    segments, per = 32, 2048 // 128

    def steps(tile):
        _, head, segment, level, distance, first = tiles.level_tile_at(
            tile, heads * segments * per, segments, heads, 128, lengths, rates
        )
        stride = rates[walk.stride_index(level, len(rates))]
        low = (head + distance) % stride + first * stride
        count = sum(
            walk.side_steps(multiplicity, segment * 128, level, 0, False, lengths, rates, b)
            for multiplicity in range(1, level)
        )
        for shown in range(1, level + 1):
            begin, hop, step, index = walk.residues_of(shown, level, rates)
            for z in range(begin, hop, step):
                residue = walk.modulo(head + z, index, rates)
                count += walk.blocks_before(residue, index, low, low + stride * 127, rates, b)[1]
        return count

    costs = [steps(tile) for tile in range(heads * segments * per)]
    drawn, fixed = [0] * programs, [0] * programs
    for tile, cost in enumerate(costs):
        heapq.heapreplace(drawn, drawn[0] + cost)
        fixed[tile % programs] += cost
    mean = sum(costs) / programs
    assert max(drawn) < 1.05 * mean
    assert max(fixed) > 1.1 * mean


@pytest.mark.parametrize("lengths, rates", [((1024, 2048, 4096), (1, 2, 4)), ((2048, 8192), (1, 8)), ((512,), (1,))])
def test_what_a_causal_walk_wastes(walk, tiles, lengths, rates):
    """Keys up to the end of each half of a tile, of which the rows see those up to themselves."""
    plan = types.SimpleNamespace(lengths=lengths, rates=rates)
    n, half = lengths[-1], 64
    pairs = sum(len({m for m in keys_of(p, 0, lengths, rates, n) if m <= p}) for p in range(0, n, 7)) * 7
    wasted = 0
    for tile in range(n // 128):
        *_, level, distance, first = tiles.level_tile_at(tile, n // 128, n // lengths[0], 1, 128, lengths, rates)
        stride = rates[walk.stride_index(level, len(rates))]
        for begin in (first, first + half):
            places = [distance % stride + (begin + t) * stride for t in range(half)]
            wasted += sum(places[-1] - place for place in places)
    assert support._wasted(plan, n) == pytest.approx(wasted / pairs, rel=0.05)


def test_a_causal_call_that_would_waste_a_fifth_takes_the_general_kernels():
    pytest.importorskip("triton")
    from dilated_attention_pytorch.kernels.triton.work import Work

    def reasons(lengths, rates, causal):
        x = torch.empty(1, 1 << 18, 1, 128, dtype=torch.bfloat16)
        problem = Problem(DilatedPattern(lengths, rates, 1), causal, 1.0, 0.0, 0, 0, 1 << 18, "exact", "none")
        return support._why_not_the_call(Work(QKV(x, x, x), problem, NO_MASKS))

    assert reasons((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), True) == []
    assert reasons((4096, 65_536), (1, 16), False) == []
    assert reasons((4096, 65_536), (1, 16), True) == ["it is causal and its tiles are long beside its shortest segment"]
