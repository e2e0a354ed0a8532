"""Streaming equals the whole: any ranges, sources, sinks, layouts and modes."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    PATTERN,
    IntoSource,
    Ledger,
    Sink,
    Source,
    dilated_attention_streamed,
    draw_qkv,
    errors,
    streamed,
    streamed_backward,
    streamed_forward,
    whole,
)
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool, dilated_attention
from dilated_attention_pytorch.streaming import pipeline, sources
from dilated_attention_pytorch.testing import relative_norm


@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=150)
@given(data=st.data())
def test_equals_the_whole(masked: bool, data: st.DataObject) -> None:
    """out, lse and all gradients in fp64: odd lengths, cut segments, causal, grouped heads, both offsets."""
    draw = data.draw
    n = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 64, 97, 200, 333]))
    branches = draw(st.integers(1, 4))
    options: dict[str, Any] = {
        "segment_lengths": [draw(st.sampled_from([1, 2, 3, 4, 8, 16, 20, 33, 64, 200, 500])) for _ in range(branches)],
        "dilation_rates": [draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12])) for _ in range(branches)],
        "offsets": draw(st.sampled_from(["modulo", "blocked"])),
        "is_causal": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["segment_shift"] = draw(st.sampled_from([1, 4, 8, 16, 30, 33, 64, 100, 250, 600]))
    heads, group, batch = (draw(st.sampled_from(x)) for x in ([1, 2, 3, 5], [1, 1, 2, 3], [1, 2]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = draw_qkv(n, heads, group, batch)
    grad = torch.randn_like(q)
    if masked:
        options["key_padding_mask"] = torch.rand(batch, n) < draw(st.sampled_from([0.1, 0.7]))
    # Forty ranges or fewer: each further one costs as much and is computed as those before it.
    length = draw(st.sampled_from([x for x in (1, 3, 4, 8, 16, 32, 50, 64, 100, 128, 1000) if n <= 40 * x]))
    pool = Ledger()
    got = streamed(q, k, v, grad, range_length=length, pool=pool, **options)
    found = errors(got, whole(q, k, v, grad, **options), q, k, v, grad)
    assert max(found.values()) <= 1e-12, found
    assert pool.lent == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision_is_as_good_as_the_whole(dtype: torch.dtype, is_causal: bool) -> None:
    """At most twice the error that the whole makes in the same dtype, against fp64."""
    q, k, v = draw_qkv(500, heads=3, group=2, width=16, dtype=dtype)
    grad = torch.randn_like(q)
    options = {**PATTERN, "is_causal": is_causal}
    exact = [x.double() for x in (q, k, v, grad)]
    truth = whole(*exact, **options)
    base = errors(whole(q, k, v, grad, **options), truth, *exact)
    for length in (32, 100, 128):
        found = errors(streamed(q, k, v, grad, range_length=length, **options), truth, *exact)
        assert all(found[name] <= 2 * base[name] for name in base), (found, base)


@pytest.mark.parametrize("kind", [Source, IntoSource])
@pytest.mark.parametrize("length", [64, 100])
def test_sources_and_sinks(kind: type[Source], length: int) -> None:
    q, k, v = draw_qkv(333, heads=2, group=2, batch=2)
    grad, options = torch.randn_like(q), {**PATTERN, "range_length": length}
    want = whole(q, k, v, grad, **PATTERN)
    out, lse = Sink(torch.empty_like(q)), Sink(torch.empty_like(want["lse"]), dim=2)
    sources = [kind(x) for x in (q, k, v)]
    given_back = streamed_forward(*sources, out=out, lse=lse, **options)
    assert given_back.out is out and given_back.lse is lse
    grads = [Sink(torch.empty_like(x)) for x in (q, k, v)]
    upstream = Source(grad), *sources, Source(out.x), Source(lse.x, dim=2)
    streamed_backward(*upstream, dq=grads[0], dk=grads[1], dv=grads[2], **options)
    got = {"out": out.x, "lse": lse.x, "dq": grads[0].x, "dk": grads[1].x, "dv": grads[2].x}
    found = errors(got, want, q, k, v, grad)
    assert max(found.values()) <= 1e-12, found
    assert [x.committed for x in (out, lse, *grads)] == [1] * 5


def test_every_row_is_read_once_where_segments_are_whole() -> None:
    sources = [IntoSource(x) for x in draw_qkv(256)]
    dilated_attention_streamed(*sources, segment_lengths=[16, 64], dilation_rates=[1, 4], range_length=64, out=None)
    assert [x.read_rows for x in sources] == [256] * 3


def test_compact_rows_are_brought_in_once_more_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment over many ranges costs its rows ahead of the first of them: fewer than 1 in r."""
    gathered = []
    gather_into = sources.HostTensor.gather_into

    def count(self: Any, branch: Any, start: int, stop: int, out: Tensor) -> None:
        gathered.append(out.shape[1])
        gather_into(self, branch, start, stop, out)

    monkeypatch.setattr(sources.HostTensor, "gather_into", count)
    q, k, v = draw_qkv(1024, heads=1)
    options: dict[str, Any] = {"segment_lengths": [32, 512], "dilation_rates": [1, 8]}
    out = dilated_attention_streamed(q, k, v, **options, range_length=64)
    assert relative_norm(out, dilated_attention(q, k, v, **options)) <= 1e-12
    assert gathered == [(512 - 64) // 8] * 3 * 2  # q, k and v of two segments


def test_autograd() -> None:
    q, k, v = draw_qkv(150, heads=2, group=2)
    grad = torch.randn_like(q)
    want = whole(q, k, v, grad, **PATTERN)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention_streamed(*leaves, **PATTERN, range_length=48)
    grads = torch.autograd.grad(out, leaves, grad)
    assert relative_norm(out, want["out"]) <= 1e-12
    assert max(relative_norm(a, want[b]) for a, b in zip(grads, ("dq", "dk", "dv"), strict=True)) <= 1e-12
    with torch.no_grad():
        assert not dilated_attention_streamed(*leaves, **PATTERN).requires_grad
    # An expanded cotangent, as sum() gives it.
    total = torch.autograd.grad(dilated_attention_streamed(*leaves, **PATTERN, range_length=48).sum(), leaves)
    assert relative_norm(total[2], whole(q, k, v, torch.ones_like(q), **PATTERN)["dv"]) <= 1e-12


def test_slices_of_one_buffer() -> None:
    """Inputs and results side by side in one allocation, as an arena or one mapped file has them."""
    shape = (1, 150, 2, 4)
    buffer = torch.randn(9, *shape, dtype=torch.float64)
    q, k, v, grad, _, out, dq, dk, dv = buffer
    lse = buffer[4].flatten()[: 2 * 150].view(1, 2, 150)
    want = whole(*(x.clone() for x in (q, k, v, grad)), **PATTERN)
    streamed_forward(q, k, v, out=out, lse=lse, **PATTERN, range_length=48)
    streamed_backward(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **PATTERN, range_length=48)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert max(errors(got, want, q, k, v, grad).values()) <= 1e-12


def test_strided_inputs() -> None:
    packed = torch.randn(2, 130, 3, 4, 8, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    out = dilated_attention_streamed(q, k, v, **PATTERN, range_length=37)
    assert relative_norm(out, dilated_attention(q, k, v, **PATTERN)) <= 1e-12
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(dilated_attention_streamed(*heads_first, **PATTERN, range_length=37), out)


@pytest.mark.parametrize("direct", [False, True])
def test_the_cuda_transport_without_its_streams(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers, staging and direct copies give the host's numbers; the order on streams is for a GPU to test."""
    q, k, v = draw_qkv(400, heads=2, batch=2)
    grad = torch.randn_like(q)
    options: dict[str, Any] = {**PATTERN, "key_padding_mask": torch.rand(2, 400) < 0.7}
    want = [streamed(q, k, v, grad, **options, range_length=length) for length in (48, 64, 1000)]
    idle = MagicMock()
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, idle)
    monkeypatch.setattr(pipeline, "_Host", pipeline._Cuda)
    if direct:
        monkeypatch.setattr(sources.HostTensor, "pinned", lambda x, start, stop: x._rows[:, start:stop])
    for length, expected in zip((48, 64, 1000), want, strict=True):
        got = streamed(q, k, v, grad, **options, range_length=length)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("batch", "n"), [(1, 0), (0, 5), (0, 0)])
def test_nothing(batch: int, n: int) -> None:
    q, k, v = draw_qkv(n, batch=batch)
    got = streamed(q, k, v, torch.empty_like(q), **PATTERN)
    assert got["out"].shape == got["dq"].shape == q.shape and got["lse"].shape == (batch, 2, n)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = draw_qkv(64)
    dilated_attention_streamed(q, k, v, **PATTERN, range_length=16, progress=True)
    shown = capsys.readouterr().out
    assert "ranges" in shown and "100%" in shown


def test_a_pool_is_used_again() -> None:
    """The second call borrows the blocks of the first, and its numbers are its own."""
    pool = UnifiedMemoryPool()
    for _ in range(2):
        q, k, v = draw_qkv(300)
        got = dilated_attention_streamed(q, k, v, **PATTERN, range_length=64, pool=pool)
        assert relative_norm(got, dilated_attention(q, k, v, **PATTERN)) <= 1e-12
    stats = pool.stats()
    assert stats.hits >= 2 and stats.current == 0


def test_modes_of_torch_change_nothing() -> None:
    q, k, v = draw_qkv(200, dtype=torch.float32)
    want = dilated_attention_streamed(q, k, v, **PATTERN, range_length=48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dilated_attention_streamed(q, k, v, **PATTERN, range_length=48), want)
    grad = torch.randn_like(q)
    gradients = streamed(q, k, v, grad, **PATTERN, range_length=48)
    with torch.device("meta"):  # the default device of new tensors
        assert torch.equal(dilated_attention_streamed(q, k, v, **PATTERN, range_length=48), want)
        found = streamed(q, k, v, grad, **PATTERN, range_length=48)
        leaf = q.clone().requires_grad_()
        dilated_attention_streamed(leaf, k, v, **PATTERN, range_length=48).backward(grad)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    assert leaf.grad is not None and torch.equal(leaf.grad, gradients["dq"])
    with torch.inference_mode():
        assert torch.equal(dilated_attention_streamed(q, k, v, **PATTERN, range_length=48), want)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1e308}, ValueError, r"expected scale between .* for torch.float32, .* got -1e\+308"),
        ({"dropout_p": torch.zeros(2)}, NotImplementedError, "streaming has no dropout_p=tensor"),
    ],
)
def test_options_that_python_or_torch_would_refuse_without_a_name(options, error, message):
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(error, match=message):
        dilated_attention_streamed(x, x, x, segment_lengths=[4], dilation_rates=[1], **options)
