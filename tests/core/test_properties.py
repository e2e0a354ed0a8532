"""What must hold of any implementation: causality, padding, packing, parts, dropout (`docs/spec.md`, 2 to 4)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    AttentionOutput,
    dilated_attention,
    dilated_attention_with_lse,
    merge_attention,
)

BACKENDS = ["reference", "sdpa"]
PATTERN = {"segment_lengths": [7, 16, 40], "dilation_rates": [1, 2, 3]}


def qkv(*shape, kv_heads=None, dtype=torch.float64):
    q = torch.randn(shape, dtype=dtype)
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return q, torch.randn(kv_shape, dtype=dtype), torch.randn(kv_shape, dtype=dtype)


def gradients(out, *inputs, cotangent=None):
    cotangent = torch.randn_like(out) if cotangent is None else cotangent
    return torch.autograd.grad((out * cotangent).sum(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 6, 7, 16, 29, 44])
def test_later_tokens_change_no_earlier_bit(backend, dtype, cut):
    """Outputs before `cut`, and every gradient of a loss on them, keep their bits when all later tokens change."""
    q, k, v = qkv(2, 45, 4, 8, kv_heads=2, dtype=dtype)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dilated_attention_with_lse(*leaves, is_causal=True, backend=backend, **PATTERN)
        early = out[:, :cut]
        grads = gradients(early, *leaves, cotangent=torch.ones_like(early))
        results.append((early, lse[..., :cut], *(g[:, :cut] for g in grads)))
        assert all(g[:, cut:].count_nonzero() == 0 for g in grads)
        for x in (q, k, v):
            x[:, cut:] = 1e3 * torch.randn_like(x[:, cut:])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_padding_and_packing_equal_each_sequence_alone(backend, causal, side):
    lengths, longest = [1, 13, 40, 29], 40
    options = {**PATTERN, "is_causal": causal, "backend": backend}
    alone = [tuple(x.requires_grad_() for x in qkv(1, n, 6, 4, kv_heads=3)) for n in lengths]
    cotangents = [torch.randn(1, n, 6, 4, dtype=torch.float64) for n in lengths]
    wants = []
    for tensors, cotangent in zip(alone, cotangents, strict=True):
        out, lse = dilated_attention_with_lse(*tensors, **options)
        wants.append((out, lse, *gradients(out, *tensors, cotangent=cotangent)))

    def pad(x, n):
        filler = torch.full((1, longest - n, *x.shape[2:]), 1e4, dtype=x.dtype)
        return torch.cat([x, filler] if side == "right" else [filler, x], 1)

    if side == "packed":
        joined = [torch.cat([t[i][0] for t in alone]).detach().requires_grad_() for i in range(3)]
        cotangent = torch.cat([c[0] for c in cotangents])
        where = {"cu_seqlens": torch.tensor([0, 1, 14, 54, 83])}
    else:
        joined = [
            torch.cat([pad(t[i].detach(), n) for t, n in zip(alone, lengths, strict=True)]).requires_grad_()
            for i in range(3)
        ]
        cotangent = torch.cat([pad(c, n) for c, n in zip(cotangents, lengths, strict=True)])
        index = torch.arange(longest)
        if side == "right":
            where = {"key_padding_mask": index < torch.tensor(lengths)[:, None]}
        else:
            where = {"row_start": longest - torch.tensor(lengths)}
    out, lse = dilated_attention_with_lse(*joined, **where, **options)
    grads = gradients(out, *joined, cotangent=cotangent)

    start = 0
    for b, (n, want) in enumerate(zip(lengths, wants, strict=True)):
        if side == "packed":
            got = [x[None, start : start + n] for x in (out, *grads)]
            got.insert(1, lse[None, :, start : start + n])
            start += n
        else:
            rows = slice(0, n) if side == "right" else slice(longest - n, None)
            padding = slice(n, None) if side == "right" else slice(0, longest - n)
            got = [x[b : b + 1, rows] for x in (out, *grads)]
            got.insert(1, lse[b : b + 1, :, rows])
            assert all(x[b, padding].count_nonzero() == 0 for x in (out, *grads))
            assert torch.isneginf(lse[b, :, padding]).all()
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=60)
@given(data=st.data())
def test_merged_parts_equal_the_whole(causal, data):
    """Any cut of the queries and any cut of the keys, merged in any order; values and gradients."""
    n, heads = data.draw(st.sampled_from([5, 17, 41])), 3
    k_cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
    q_cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))})
    order = data.draw(st.permutations(range(len(k_cuts) - 1)))
    options = {**PATTERN, "is_causal": causal}
    if data.draw(st.booleans()):
        options |= {"dropout_p": 0.5, "seed": 11}
    q, k, v = (x.requires_grad_() for x in qkv(2, n, heads, 4))
    whole = dilated_attention_with_lse(q, k, v, **options)
    outs, lses = [], []
    for q_lo, q_hi in itertools.pairwise(q_cuts):
        total = None
        for i in order:
            k_lo, k_hi = k_cuts[i], k_cuts[i + 1]
            part = dilated_attention_with_lse(
                q[:, q_lo:q_hi], k[:, k_lo:k_hi], v[:, k_lo:k_hi], q_start=q_lo, k_start=k_lo, seq_len=n, **options
            )
            total = part if total is None else merge_attention(total, part)
        outs.append(total.out)
        lses.append(total.lse)
    out, lse = torch.cat(outs, 1), torch.cat(lses, 2)
    torch.testing.assert_close(out, whole.out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        gradients(out, q, k, v, cotangent=cotangent), gradients(whole.out, q, k, v, cotangent=cotangent), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


class TestDropout:
    OPTIONS = {**PATTERN, "dropout_p": 0.25}

    def test_one_seed_one_mask_in_both_backends_and_both_passes(self):
        q, k, v = (x.requires_grad_() for x in qkv(2, 60, 4, 4, kv_heads=2))
        cotangent = torch.randn_like(q)
        results = []
        for backend in BACKENDS:
            out = dilated_attention(q, k, v, seed=3, backend=backend, **self.OPTIONS)
            results.append((out, *gradients(out, q, k, v, cotangent=cotangent)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)

    def test_packed_sequences_drop_what_a_batch_of_them_drops(self):
        q, k, v = qkv(3, 20, 2, 4)
        batch = dilated_attention(q, k, v, seed=3, **self.OPTIONS)
        packed = dilated_attention(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens=torch.tensor([0, 20, 40, 60]), seed=3, **self.OPTIONS
        )
        torch.testing.assert_close(packed, batch.flatten(0, 1), rtol=1e-12, atol=1e-13)

    def test_seeds_heads_batches_and_branches_differ(self):
        q = torch.zeros(2, 64, 2, 1)
        v = torch.eye(64)[None, :, None].expand(2, 64, 2, 64)
        q = torch.zeros_like(v)
        one = {"segment_lengths": [64], "dilation_rates": [1], "dropout_p": 0.5}
        masks = dilated_attention(q, q, v, seed=0, **one)[..., :] > 0  # (B, N, H, key)
        again = dilated_attention(q, q, v, seed=0, **one) > 0
        other = dilated_attention(q, q, v, seed=1, **one) > 0
        twice = dilated_attention(q, q, v, seed=0, segment_lengths=[64, 64], dilation_rates=[1, 1], dropout_p=0.5)
        assert torch.equal(masks, again)
        halves = [masks[0, :, 0], masks[0, :, 1], masks[1, :, 0], other[0, :, 0]]
        for i, a in enumerate(halves):
            for b in halves[i + 1 :]:
                # 4096 fair coins agree in 2048 places, give or take 32; six sigma.
                assert abs(int((a == b).sum()) - 2048) < 192
        # Two equal branches drop independently: the weights take three values, the middle one half of the time.
        counts = torch.round(twice * 64).long()[0, :, 0]
        assert abs(int((counts == 1).sum()) - 2048) < 192

    def test_the_rate_and_the_mean(self):
        v = torch.eye(128)[None, :, None].expand(1, 128, 4, 128)
        q = torch.zeros_like(v)
        kept = dilated_attention(q, q, v, seed=9, segment_lengths=[128], dilation_rates=[1], dropout_p=0.1)
        n = kept.numel()
        sigma = (n * 0.1 * 0.9) ** 0.5
        assert abs(int((kept == 0).sum()) - 0.1 * n) < 6 * sigma
        torch.testing.assert_close(kept.max(), torch.tensor(1 / 128 / 0.9))
        lse = dilated_attention_with_lse(q, q, v, seed=9, segment_lengths=[128], dilation_rates=[1], dropout_p=0.1).lse
        torch.testing.assert_close(lse, torch.full_like(lse, 128.0).log())  # the denominator is not dropped from

    def test_without_a_seed_torch_decides(self):
        q, k, v = qkv(1, 30, 2, 4)
        torch.manual_seed(1)
        a, b = (dilated_attention(q, k, v, **self.OPTIONS) for _ in range(2))
        torch.manual_seed(1)
        c = dilated_attention(q, k, v, **self.OPTIONS)
        assert torch.equal(a, c)
        assert not torch.equal(a, b)


class TestMerge:
    def test_gaps_of_two_hundred_and_empty_sides(self):
        out = torch.randn(1, 4, 2, 3)
        lse = torch.tensor([0.0, 200.0, -200.0, -torch.inf]).expand(1, 2, 4)
        other = AttentionOutput(torch.randn(1, 4, 2, 3), torch.zeros(1, 2, 4))
        merged = merge_attention(AttentionOutput(out, lse), other)
        torch.testing.assert_close(merged.out[:, 0], (out + other.out)[:, 0] / 2)
        torch.testing.assert_close(merged.out[:, 1], out[:, 1])
        assert torch.equal(merged.out[:, 2:], other.out[:, 2:])
        nothing = AttentionOutput(torch.zeros_like(out), torch.full_like(lse, -torch.inf))
        empty = merge_attention(nothing, nothing)
        assert empty.out.count_nonzero() == 0
        assert torch.isneginf(empty.lse).all()

    def test_no_gradient_is_nan_where_nothing_is_seen(self):
        out = torch.randn(1, 2, 1, 3, requires_grad=True)
        lse = torch.tensor([[[-torch.inf, 1.0]]], requires_grad=True)
        merged = merge_attention(AttentionOutput(out, lse), AttentionOutput(out * 2, lse * 1))
        (merged.out.sum() + merged.lse[..., 1].sum()).backward()
        assert torch.isfinite(out.grad).all()
        assert torch.isfinite(lse.grad).all()

    def test_shapes_must_agree(self):
        a = AttentionOutput(torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 2))
        b = AttentionOutput(torch.zeros(1, 3, 1, 3), torch.zeros(1, 1, 3))
        with pytest.raises(ValueError, match=r"one shape, got out \(1, 2, 1, 3\) and \(1, 3, 1, 3\)"):
            merge_attention(a, b)

    def test_packed_partials_merge(self):
        """With one branch and no causality, attention over two copies of the keys is attention over one."""
        q, k, v = (torch.randn(11, 2, 4) for _ in range(3))
        options = {"segment_lengths": [4], "dilation_rates": [1], "cu_seqlens": torch.tensor([0, 3, 11])}
        part = dilated_attention_with_lse(q, k, v, **options)
        merged = merge_attention(part, tuple(part))
        torch.testing.assert_close(merged.out, part.out)
        torch.testing.assert_close(merged.lse, part.lse + math.log(2))

    @pytest.mark.parametrize(
        ("b", "error", "message"),
        [
            (torch.zeros(1, 2, 3, 4), TypeError, r"expected b to be an AttentionOutput \(out, lse\), got Tensor"),
            ((torch.zeros(1, 2, 3, 4), None), TypeError, "expected b to be an AttentionOutput"),
            ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)), ValueError, r"got \(1, 2, 3, 4\) and \(1, 2, 3\)"),
            ((torch.zeros(3, 4), torch.zeros(3)), ValueError, r"expected b of out \(B, N, H, D\)"),
        ],
    )
    def test_what_is_no_partial(self, b, error, message):
        with pytest.raises(error, match=message):
            merge_attention(AttentionOutput(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)), b)
