"""Every case of `docs/spec.md`, section 7: the error, and what its message says."""

import pytest
import torch

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
    ],
)
def test_bad_pattern(arguments, error, message):
    with pytest.raises(error, match=message):
        DilatedPattern(*arguments)
