"""The reference against a loop that knows nothing of it, and second derivatives."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.core import zero_keys


def ten_lines(q, k, v, lengths, rates, offset_of, causal):
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=q.dtype)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = []
            for i, (w, r) in enumerate(zip(lengths, rates, strict=True)):
                if (n % w) % r == offset_of(i, h):
                    seen += [
                        m
                        for m in range(k.shape[0])
                        if m // w == n // w and (m % w) % r == offset_of(i, h) and (m <= n or not causal)
                    ]
            if seen:
                s = torch.stack([q[n, h] @ k[m, h] for m in seen]) * q.shape[-1] ** -0.5
                out[n, h], lse[h, n] = s.softmax(0) @ v[seen, h], s.logsumexp(0)
    return out, lse


@settings(max_examples=60)
@given(
    n=st.sampled_from([1, 2, 5, 11, 17]),
    branches=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 16, 40]), st.sampled_from([1, 2, 3, 4, 7])), min_size=1, max_size=3
    ),
    heads=st.integers(1, 5),
    blocked=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop(n, branches, heads, blocked, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, heads, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    lengths, rates = zip(*branches, strict=True)

    def offset_of(i, h):
        return h // math.ceil(heads / rates[i]) if blocked else h % rates[i]

    want_out, want_lse = ten_lines(q, k, v, lengths, rates, offset_of, causal)
    got = dilated_attention_with_lse(
        q[None],
        k[None],
        v[None],
        segment_lengths=lengths,
        dilation_rates=rates,
        is_causal=causal,
        offsets="blocked" if blocked else "modulo",
        backend="reference",
    )
    torch.testing.assert_close(got.out[0], want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse[0], want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixing_gradient", ["exact"])
def test_gradients_of_the_reference_by_finite_differences(mixing_gradient):
    q, k, v = (torch.randn(1, 9, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        out, lse = dilated_attention_with_lse(
            q,
            k,
            v,
            segment_lengths=[4, 9],
            dilation_rates=[1, 2],
            is_causal=True,
            backend="reference",
            mixing_gradient=mixing_gradient,
        )
        return out, lse

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x)[0], (q, k, v))


def test_one_dense_branch_is_dense_attention():
    q, k, v = (torch.randn(2, 50, 4, 8) for _ in range(3))
    for causal in (False, True):
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
        for backend in ("reference", "sdpa"):
            got = dilated_attention(
                q, k, v, segment_lengths=[50], dilation_rates=[1], is_causal=causal, backend=backend
            )
            torch.testing.assert_close(got, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_key_reached_by_two_branches_counts_twice():
    q = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 4.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    # Branch (2, 1) shows both keys, branch (1, 1) each query its own: weights 2/3 and 1/3.
    out = dilated_attention(q, q, v, segment_lengths=[2, 1], dilation_rates=[1, 1])
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 3.0], dtype=torch.float64))


def test_zero_keys_take_nothing_from_the_default_dtype():
    q, k, v = (torch.randn(1, 21, 2, 4) for _ in range(3))
    options = {"segment_lengths": [8], "dilation_rates": [3], "padding": "zero_keys", "backend": "reference"}
    want = dilated_attention_with_lse(q, k, v, **options)
    torch.set_default_dtype(torch.float64)
    got = dilated_attention_with_lse(q, k, v, **options)
    assert got.lse.dtype == torch.float32
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("n", [1, 3])
def test_queries_without_any_key(n):
    q, k = torch.randn(1, n, 2, 4, requires_grad=True), torch.randn(1, 0, 2, 4)
    options = {"segment_lengths": [8], "dilation_rates": [1], "seq_len": 8, "backend": "reference"}
    out, lse = dilated_attention_with_lse(q, k, k, **options)
    assert not out.any() and lse.isneginf().all() and lse.shape == (1, 2, n)
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@settings(max_examples=60)
@given(data=st.data())
def test_zero_keys_of_one_query_are_those_of_the_dense_form(data):
    draw, sizes = data.draw, st.lists(st.integers(1, 9), min_size=2, max_size=2)
    pattern = DilatedPattern(tuple(draw(sizes)), tuple(draw(sizes)), draw(st.integers(1, 3)), "blocked")
    n = draw(st.integers(1, 20))
    at, length = torch.arange(n)[None], torch.full((1, n), n)
    for branch in range(2):
        seen, source, pads = zero_keys.visibility(pattern, branch, at, at, length, 1)
        for head, position in itertools.product(range(pattern.num_heads), range(n)):
            found = zero_keys.keys_of(pattern, branch, position, head, n)
            keys, zeros = seen[0, head, position].nonzero().flatten().tolist(), int(pads[0, head, position])
            if found is None:
                assert not keys and not zeros
            else:
                assert (found[0], list(found[1]), found[2]) == (int(source[0, position]), keys, zeros)
