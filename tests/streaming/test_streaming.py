"""Streaming equals the whole: any ranges, sources and sinks; failures, memory and plans."""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dilated_attention_pytorch as package
from dilated_attention_pytorch import (
    DilatedPattern,
    UnifiedMemoryPool,
    dilated_attention,
    dilated_attention_with_lse,
    streaming,
)
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.streaming import Sizes, plan_ranges
from dilated_attention_pytorch.streaming.compact import compact_branches
from dilated_attention_pytorch.testing import gradient_scale, relative_norm

# Also where there is a GPU, which tests/streaming/test_streaming_gpu.py is for.
dilated_attention_streamed = functools.partial(package.dilated_attention_streamed, device="cpu")
streamed_forward = functools.partial(streaming.streamed_forward, device="cpu")
streamed_backward = functools.partial(streaming.streamed_backward, device="cpu")

PATTERN: dict[str, Any] = {"segment_lengths": (16, 64, 100), "dilation_rates": (1, 4, 6)}


class Source:
    """Rows of a tensor, handed out range by range and counted."""

    def __init__(self, x: Tensor, dim: int = 1, fail_from: int | None = None) -> None:
        self.x, self.dim, self.fail_from = x, dim, fail_from
        self.shape, self.dtype = x.shape, x.dtype
        self.read_rows = 0

    def read(self, start: int, stop: int) -> Tensor:
        if self.fail_from is not None and stop > self.fail_from:
            raise KeyboardInterrupt
        self.read_rows += stop - start
        return self.x.narrow(self.dim, start, stop - start).clone()


class IntoSource(Source):
    """A source that fills what it is given."""

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        self.read_rows += stop - start
        out.copy_(self.x[:, start:stop])


class Sink:
    """Collects rows; notes the order and whether all was committed."""

    def __init__(self, x: Tensor, dim: int = 1, fail_at: int | None = None) -> None:
        self.x, self.dim, self.fail_at = x, dim, fail_at
        self.next, self.committed = 0, 0

    def write(self, start: int, rows: Tensor) -> None:
        assert start == self.next and not self.committed
        if self.fail_at is not None and start >= self.fail_at:
            raise OSError("the disk is full")
        self.x.narrow(self.dim, start, rows.shape[self.dim]).copy_(rows)
        self.next += rows.shape[self.dim]

    def commit(self) -> None:
        self.committed += 1


class Ledger:
    """A pool's handles: what is lent now, and the most that was."""

    def __init__(self) -> None:
        self.lent, self.peak = 0, 0

    def borrow(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any, **_: Any) -> Any:
        ledger, tensor = self, torch.full(shape, 255, dtype=dtype, device=device)  # NaN in every float dtype

        class Handle:
            def __enter__(self) -> Handle:
                ledger.lent += tensor.nbytes
                ledger.peak = max(ledger.peak, ledger.lent)
                self.tensor = tensor
                return self

            def __exit__(self, *_: object) -> None:
                ledger.lent -= tensor.nbytes

        return Handle()


def draw_qkv(
    n: int, heads: int = 2, group: int = 1, batch: int = 1, width: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, n, heads * group, width, dtype=torch.float64)
    k, v = (torch.randn(batch, n, heads, width, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def whole(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention_with_lse(*leaves, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def streamed(q: Any, k: Any, v: Any, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    out, lse = streamed_forward(q, k, v, **options)
    dq, dk, dv = streamed_backward(grad_out, q, k, v, out, lse, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def errors(
    got: dict[str, Tensor], want: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> dict[str, float]:
    scale = q.shape[-1] ** -0.5
    scales = {"dq": gradient_scale(grad, None, v, k, scale), "dk": gradient_scale(grad, None, v, q, scale)}
    return {name: relative_norm(got[name], want[name], scale=scales.get(name, 0.0)) for name in want}


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
    heads, group, batch = (draw(st.sampled_from(x)) for x in ([1, 2, 3, 5], [1, 1, 2, 3], [1, 2]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = draw_qkv(n, heads, group, batch)
    grad = torch.randn_like(q)
    if masked:
        options["key_padding_mask"] = torch.rand(batch, n) < draw(st.sampled_from([0.1, 0.7]))
    length = draw(st.sampled_from([1, 3, 4, 8, 16, 32, 50, 64, 100, 128, 1000]))
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
    from dilated_attention_pytorch.streaming import sources

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


@pytest.mark.parametrize(("batch", "n"), [(1, 0), (0, 5), (0, 0)])
def test_nothing(batch: int, n: int) -> None:
    q, k, v = draw_qkv(n, batch=batch)
    got = streamed(q, k, v, torch.empty_like(q), **PATTERN)
    assert got["out"].shape == got["dq"].shape == q.shape and got["lse"].shape == (batch, 2, n)


@pytest.mark.parametrize("length", [33, 64])
def test_an_interruption_is_seen(length: int) -> None:
    """The error comes through, no thread is left, buffers are back, and what was written is marked."""
    q, k, v = draw_qkv(400)
    threads, pool = threading.active_count(), Ledger()
    options = {**PATTERN, "range_length": length, "pool": pool}
    out = torch.zeros_like(q)
    with pytest.raises(KeyboardInterrupt):
        dilated_attention_streamed(Source(q, fail_from=300), k, v, out=out, **options)
    assert out[:, 0].isnan().all() and out[:, length : 2 * length].any()
    sink = Sink(torch.zeros_like(q), fail_at=200)
    with pytest.raises(OSError, match="disk is full"):
        dilated_attention_streamed(q, k, v, out=sink, **options)
    assert sink.next >= 200 - length and not sink.committed
    assert threading.active_count() == threads and pool.lent == 0
    # The same buffers serve the next call.
    assert dilated_attention_streamed(q, k, v, out=out, **options) is out
    assert relative_norm(out, dilated_attention(q, k, v, **PATTERN)) <= 1e-12


def test_a_wrong_source_is_named() -> None:
    q, k, v = draw_qkv(64)
    source = Source(k)
    source.x = k[:, :, :1]
    with pytest.raises(ValueError, match=r"expected k\.read\(0, 32\) to give torch\.float64 \(1, 32, 2, 4\)"):
        dilated_attention_streamed(q, source, v, **PATTERN, range_length=32)


class TestCompactRows:
    @settings(max_examples=60)
    @given(data=st.data())
    def test_index_counts_members(self, data: st.DataObject) -> None:
        draw = data.draw
        pattern = DilatedPattern((draw(st.integers(1, 40)),), (draw(st.integers(1, 9)),), draw(st.integers(1, 5)))
        n = draw(st.integers(1, 120))
        members = pattern.membership(torch.arange(n))[0]
        seen = set()
        for branch in compact_branches(pattern, 0, n):
            for head in range(*branch.heads.indices(pattern.num_heads)):
                counts = [0, *members[head].cumsum(0).tolist()]
                assert [branch.count(0, p) for p in range(n + 1)] == counts
                seen.add(head)
            start, stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
            x = torch.arange(n)[None, :, None].repeat(1, 1, pattern.num_heads)
            out = x.new_empty(branch.shape(tuple(x.shape), branch.count(start, stop)))
            branch.gather(x[:, start:stop], start, start, stop, out)
            head = branch.heads.indices(pattern.num_heads)[0]
            positions = members[head].nonzero().flatten()
            assert out[0, :, 0, 0].tolist() == positions[(positions >= start) & (positions < stop)].tolist()
        assert all(not members[h].any() for h in range(pattern.num_heads) if h not in seen)


class TestPlan:
    def plan(self, n: int, limit: int, lengths: tuple[int, ...], rates: tuple[int, ...], **sizes: Any) -> Any:
        problem = Problem(DilatedPattern(lengths, rates, 1), False, 0.125, 0.0, 0, 0, n, "exact", "none")
        given = {"is_masked": False, "is_backward": False, "is_fused": True, "device_type": "cuda", **sizes}
        return plan_ranges(problem, Sizes(1, 1, 1, 64, torch.bfloat16, **given), limit)

    def test_powers_of_two(self) -> None:
        """64M tokens, w = 2048 .. 2M: ranges that no segment straddles, under 8 GiB in both passes."""
        lengths, rates = tuple(2048 << i for i in range(11)), tuple(1 << i for i in range(11))
        for is_backward in (False, True):
            plan = self.plan(1 << 26, 8 << 30, lengths, rates, is_backward=is_backward)
            assert plan.length == 1 << 21 and not plan.compact and plan.device_bytes < 8 << 30

    def test_segments_too_long_for_a_range_are_compact(self) -> None:
        plan = self.plan(1 << 26, 1 << 28, (2048, 1 << 26), (1, 1 << 15))
        assert plan.length % 2048 == 0 and len(plan.compact) == 1 and plan.compact[0].members.slots == 2048

    @settings(max_examples=60)
    @given(
        n=st.integers(1, 1 << 22), limit=st.integers(1 << 22, 1 << 30), fused=st.booleans(), backward=st.booleans(),
        branches=st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 64)), min_size=1, max_size=5),
    )  # fmt: skip
    def test_stays_within_the_limit_or_says_what_would_do(
        self, n: int, limit: int, fused: bool, backward: bool, branches: list[tuple[int, int]]
    ) -> None:
        lengths, rates = zip(*branches, strict=True)
        sizes = {"is_fused": fused, "is_backward": backward, "device_type": "cpu"}
        try:
            plan = self.plan(n, limit, lengths, rates, **sizes)
        except ValueError as error:
            needed = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
            assert f"got {limit:,}" in str(error) and needed > limit
            plan = self.plan(n, needed, lengths, rates, **sizes)
            limit = needed
        assert plan.device_bytes <= limit
        ranges = plan.ranges
        assert ranges[0][0] == 0 and ranges[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))

    def test_buffers_are_what_the_plan_says(self) -> None:
        """Staging alone is part of the plan's bytes, for either pass."""
        q, k, v = draw_qkv(4096, heads=2, group=2, width=16, dtype=torch.float32)
        for limit in (2 << 20, 4 << 20, 64 << 20):
            pool = Ledger()
            options = {**PATTERN, "device_limit": limit, "pool": pool}
            got = streamed(q, k, v, torch.randn_like(q), **options)
            assert 0 < pool.peak <= limit
            assert relative_norm(got["out"], dilated_attention(q, k, v, **PATTERN)) <= 1e-5


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"dropout_p": 0.1}, NotImplementedError, "dropout_p=0.1: dilated_attention computes it"),
            ({"mixing_gradient": "detached"}, NotImplementedError, "dilated_attention computes it"),
            ({"padding": "zero_keys"}, NotImplementedError, "dilated_attention computes it"),
            ({"cu_seqlens": torch.tensor([0, 64])}, NotImplementedError, "dilated_attention computes it"),
            ({"row_start": torch.tensor([1])}, NotImplementedError, "dilated_attention computes it"),
            ({"backend": "reference"}, NotImplementedError, "with dilated_attention"),
            ({"backend": "nope"}, ValueError, "expected backend"),
            ({"device": "meta"}, ValueError, "expected device"),
            ({"device_limit": 0}, ValueError, "device_limit"),
            ({"device_limit": 1000}, ValueError, "expected device_limit of at least .* got 1,000"),
            ({"range_length": 1.5}, TypeError, "range_length"),
            ({"is_causal": 1}, TypeError, "is_causal"),
            ({"progress": "no"}, TypeError, "progress to be a bool, got str 'no'"),
            ({"device": "foo"}, ValueError, "device to name a device.* got 'foo'"),
            ({"device": 3.5}, TypeError, "device to be a str or torch.device, got float"),
            ({"scale": "big"}, TypeError, "scale"),
            ({"key_padding_mask": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "key_padding_mask"),
            ({"out": torch.empty(1, 64, 2, 5)}, ValueError, "expected out"),
            ({"out": 3}, TypeError, "write"),
            ({"segment_lengths": [1]}, ValueError, "equal length"),
        ],
    )
    def test_options(self, change: dict[str, Any], error: type[Exception], words: str) -> None:
        q, k, v = draw_qkv(64)
        with pytest.raises(error, match=words):
            dilated_attention_streamed(q, k, v, **{**PATTERN, **change})

    def test_inputs(self) -> None:
        q, k, v = draw_qkv(64)
        for inputs, error, words in (
            ((q, k[:, :5], v[:, :5]), ValueError, "as many keys"),
            ((q, k.float(), v), (TypeError, ValueError), "dtype"),
            ((q, object(), v), TypeError, "expected k to be a Tensor or a source"),
            ((q.to("meta"), k, v), ValueError, "expected q in host memory"),
        ):
            with pytest.raises(error, match=words):
                dilated_attention_streamed(*inputs, **PATTERN)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"dtype": np.float32}, TypeError, "k.dtype to be a torch.dtype, got type <class 'numpy.float32'>"),
            ({"dtype": "float32"}, TypeError, "k.dtype to be a torch.dtype, got str 'float32'"),
            ({"shape": None}, TypeError, "k.shape to be a sequence of ints, got NoneType"),
            ({"shape": (1, 64, 2.0, 4)}, TypeError, r"k.shape\[2\] to be an int, got float"),
            ({"shape": (1, -64, 2, 4)}, ValueError, r"k.shape\[1\] to be at least 0, got -64"),
            ({"read": lambda start, stop: None}, TypeError, r"k\.read\(0, 32\) to give a Tensor, got NoneType"),
            ({"read": lambda start, stop: np.zeros((1, 32, 2, 4))}, TypeError, "to give a Tensor, got ndarray"),
            ({"read": lambda start, stop: torch.zeros(1, 5, 2, 4)}, ValueError, r"give .* got .* \(1, 5, 2, 4\)"),
            ({"read": lambda start, stop: torch.zeros(1, 32, 2, 4)}, ValueError, "torch.float64 .* got torch.float32"),
        ],
    )  # fmt: skip
    def test_sources(self, change: dict[str, Any], error: type[Exception], words: str) -> None:
        q, k, v = draw_qkv(64)
        source = Source(k)
        vars(source).update(change)
        with pytest.raises(error, match=words):
            dilated_attention_streamed(q, source, v, **PATTERN, range_length=32)

    def test_out_is_untouched_where_the_call_is_refused(self) -> None:
        q, k, v = draw_qkv(64)
        out = torch.zeros_like(q)
        with pytest.raises(ValueError, match="device_limit"):
            dilated_attention_streamed(q, k, v, out=out, device_limit=10, **PATTERN)
        with pytest.raises(PoolExhausted):
            dilated_attention_streamed(q, k, v, out=out, pool=UnifiedMemoryPool(limit=10), **PATTERN)
        assert not out.any()
        with pytest.raises(ValueError, match="memory of its own"):
            dilated_attention_streamed(q, k, v, out=q, **PATTERN)
        array = np.random.default_rng(0).standard_normal((1, 300, 2, 4))
        before, first, last = array.copy(), torch.from_numpy(array[:, :200]), torch.from_numpy(array[:, 100:])
        with pytest.raises(ValueError, match=r"expected out in memory of its own, got .* overlaps"):
            dilated_attention_streamed(first, first, first, out=last, **PATTERN)
        mask = last.view(torch.bool).flatten()[:200].view(1, 200)  # within out, not at its start
        with pytest.raises(ValueError, match="expected out in memory of its own"):
            dilated_attention_streamed(*draw_qkv(200), out=last, key_padding_mask=mask, **PATTERN)
        assert (array == before).all()

    def test_autograd_takes_tensors(self) -> None:
        q, k, v = draw_qkv(64)
        with pytest.raises(NotImplementedError, match="streamed_backward"):
            dilated_attention_streamed(q.requires_grad_(), Source(k), v, **PATTERN)
        with pytest.raises(ValueError, match="out=None"):
            dilated_attention_streamed(q, k, v, out=torch.empty_like(q), **PATTERN)

    def test_backward_wants_what_the_forward_gave(self) -> None:
        q, k, v = draw_qkv(64)
        out, lse = streamed_forward(q, k, v, **PATTERN)
        with pytest.raises(ValueError, match="expected lse"):
            streamed_backward(out, q, k, v, out, lse.transpose(1, 2), **PATTERN)
        dq = torch.empty_like(q)
        with pytest.raises(ValueError, match="expected dk in memory of its own"):
            streamed_backward(out.clone(), q, k, v, out, lse, dq=dq, dk=dq, **PATTERN)

    def test_the_pair_takes_the_same_options(self) -> None:
        q, k, v = draw_qkv(64)
        with pytest.raises(NotImplementedError, match=r"dropout_p=0\.1: dilated_attention computes it"):
            streamed_forward(q, k, v, dropout_p=0.1, **PATTERN)
        with pytest.raises(TypeError, match=r"options of .*'segment_lengths'.* got \['causal'\]"):
            streamed_forward(q, k, v, causal=True, **PATTERN)
        with pytest.raises(TypeError, match="given dilation_rates"):
            streamed_forward(q, k, v, segment_lengths=[4])
        streamed_forward(q, k, v, dropout_p=0.0, padding="none", **PATTERN)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = draw_qkv(64)
    dilated_attention_streamed(q, k, v, **PATTERN, range_length=16, progress=True)
    assert "ranges" in capsys.readouterr().out


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
