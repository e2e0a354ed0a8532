"""Segment shift: what it means, by the rule itself; and that every backend computes it in every mode."""

import itertools
import math

import pytest
import torch
from cases import MODES, shifted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    DilatedAttention,
    LongNetConfig,
    LongNetLM,
    RingAttentionConfig,
    RingDilatedAttention,
    dilated_attention,
    dilated_attention_streamed,
    dilated_attention_with_lse,
)
from dilated_attention_pytorch.core.shift import two_parts

SHIFTED_MODES = [mode for mode in MODES if mode != "zero_keys"]
LOWEST = -float("inf")


def by_definition(q, k, v, options):
    """One softmax over every (branch, key) pair, by loops over docs/spec.md's sentences alone; B = 1."""
    c, causal, cu = options["segment_shift"], options["is_causal"], options.get("cu_seqlens")
    bounds = [0, q.shape[1]] if cu is None else cu.tolist()
    first = options["row_start"][0].item() if "row_start" in options else 0
    real = options.get("key_padding_mask", torch.ones(1, q.shape[1], dtype=torch.bool))[0]
    out, lse = torch.zeros_like(q), torch.full((q.shape[2], q.shape[1]), LOWEST, dtype=q.dtype)
    for start, stop in itertools.pairwise(bounds):
        for h, n in itertools.product(range(q.shape[2]), range(start + first, stop)):
            rows = []
            for w, r in zip(options["segment_lengths"], options["dilation_rates"], strict=True):
                for m in range(start + first, stop):
                    # Positions count from the sequence's first real row, and from the shift.
                    a, b = n - start - first + c, m - start - first + c
                    kept = a % w % r == h % r == b % w % r and a // w == b // w
                    if kept and (m <= n or not causal) and real[n] and real[m]:
                        rows.append(m)
            if rows:
                logits = k[0, rows, h] @ q[0, n, h] * q.shape[3] ** -0.5
                out[0, n, h], lse[h, n] = logits.softmax(0) @ v[0, rows, h], logits.logsumexp(0)
    return out, lse[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("shift", [1, 4, 8, 12, 16, 29])
@pytest.mark.parametrize("mode", ["whole", "masked", "left_padded", "packed"])
def test_the_words_of_the_specification(mode, shift, backend, causal):
    generator = torch.Generator().manual_seed(shift)
    q, k, v = (torch.randn(1, 37, 2, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    options = {"segment_lengths": [4, 16], "dilation_rates": [1, 2], "segment_shift": shift, "is_causal": causal}
    if mode in ("masked", "left_padded"):
        options["key_padding_mask"] = torch.arange(37)[None] % 5 > 0
    if mode == "left_padded":
        options["row_start"] = torch.tensor([6])
    if mode == "packed":
        options["cu_seqlens"] = torch.tensor([0, 9, 9, 30, 37])
    want = by_definition(q, k, v, options)
    packed = mode == "packed"
    found = dilated_attention_with_lse(*(x[0] if packed else x for x in (q, k, v)), backend=backend, **options)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got[None] if packed else got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", SHIFTED_MODES)
@settings(max_examples=120, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_equals_the_reference(mode, data):
    case = data.draw(shifted(mode))
    want = case.run("reference")
    errors = case.errors(case.run("sdpa"), want)
    assert max(errors.values()) <= 1e-10, errors


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_a_shift_is_a_range_that_starts_there(data):
    case = data.draw(shifted(data.draw(st.sampled_from(["whole", "partial", "dropout"]))))
    if {"row_start", "cu_seqlens"} & case.options.keys():
        return
    c, n = case.options["segment_shift"], case.options.get("seq_len", case.q_shape[1])
    c %= math.lcm(*case.options["segment_lengths"])  # for the positions that dropout's mask is drawn by
    moved = {name: x for name, x in case.options.items() if name != "segment_shift"}
    moved |= {name: case.options.get(name, 0) + c for name in ("q_start", "k_start")} | {"seq_len": n + c}
    if "key_padding_mask" in moved:
        moved["key_padding_mask"] = torch.nn.functional.pad(moved["key_padding_mask"], (c, 0))
    want = case.run("reference")
    case.options = moved
    errors = case.errors(case.run("reference"), want)
    assert max(errors.values()) == 0.0, errors


@settings(max_examples=200, deadline=None)
@given(
    branches=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16, 12, 64]), st.sampled_from([1, 2, 3, 4, 8])), min_size=1, max_size=3
    ),
    shift=st.integers(1, 150),
)
def test_two_plain_parts_show_the_same_keys(branches, shift):
    """Where a shifted sequence is said to fall into two, keys of every query are those of two plain sequences."""
    border = two_parts(branches, shift)
    if border is None:
        return
    n = 90

    def kinds(start, count, w, r):
        return [((p // w), p % w % r) for p in range(start, start + count)]

    for w, r in branches:
        moved = kinds(shift, n, w, r)
        cut = min(border, n) or n
        first, second = kinds(0, cut, w, r), kinds(0, n - cut, w, r)
        for i, j in itertools.product(range(n), range(n)):
            together = moved[i] == moved[j] and moved[i][1] == moved[j][1]
            if (i < cut) != (j < cut):
                assert not together
            elif i < cut:
                assert together == (first[i] == first[j]) and first[i][1] == moved[i][1]
            else:
                assert together == (second[i - cut] == second[j - cut]) and second[i - cut][1] == moved[i][1]


@pytest.mark.parametrize("shift", [16, 32, 48, 64, 192])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_call_in_two_parts(shift, causal):
    """w = 8, 16, 64 with a multiple of 16: the bits of packed sequences, cut at the first border of the largest."""
    options = {"segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 8], "is_causal": causal}
    q, k, v = (torch.randn(1, 200, 8, 4, dtype=torch.float64) for _ in range(3))
    border = -shift % 64
    bounds = torch.tensor([0, border, 200] if border else [0, 200])
    packed = dilated_attention(q[0], k[0], v[0], cu_seqlens=bounds, **options)
    assert torch.equal(dilated_attention(q, k, v, segment_shift=shift, **options)[0], packed)
    assert two_parts([(8, 1), (16, 2), (64, 8)], 5) is two_parts([(8, 1), (16, 2), (64, 8)], 8) is None


def test_bad_shifts():
    q = torch.randn(1, 8, 1, 4)
    pattern = {"segment_lengths": [4], "dilation_rates": [1]}
    for shift, error, message in (
        (-1, ValueError, "segment_shift to be at least 0"),
        (1.0, TypeError, "segment_shift to be an int"),
        ("alternate", TypeError, "segment_shift to be an int"),
        (True, TypeError, "segment_shift to be an int"),
        (torch.tensor(1), TypeError, "segment_shift to be an int"),
    ):
        with pytest.raises(error, match=message):
            dilated_attention(q, q, q, segment_shift=shift, **pattern)
    with pytest.raises(ValueError, match="expected segment_shift to leave every position below 2"):
        dilated_attention(q, q, q, segment_shift=2**63 - 4, segment_lengths=[2**63 - 1], dilation_rates=[1])
    with pytest.raises(ValueError, match="expected segment_shift=0 with padding='zero_keys'"):
        dilated_attention(q, q, q, segment_shift=1, padding="zero_keys", **pattern)


@pytest.mark.parametrize("rows", [{}, {"key_padding_mask": torch.arange(22).view(2, 11) % 5 > 0},
                                  {"row_start": torch.tensor([0, 3])}])  # fmt: skip
@pytest.mark.parametrize("shift", [12 * 2**40 + 5, 2**63 - 1])
def test_a_shift_counts_modulo_what_all_segments_share(shift, rows):
    """Whoever computes it: no shift is too large, and none costs a mask of as many bits."""
    pattern = {"segment_lengths": [4, 6], "dilation_rates": [1, 2]}
    x = torch.randn(2, 11, 2, 4, dtype=torch.float64)

    def results(shift):
        yield dilated_attention(x, x, x, segment_shift=shift, **pattern, **rows)
        yield dilated_attention(x, x, x, segment_shift=shift, backend="reference", **pattern, **rows)
        yield DilatedAttention(segment_shift=shift, **pattern)(x, x, x, **rows)
        if "row_start" not in rows:
            yield dilated_attention_streamed(x, x, x, segment_shift=shift, range_length=3, **pattern, **rows)
            yield RingDilatedAttention(RingAttentionConfig(segment_shift=shift, **pattern))(x, x, x, **rows)

    for got, want in zip(results(shift), results(shift % 12), strict=True):
        assert torch.equal(got, want)


def test_a_model_decodes_behind_a_large_shift():
    shape = {"d_model": 8, "nhead": 2, "num_decoder_layers": 2, "dim_feedforward": 8, "vocab_size": 11}
    models = []
    for shifts in ([2**63 - 1, 2**62], [(2**63 - 1) % 12, 2**62 % 12]):
        torch.manual_seed(0)
        config = LongNetConfig(**shape, segment_lengths=[4, 6], dilation_rates=[1, 2], segment_shift=shifts)
        models.append(LongNetLM(config).eval())
    prompt, first = torch.arange(10).view(2, 5), torch.tensor([0, 2])
    tokens = [model.generate(prompt, 9, greedy=True, row_start=first, graphed=graphed)
              for model in models for graphed in (False, True)]  # fmt: skip
    assert all(torch.equal(x, tokens[0]) for x in tokens)


def test_masks_of_a_shifted_call_go_to_its_device():
    """A row_start may lie on the CPU, wherever q does."""
    q = torch.empty(1, 33, 6, 5, device="meta")
    for more in ({}, {"key_padding_mask": torch.ones(1, 33, dtype=torch.bool, device="meta")}):
        out = dilated_attention(
            q, q, q, segment_lengths=[4, 4, 64], dilation_rates=[4, 5, 1], row_start=torch.tensor([2]), segment_shift=5,
            backend="reference", **more,
        )  # fmt: skip
        assert out.is_meta and out.shape == q.shape
