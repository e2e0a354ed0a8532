"""Streaming through a GPU: the numbers of the whole, pinned and ordinary memory, the limit kept, no stale buffers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from streams import Sink, Source
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool, dilated_attention_streamed, dilated_attention_with_lse
from dilated_attention_pytorch.streaming import streamed_backward, streamed_forward
from dilated_attention_pytorch.testing import relative_norm

pytestmark = pytest.mark.gpu

NESTED: dict[str, Any] = {"segment_lengths": [512, 2048, 8192, 32768], "dilation_rates": [1, 4, 16, 64]}
RAGGED: dict[str, Any] = {"segment_lengths": [300, 1111, 9000], "dilation_rates": [1, 3, 8], "offsets": "blocked"}


def draw(n: int, heads: int, group: int, width: int, dtype: torch.dtype, *, batch: int = 1) -> list[Tensor]:
    """q, k, v and a cotangent, in host memory."""
    shapes = [(batch, n, heads * group, width), (batch, n, heads, width), (batch, n, heads, width)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (*shapes, shapes[0])]


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"].cuda()
    out, lse = dilated_attention_with_lse(*leaves, **options)
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(out, leaves, grad.cuda()))]


def streamed(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    out, lse = streamed_forward(q, k, v, **options)
    return [out, lse, *streamed_backward(grad, q, k, v, out, lse, **options)]


@pytest.mark.parametrize("pattern", [NESTED, RAGGED])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [2048, 5000, 1 << 20])
def test_equals_the_whole_in_fp64(pattern: dict[str, Any], is_causal: bool, length: int) -> None:
    inputs = draw(20000, 3, 2, 16, torch.float64, batch=2)
    options = {**pattern, "is_causal": is_causal, "key_padding_mask": torch.rand(2, 20000) < 0.8}
    want, got = whole(*inputs, **options), streamed(*inputs, range_length=length, **options)
    assert max(relative_norm(a, b) for a, b in zip(got, want, strict=True)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("pattern", [NESTED, RAGGED])
@pytest.mark.parametrize("pinned", [False, True])
def test_is_as_good_as_the_whole(dtype: torch.dtype, backend: str, pattern: dict[str, Any], pinned: bool) -> None:
    """At most twice the error of the whole in the same dtype, against sdpa in fp64."""
    inputs = draw(70000, 2, 1, 64, dtype)
    truth = whole(*(x.double() for x in inputs), **pattern, backend="sdpa")
    base = whole(*inputs, **pattern, backend="sdpa")
    if pinned:
        inputs = [x.pin_memory() for x in inputs]
    for length in (8192, 10000):
        got = streamed(*inputs, range_length=length, backend=backend, **pattern)
        for name, a, b, exact in zip(("out", "lse", "dq", "dk", "dv"), got, base, truth, strict=True):
            # lse comes from the device's exp2 and log2: an ulp of the sum of each.
            floor = 4 * torch.finfo(torch.float32).eps
            assert relative_norm(a, exact) <= max(2 * relative_norm(b, exact), floor), (name, length)


@pytest.mark.parametrize("pinned", [False, True])
def test_many_short_ranges_never_meet_stale_buffers(pinned: bool) -> None:
    """A race between copies and kernels would show a neighbour range's values."""
    n, length = 500 * 1024, 1024
    q, k, _, grad = draw(n, 1, 1, 64, torch.float32)
    v = (torch.arange(n) // length).float()[None, :, None, None].expand(1, n, 1, 64).contiguous()
    pattern: dict[str, Any] = {"segment_lengths": [256, 1024], "dilation_rates": [1, 4], "range_length": length}
    if pinned:
        q, k, v, grad = (x.pin_memory() for x in (q, k, v, grad))
    out = torch.empty_like(q, pin_memory=pinned)
    for _ in range(3):
        dilated_attention_streamed(q, k, v, out=out.fill_(-1), **pattern)
        torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)  # a mean of equal values is that value


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("pattern", [NESTED, RAGGED])
def test_device_limit(backend: str, pattern: dict[str, Any]) -> None:
    """What torch allocates stays under the limit, forward and backward, and the limit is used."""
    inputs = draw(1 << 20, 1, 1, 64, torch.bfloat16)
    for limit in (512 << 20, 2 << 30):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        streamed(*inputs, backend=backend, device_limit=limit, **pattern)
        assert torch.cuda.max_memory_allocated() - before <= limit
    with pytest.raises(ValueError, match="device_limit of at least"):
        streamed_forward(*inputs[:3], backend=backend, device_limit=1 << 10, **pattern)
    assert torch.cuda.memory_allocated() == before


def test_autograd_and_an_error_in_the_middle() -> None:
    q, k, v, grad = draw(20000, 2, 1, 64, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(dilated_attention_streamed(*leaves, **NESTED, range_length=4096), leaves, grad)
    want = streamed(*(x.detach() for x in leaves), grad, **NESTED, range_length=4096)[2:]
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))

    class Full:
        def write(self, start: int, rows: Tensor) -> None:
            if start:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        dilated_attention_streamed(*(x.detach() for x in leaves), out=Full(), **NESTED, range_length=4096)
    again = dilated_attention_streamed(*(x.detach() for x in leaves), **NESTED, range_length=4096)
    assert again.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_rows_that_overlap_in_memory(backend: str) -> None:
    """Of q, k, v and the gradient: the values decide, on their way through staging too."""
    n, width = 20000, 64
    overlapping = torch.randn(n + width - 1, dtype=torch.bfloat16).unfold(0, width, 1)[None, :, None]
    options = {**RAGGED, "range_length": 4096, "backend": backend}
    for which in range(4):
        inputs = draw(n, 1, 1, width, torch.bfloat16)
        inputs[which] = overlapping
        got = streamed(*inputs, **options)
        inputs[which] = overlapping.contiguous()
        for a, b in zip(got, streamed(*inputs, **options), strict=True):
            assert relative_norm(a, b.double()) <= 8 * torch.finfo(torch.bfloat16).eps, which


@pytest.mark.parametrize("strides", [(0, 0, 0, 0), (64, 1, 64, 1), (64 * 20000, 64, 64, 0)])
def test_an_out_whose_elements_share_memory_is_refused_untouched(strides: tuple[int, ...]) -> None:
    q, k, v, _ = draw(20000, 1, 1, 64, torch.bfloat16)
    out = torch.zeros(q.numel(), dtype=q.dtype).as_strided(q.shape, strides)
    with pytest.raises(ValueError, match="expected out with memory of its own for each element, got strides"):
        dilated_attention_streamed(q, k, v, out=out, **NESTED, range_length=4096)
    assert not out.any()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_source_or_a_sink_that_fails_leaves_nothing_behind(pinned: bool) -> None:
    """No thread, no buffer lent, no write after the one that failed; the same buffers serve the next call."""
    q, k, v, _ = (x.pin_memory() if pinned else x for x in draw(20000, 2, 1, 64, torch.bfloat16))
    pool, threads = UnifiedMemoryPool(), threading.active_count()
    options: dict[str, Any] = {**NESTED, "range_length": 2048, "pool": pool}
    want = dilated_attention_streamed(q, k, v, **options)
    out = torch.empty_like(q, pin_memory=pinned)
    with pytest.raises(KeyboardInterrupt):
        dilated_attention_streamed(Source(q, fail_from=9000), k, v, out=out, **options)
    assert out[:, 0].isnan().all()
    sink = Sink(torch.zeros_like(q), fail_at=9000)
    with pytest.raises(OSError, match="disk is full"):
        dilated_attention_streamed(q, k, v, out=sink, **options)
    assert 9000 <= sink.next < 9000 + 2048 and not sink.committed and torch.equal(
        sink.x[:, : sink.next], want[:, : sink.next]
    )  # fmt: skip
    assert threading.active_count() == threads and pool.stats().live == 0
    assert torch.equal(dilated_attention_streamed(q, k, v, **options), want)
