"""A call's settings: taken apart and put together, and counted from another position without another meaning."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.core.members import Members, segment_and_residue
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import SCHEMA, Problem, one_segment

branches = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=3)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, int, int]:
    """A problem with queries and keys at any place of a sequence, and how many of each."""
    lengths, rates = zip(*draw(branches), strict=True)
    pattern = DilatedPattern(lengths, rates, draw(st.integers(1, 4)), draw(st.sampled_from(["modulo", "blocked"])))
    num_queries, num_keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    q_start, k_start = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    end = max(q_start + num_queries, k_start + num_keys)
    causal, scale = draw(st.booleans()), draw(st.floats(-2, 2))
    problem = Problem(pattern, causal, scale, 0.0, q_start, k_start, end + draw(st.integers(0, 9)))
    return problem, num_queries, num_keys


def seen(problem: Problem, num_queries: int, num_keys: int) -> list[list[list[int]]]:
    """The rows of k that each query and head sees, one list per branch that shows any."""
    keys = range(problem.k_start, problem.k_start + num_keys)
    return [
        [
            [key - problem.k_start for key in branch if key in keys]
            for branch in problem.pattern.keys_of(
                problem.q_start + n, head, problem.seq_len, is_causal=problem.is_causal
            )
        ]
        for n in range(num_queries)
        for head in range(problem.pattern.num_heads)
    ]


@settings(max_examples=500)
@given(problems())
def test_a_rebased_problem_shows_the_same_keys(drawn: tuple[Problem, int, int]) -> None:
    problem, num_queries, num_keys = drawn
    rebased = problem.rebased(num_queries, num_keys)
    assert seen(rebased, num_queries, num_keys) == seen(problem, num_queries, num_keys)
    if rebased is not problem:
        assert min(rebased.q_start, rebased.k_start) == 0
        assert rebased.seq_len == max(rebased.q_start + num_queries, rebased.k_start + num_keys)


def test_keys_that_go_on_past_the_querys_segment_stay() -> None:
    """One query at 5, keys [5, 12), segments of 8: the last key that it sees is 7."""
    problem = Problem(DilatedPattern((8,), (1,), 1), False, 1.0, 0.0, 5, 5, 12)
    assert seen(problem.rebased(1, 7), 1, 7) == [[[0, 1, 2]]]


def test_dropout_keeps_its_positions() -> None:
    problem = Problem(DilatedPattern((8,), (1,), 1), False, 1.0, 0.1, 8, 8, 16)
    assert problem.rebased(8, 8) is problem
    assert replace(problem, dropout_p=0.0).rebased(8, 8) == replace(problem.at(0, 0, 8), dropout_p=0.0)


@given(problems())
def test_pack_and_unpack(drawn: tuple[Problem, int, int]) -> None:
    problem = replace(drawn[0], mixing_gradient="detached", padding="zero_keys", dropout_p=0.25)
    values = problem.pack()
    assert len(values) == len(SCHEMA.split(", "))
    assert Problem.unpack(problem.pattern.num_heads, values) == problem


def test_the_schema_names_every_field() -> None:
    names = {part.split()[-1] for part in SCHEMA.split(", ")}
    assert {f.name for f in fields(Problem)} - {"pattern"} <= names


def test_one_segment_shows_everything() -> None:
    assert seen(one_segment(3, 5, 2, 1.0), 3, 5) == [[[0, 1, 2, 3, 4]]] * 6


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 13), st.integers(0, 40), st.integers(0, 25))
def test_members_against_counting(length: int, rate: int, offset: int, start: int, count: int) -> None:
    members = Members(length, rate, offset % rate)
    kept = [n for n in range(start + count) if n % length % rate == members.offset]
    positions = torch.arange(-3, start + count)
    assert positions[members.of(positions)].tolist() == kept
    assert members.before(start) == len([n for n in kept if n < start])
    if members.slots == 0:
        assert not kept
        return
    rows = members.rows(start, count, torch.device("cpu"))
    found = torch.arange(start, start + count)[rows]
    assert found.tolist() == [n for n in kept if n >= start]


def test_segment_and_residue_tell_who_sees_whom() -> None:
    kind = segment_and_residue(torch.arange(20), 7, 3)
    same = [[n // 7 == m // 7 and n % 7 % 3 == m % 7 % 3 for m in range(20)] for n in range(20)]
    assert (kind[:, None] == kind).tolist() == same
