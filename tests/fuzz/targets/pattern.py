"""`DilatedPattern` and its public methods, against counting."""

from __future__ import annotations

import contextlib
import itertools
import operator
from typing import Any

import torch
from hypothesis import strategies as st

from dilated_attention_pytorch import DilatedPattern
from fuzz.judge import REFUSALS, Call
from fuzz.table import target
from fuzz.values import anything, numbers, pick, sequences, spoiled

_SMALL = st.integers(1, 12)


@target("DilatedPattern", 30)
def _pattern(draw: st.DrawFn) -> Call:
    branches = draw(st.integers(1, 3))
    given: dict[str, Any] = {
        "segment_lengths": draw(st.lists(_SMALL, min_size=branches, max_size=branches)),
        "dilation_rates": draw(st.lists(_SMALL, min_size=branches, max_size=branches)),
        "num_heads": draw(_SMALL),
        "offsets": draw(st.sampled_from(["modulo", "blocked"])),
    }
    names = pick(draw, list(given))
    for name in names:
        given[name] = draw(
            sequences() if name in ("segment_lengths", "dilation_rates") else st.one_of(numbers, anything)
        )

    def check(pattern: DilatedPattern) -> None:
        assert [int(x) for x in given["segment_lengths"]] == list(pattern.segment_lengths)
        assert all(type(x) is int for x in (*pattern.segment_lengths, *pattern.dilation_rates, pattern.num_heads))
        assert type(pattern.offsets) is str and pattern.offsets == given["offsets"]
        assert hash(pattern) == hash(DilatedPattern(**given))

    return Call(DilatedPattern, (), given, check=check, right=not names)


_METHODS: dict[str, tuple[str, ...]] = {
    "offset": ("branch", "head"),
    "head_groups": ("branch",),
    "members": ("branch", "offset"),
    "membership": ("positions",),
    "slots": ("branch", "offset"),
    "keys_of": ("position", "head", "seq_len", "is_causal"),
    "spans": ("branch", "offset", "q_range", "k_range"),
    "repeats_from": ("start", "stop"),
    "pairs": ("seq_len", "is_causal", "q_range", "k_range"),
    "coverage": ("seq_len",),
    "reach": ("num_layers", "seq_len", "is_causal", "segment_shift"),
}


@target("DilatedPattern.geometric", 12)
def _geometric(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        "seq_len": draw(st.integers(1, 300)), "shortest": draw(_SMALL), "factor": draw(st.integers(2, 8)),
        "num_heads": draw(_SMALL), "max_rate": draw(st.sampled_from([None, 1, 7])), "offsets": "modulo",
    }  # fmt: skip
    names = pick(draw, list(given))
    for name in names:
        given[name] = draw(st.one_of(numbers, anything))

    def check(pattern: DilatedPattern) -> None:
        lengths, rates = pattern.segment_lengths, pattern.dilation_rates
        shortest, seq_len = (operator.index(given[name]) for name in ("shortest", "seq_len"))
        assert lengths[0] == shortest and rates[0] == 1 and lengths[-1] >= seq_len
        assert all(b % a == 0 for a, b in itertools.pairwise(lengths)) and len(lengths) <= 64
        assert given["max_rate"] is not None or all(w == r * lengths[0] for w, r in pattern.branches)

    return Call(DilatedPattern.geometric, (), given, check=check, right=not names)


@target("DilatedPattern's methods", 80)
def _methods(draw: st.DrawFn) -> Call:
    branches = draw(st.integers(1, 3))
    sizes = st.one_of(_SMALL, _SMALL, _SMALL, st.sampled_from([2**31, 2**62, 2**63 - 1]))
    lengths, rates = (draw(st.lists(sizes, min_size=branches, max_size=branches)) for _ in range(2))
    heads = draw(st.one_of(_SMALL, _SMALL, numbers))
    pattern = DilatedPattern((5, 8), (2, 3), 3)
    with contextlib.suppress(*REFUSALS):
        pattern = DilatedPattern(tuple(lengths), tuple(rates), heads, draw(st.sampled_from(["modulo", "blocked"])))
    method = draw(st.sampled_from(sorted(_METHODS)))
    n = draw(st.integers(1, 40))
    start, stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
    branch, head = draw(st.integers(0, len(pattern.branches) - 1)), draw(st.integers(0, pattern.num_heads - 1))
    right: dict[str, Any] = {
        "branch": branch,
        "head": head,
        "offset": head % pattern.dilation_rates[branch] if pattern.offsets == "modulo" else 0,
        "positions": torch.arange(-3, n),
        "position": draw(st.integers(0, n - 1)),
        "seq_len": n,
        "is_causal": draw(st.booleans()),
        "q_range": (start, stop),
        "k_range": (0, n),
        "start": start,
        "stop": stop,
        "num_layers": draw(st.integers(1, 4)),
        "segment_shift": draw(st.sampled_from([0, 3, "alternate"])),
    }
    given = {name: right[name] for name in _METHODS[method]}
    names = pick(draw, list(given))
    for name in names:
        ranges = st.one_of(st.tuples(numbers, numbers), st.lists(numbers, max_size=3), sequences(), anything)
        given[name] = draw(
            spoiled(right["positions"]) if name == "positions"
            else ranges if name.endswith("_range")
            else st.one_of(numbers, numbers, anything)
        )  # fmt: skip
    if method in ("coverage", "reach") and isinstance(given["seq_len"], int) and 2**16 < given["seq_len"] < 2**36:
        given["seq_len"] = 2**16  # it looks at each position, which is no hang

    def brute() -> list[list[int]]:
        """For each (head, query) the keys of all branches."""
        keys = []
        for h in range(pattern.num_heads):
            for position in range(n):
                seen = []
                for i, (w, r) in enumerate(pattern.branches):
                    groups = pattern.num_heads // r + (pattern.num_heads % r > 0)
                    o = h % r if pattern.offsets == "modulo" else h // groups
                    if position % w % r == o:
                        first = position // w * w
                        seen += [m for m in range(first, min(first + w, n)) if m % w % r == o]
                    assert pattern.offset(i, h) == o
                keys.append(seen)
        return keys

    def check(result: Any) -> None:
        if names:
            return
        causal = given.get("is_causal", False)
        if method == "keys_of":
            seen = brute()[given["head"] * n + given["position"]] if pattern.num_heads <= 64 else None
            want = None if seen is None else [m for m in seen if not causal or m <= given["position"]]
            assert want is None or [m for keys in result for m in keys] == want
        elif method == "pairs" and pattern.num_heads <= 64:
            count = 0
            for row, seen in enumerate(brute()):
                position = row % n
                if start <= position < stop:
                    count += sum(1 for m in seen if not causal or m <= position)
            assert result == count, (result, count)
        elif method == "coverage" and pattern.num_heads <= 64:
            covered = [any(True for _ in seen) for seen in brute()]
            assert abs(result - sum(covered) / len(covered)) < 1e-12
        elif method == "membership":
            assert result.shape == (len(pattern.branches), pattern.num_heads, n + 3)

    call = Call(getattr(pattern, method), (), given, check=check, right=not names, setting=f"of {pattern}")
    return call
