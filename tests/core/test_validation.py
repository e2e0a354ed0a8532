"""Every case of `docs/spec.md`, section 7: the error, and what its message says."""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.types import QKV

ONE = {"segment_lengths": [8], "dilation_rates": [1]}


def x(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


GOOD = x(2, 16, 4, 8)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        pytest.param((x(16, 4, 8), GOOD, GOOD), ONE, ValueError, r"q of shape \(B, N, H, D\), got 3 dim", id="rank"),
        pytest.param((GOOD, "k", GOOD), ONE, TypeError, "k to be a Tensor, got str", id="type"),
        pytest.param(
            (GOOD, GOOD.half(), GOOD),
            ONE,
            TypeError,
            "k to have q's dtype torch.float32, got torch.float16",
            id="dtype mix",
        ),
        pytest.param((GOOD.long(),) * 3, ONE, TypeError, "q to be float16.*got torch.int64", id="integer"),
        pytest.param((GOOD, GOOD.to("meta"), GOOD), ONE, ValueError, "k on q's device cpu, got meta", id="device mix"),
        pytest.param((GOOD, GOOD, GOOD[:, :3]), ONE, ValueError, r"k and v of one shape, got \(2, 16", id="k and v"),
        pytest.param((GOOD, GOOD[:1], GOOD[:1]), ONE, ValueError, "one batch size, got 2 and 1", id="batch"),
        pytest.param((GOOD, GOOD[..., :4], GOOD[..., :4]), ONE, ValueError, "one head_dim, got 8 and 4", id="width"),
        pytest.param(
            (GOOD[:, :, :3], GOOD[:, :, :2], GOOD[:, :, :2]),
            ONE,
            ValueError,
            "multiple of k's, got 3 query and 2 key heads",
            id="heads",
        ),
        pytest.param((GOOD, GOOD[:, :, :0], GOOD[:, :, :0]), ONE, ValueError, "at least one head", id="no heads"),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "segment_lengths": []},
            ValueError,
            "segment_lengths to hold at least one",
            id="no branches",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "segment_lengths": [8, 4]},
            ValueError,
            r"got 2 lengths \[8, 4\] and 1 rate",
            id="unequal branches",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "segment_lengths": [0]},
            ValueError,
            r"segment_lengths\[0\] to be at least 1",
            id="zero length",
        ),
        pytest.param(
            (GOOD,) * 3, {**ONE, "dilation_rates": [-2]}, ValueError, r"dilation_rates\[0\].*got -2", id="negative rate"
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "dilation_rates": [1.5]},
            TypeError,
            r"dilation_rates\[0\].*got float 1.5",
            id="fractional rate",
        ),
        pytest.param(
            (GOOD,) * 3, {**ONE, "segment_lengths": [2**63]}, ValueError, r"s\[0\] to be below 2\*\*63", id="too long"
        ),
        pytest.param((GOOD,) * 3, {**ONE, "segment_lengths": [True]}, TypeError, "got bool True", id="bool length"),
        pytest.param((GOOD,) * 3, {**ONE, "segment_lengths": 8}, TypeError, "sequence of ints, got int 8", id="scalar"),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "offsets": "random"},
            ValueError,
            r"offsets to be one of \['modulo', 'block",
            id="offsets",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "mixing_gradient": "none"},
            ValueError,
            "mixing_gradient to be one of",
            id="mixing gradient",
        ),
        pytest.param((GOOD,) * 3, {**ONE, "padding": "zeros"}, ValueError, "padding to be one of", id="padding"),
        pytest.param(
            (GOOD,) * 3, {**ONE, "backend": "cuda"}, ValueError, "backend to be one of.*got 'cuda'", id="backend"
        ),
        pytest.param((GOOD,) * 3, {**ONE, "is_causal": 1}, TypeError, "is_causal to be a bool, got int", id="causal"),
        pytest.param((GOOD,) * 3, {**ONE, "scale": "big"}, TypeError, "scale to be a float, got str", id="scale"),
        *(
            pytest.param((GOOD,) * 3, {**ONE, "scale": s}, ValueError, "scale to be finite, got", id=f"scale {s:.0e}")
            for s in (float("nan"), float("inf"), -float("inf"))
        ),
        pytest.param((GOOD,) * 3, {**ONE, "dropout_p": 1.0}, ValueError, r"dropout_p in \[0, 1\), got 1.0", id="p"),
        pytest.param((GOOD,) * 3, {**ONE, "dropout_p": "0.1"}, TypeError, "dropout_p to be a float", id="p type"),
        pytest.param((GOOD,) * 3, {**ONE, "dropout_p": 0.1, "seed": 1.5}, TypeError, "seed to be an int", id="seed"),
        pytest.param(
            (GOOD,) * 3, {**ONE, "dropout_p": 0.1, "seed": 2**70}, ValueError, r"seed to be below", id="wide seed"
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "dropout_p": 0.1, "seed": torch.rand(2)},
            TypeError,
            "integer scalar tensor",
            id="seed tensor",
        ),
        pytest.param((GOOD,) * 3, {**ONE, "q_start": -1}, ValueError, "q_start to be at least 0, got -1", id="q_start"),
        pytest.param((GOOD,) * 3, {**ONE, "k_start": 0.5}, TypeError, "k_start to be an int", id="k_start"),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "k_start": 4, "seq_len": 16},
            ValueError,
            r"seq_len of at least 20, where queries \[0, 16\) and keys \[4, 20\) end, got 16",
            id="seq_len",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "key_padding_mask": torch.ones(2, 15, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask of shape \(B, N\) = \(2, 16\), got \(2, 15\)",
            id="mask shape",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "key_padding_mask": torch.ones(2, 16)},
            TypeError,
            "key_padding_mask of dtype torch.bool.*got torch.float32",
            id="mask dtype",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "key_padding_mask": [True]},
            TypeError,
            "key_padding_mask to be a Tensor",
            id="mask type",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "row_start": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"row_start of shape \(B,\) = \(2,\), got \(3,\)",
            id="row_start shape",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "row_start": torch.zeros(2)},
            TypeError,
            "row_start of dtype int32 or int64",
            id="row_start dtype",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "row_start": torch.tensor([0, -3])},
            ValueError,
            "row_start of at least 0, got -3 at index 1",
            id="row_start below 0",
        ),
        pytest.param(
            (GOOD[0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0, 9, 5, 16])},
            ValueError,
            "cu_seqlens to be non-decreasing, got 9 then 5 at index 2",
            id="cu_seqlens falls",
        ),
        pytest.param(
            (GOOD[0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0, 9])},
            ValueError,
            "cu_seqlens to run from 0 to 16, got 0 to 9",
            id="cu_seqlens end",
        ),
        pytest.param(
            (GOOD[0, :0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0, 9])},
            ValueError,
            "cu_seqlens to run from 0 to 0, got 0 to 9",
            id="cu_seqlens of no rows",
        ),
        pytest.param(
            (GOOD[0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0])},
            ValueError,
            r"cu_seqlens of shape \(num_sequences \+ 1,\), got \(1,\)",
            id="cu_seqlens shape",
        ),
        pytest.param(
            (GOOD[0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0.0, 16.0])},
            TypeError,
            "cu_seqlens of dtype int32 or int64",
            id="cu_seqlens dtype",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0, 16])},
            ValueError,
            r"q of shape \(total, H, D\), got 4 dimensions",
            id="packed rank",
        ),
        pytest.param(
            (GOOD[0], GOOD[0, :9], GOOD[0, :9]),
            {**ONE, "cu_seqlens": torch.tensor([0, 16])},
            ValueError,
            "one total length, got 16 and 9",
            id="packed lengths",
        ),
        pytest.param(
            (GOOD[0],) * 3,
            {**ONE, "cu_seqlens": torch.tensor([0, 16]), "q_start": 2},
            ValueError,
            "expected cu_seqlens alone",
            id="packed and partial",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "padding": "zero_keys", "is_causal": True},
            ValueError,
            "is_causal=False with padding='zero_keys'",
            id="zero_keys causal",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "padding": "zero_keys", "seq_len": 20},
            ValueError,
            "whole sequences with padding='zero_keys'",
            id="zero_keys partial",
        ),
        pytest.param(
            (GOOD,) * 3,
            {**ONE, "padding": "zero_keys", "row_start": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            "pack the sequences with cu_seqlens",
            id="zero_keys padded",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_bad_input(tensors, options, error, message, backend):
    with pytest.raises(error, match=message):
        dilated_attention(*tensors, **{"backend": backend, **options})


_DENSE = "expected {} to be a dense tensor, got"


def _nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: a prototype
        return torch.nested.nested_tensor([x(16, 4, 8), x(16, 4, 8)], layout=layout)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: GOOD.to_sparse(), id="sparse"),
        pytest.param(lambda: GOOD.to_sparse(2), id="hybrid"),
        pytest.param(lambda: GOOD.to_mkldnn(), id="mkldnn"),
        pytest.param(lambda: _nested(torch.strided), id="nested"),
        pytest.param(lambda: _nested(torch.jagged), id="jagged"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layout_without_strides_is_named(make, place):
    tensors = [GOOD, GOOD, GOOD]
    tensors[place] = make()
    for _ in range(2):
        with pytest.raises(TypeError, match=_DENSE.format("qkv"[place])):
            dilated_attention(*tensors, **ONE)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"key_padding_mask": torch.ones(2, 16, dtype=torch.bool).to_sparse()}, "key_padding_mask"),
        ({"row_start": torch.tensor([0, 1]).to_sparse()}, "row_start"),
        ({"dropout_p": 0.1, "seed": torch.tensor([3]).to_sparse()}, "seed"),
    ],
)
def test_a_sparse_option_is_named(options, name):
    with pytest.raises(TypeError, match=_DENSE.format(name)):
        dilated_attention(GOOD, GOOD, GOOD, **ONE, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_start": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "row_start on q's device cpu or"),
        (
            {"dropout_p": 0.1, "seed": torch.tensor(1, device="meta")},
            ValueError,
            "seed on q's device cpu or on the CPU",
        ),
        ({"q_start": 2**63 - 1}, ValueError, r"q_start and k_start to leave every position below 2\*\*63"),
        ({"k_start": 2**63 - 1, "seq_len": 2**63 - 1}, ValueError, "q_start and k_start to leave every position"),
        ({"q_start": np.array([8, 16])}, TypeError, r"q_start to be an int, got ndarray array\(\[ 8, 16\]\)"),
        ({"offsets": np.array(["modulo", "blocked"])}, ValueError, "offsets to be one of .* got ndarray"),
        ({"padding": torch.zeros(2)}, ValueError, "padding to be one of .* got Tensor of torch.float32"),
        ({"backend": ["sdpa"]}, ValueError, r"backend to be one of .* got list \['sdpa'\]"),
        ({"q_start": 10**5000}, ValueError, r"q_start to be below 2\*\*63, got an int of 16610 bits"),
        ({"segment_lengths": [10**5000]}, ValueError, r"segment_lengths\[0\] to be below 2\*\*63, got an int of"),
        ({"scale": 10**5000}, ValueError, "scale to be finite, got an int of 16610 bits"),
        ({"scale": 1e308}, ValueError, r"scale between -65536 and 65536 for torch.float32, .* got 1e\+308"),
        # On a GPU exp2(q . k * scale - maximum) rounds up to infinity there.
        ({"scale": 2**31}, ValueError, r"scale between -65536 and 65536 for torch.float32, .* got 2147483648"),
        ({"is_causal": "x" * 5000}, TypeError, r"is_causal to be a bool, got str '(x{199})\.\.\.$"),
    ],
)
def test_an_argument_that_torch_or_python_would_refuse_without_a_name(options, error, message):
    with pytest.raises(error, match=message):
        dilated_attention(GOOD, GOOD, GOOD, **{**ONE, **options})


def test_a_packed_call_checks_its_starts_before_it_asks_for_none():
    with pytest.raises(TypeError, match="q_start to be an int, got Tensor"):
        dilated_attention(GOOD[0], GOOD[0], GOOD[0], **ONE, cu_seqlens=torch.tensor([0, 16]), q_start=torch.zeros(2))


def test_fake_tensors_come_with_fake_tensors():
    fake = FakeTensorMode().from_tensor(GOOD)
    assert dilated_attention(fake, fake, fake, **ONE).shape == GOOD.shape
    with pytest.raises(TypeError, match="k to be a fake tensor like all others or none, got FakeTensor"):
        dilated_attention(GOOD, fake, GOOD, **ONE)
    with pytest.raises(TypeError, match="row_start to be a fake tensor like all others or none, got Tensor"):
        dilated_attention(fake, fake, fake, **ONE, row_start=torch.tensor([0, 1]))


def test_a_tensor_of_inference_mode_cannot_be_kept_for_a_gradient():
    with torch.inference_mode():
        k = x(2, 16, 4, 8)
    assert dilated_attention(GOOD, k, k, **ONE).shape == GOOD.shape
    with pytest.raises(ValueError, match="k made outside inference mode where a gradient is wanted"):
        dilated_attention(GOOD.clone().requires_grad_(), k, k, **ONE)


def test_words_and_numbers_by_inheritance_are_taken():
    got = dilated_attention(
        GOOD, GOOD, GOOD, segment_lengths=[np.int32(8)], dilation_rates=(np.uint8(1),), offsets=np.str_("modulo"),
        q_start=np.int64(0), backend=np.str_("sdpa"), scale=np.float64(8**-0.5),
    )  # fmt: skip
    assert torch.equal(got, dilated_attention(GOOD, GOOD, GOOD, **ONE, backend="sdpa"))


def test_a_named_backend_never_falls_back():
    double = GOOD.double()  # what the kernels have no room for
    with pytest.raises(NotImplementedError, match="backend='sdpa' computes"):
        dilated_attention(double, double, double, backend="triton", **ONE)


def test_an_unknown_backend_is_no_choice():
    with pytest.raises(ValueError, match=r"expected backend to be one of .* got 'foo'"):
        choose_backend(QKV(GOOD, GOOD, GOOD), one_segment(1, 1, 1, 1.0), "foo")


def test_arguments_after_the_tensors_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        dilated_attention_with_lse(GOOD, GOOD, GOOD, [8], [1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((8,), (1,), 0), ValueError, "num_heads to be at least 1, got 0"),
        (((8,), (1,), 2.0), TypeError, "num_heads to be an int, got float"),
        (("88", (1,), 2), TypeError, "segment_lengths to be a sequence of ints, got str"),
        (((8,), (1,), 2, "mod"), ValueError, "offsets to be one of"),
        (((8,), (1,), 2**62), ValueError, "num_heads to be below 65537, got 4611686018427387904"),
        (((8,), np.array([1]), 2), TypeError, r"dilation_rates to be a sequence of ints, got ndarray array\(\[1\]\)"),
    ],
)
def test_bad_pattern(arguments, error, message):
    with pytest.raises(error, match=message):
        DilatedPattern(*arguments)


PATTERN = DilatedPattern((6, 8), (2, 3), np.int64(4), np.str_("blocked"))


def test_a_pattern_keeps_plain_values():
    assert [type(value) for value in (*PATTERN.segment_lengths, PATTERN.num_heads, PATTERN.offsets)] == [int] * 3 + [
        str
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PATTERN.offset(1.0, 0), TypeError, "branch to be an int, got float 1.0"),
        (lambda: PATTERN.offset(0, 4), ValueError, r"head in \[0, 4\), got 4"),
        (lambda: PATTERN.offset(-1, 0), ValueError, "branch to be at least 0, got -1"),
        (lambda: PATTERN.head_groups("0"), TypeError, "branch to be an int, got str '0'"),
        (lambda: PATTERN.members(2, 0), ValueError, r"branch in \[0, 2\), got 2"),
        (lambda: PATTERN.slots(0, 10**30), ValueError, r"offset to be below 2\*\*63, got 1000000"),
        (lambda: PATTERN.membership([1]), TypeError, "positions to be a Tensor, got list"),
        (lambda: PATTERN.membership(torch.rand(2)), TypeError, "positions of dtype int64, got torch.float32"),
        (lambda: PATTERN.keys_of(8, 0, 8), ValueError, r"position in \[0, 8\), got 8"),
        (lambda: PATTERN.keys_of(0.5, 0, 8), TypeError, "position to be an int, got float 0.5"),
        (lambda: PATTERN.keys_of(0, 0, 8, is_causal=1), TypeError, "is_causal to be a bool, got int 1"),
        (lambda: PATTERN.spans(0, 0, (0, 1.5), (0, 8)), TypeError, r"q_range\[1\] to be an int, got float 1.5"),
        (lambda: PATTERN.spans(0, 0, (0, 8), 8), TypeError, r"k_range to be a tuple \(start, stop\), got int 8"),
        (lambda: PATTERN.repeats_from("a", 8), TypeError, "start to be an int, got str 'a'"),
        (lambda: PATTERN.pairs(10**30), ValueError, r"seq_len to be below 2\*\*63, got 1000000"),
        (lambda: PATTERN.pairs(8, q_range=(-1, 8)), ValueError, r"q_range\[0\] to be at least 0, got -1"),
        (lambda: PATTERN.coverage(2.0), TypeError, "seq_len to be an int, got float 2.0"),
        (lambda: DilatedPattern((2**62,), (2,), 1).coverage(2**62), ValueError, "seq_len of at most .* got 46116860"),
    ],
)
def test_bad_questions_to_a_pattern(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_coverage_of_a_long_sequence_counts_one_period():
    period, rest = 24, 7
    short = PATTERN.coverage(period) * period
    want = (short * 10**9 + PATTERN.coverage(rest) * rest) / (period * 10**9 + rest)
    assert PATTERN.coverage(period * 10**9 + rest) == pytest.approx(want, rel=1e-12)


def test_the_reference_takes_fake_tensors_outside_their_mode():
    fake = FakeTensorMode().from_tensor(GOOD)
    assert dilated_attention(fake, fake, fake, **ONE, backend="reference").shape == GOOD.shape


def test_a_seed_for_fake_tensors_is_made_fake():
    fake = FakeTensorMode().from_tensor(GOOD)
    for seed in (3, None):
        assert dilated_attention(fake, fake, fake, **ONE, dropout_p=0.5, seed=seed).shape == GOOD.shape
