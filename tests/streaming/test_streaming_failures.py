"""What streaming refuses, before anything is written, and what a failure in the middle leaves behind."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from streams import (
    PATTERN,
    Ledger,
    Sink,
    Source,
    dilated_attention_streamed,
    draw_qkv,
    streamed_backward,
    streamed_forward,
)
from torch import Tensor

import dilated_attention_pytorch as package
from dilated_attention_pytorch import UnifiedMemoryPool, dilated_attention
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted
from dilated_attention_pytorch.streaming.call import REFUSED, Settings
from dilated_attention_pytorch.testing import relative_norm


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


class FailingOnce(Sink):
    """Fails at one write and would take the next."""

    def __init__(self, x: Tensor, fail_at: int) -> None:
        super().__init__(x)
        self.failing, self.starts = fail_at, list[int]()
        self.failed = threading.Event()

    def write(self, start: int, rows: Tensor) -> None:
        self.starts.append(start)
        if start == self.failing:
            # The next range is computed meanwhile, and its write waits in line.
            self.failed.wait(0.3)
            raise OSError("the disk is full")


def test_no_write_follows_one_that_failed() -> None:
    """It would leave a gap that the sink cannot know of."""
    sink = FailingOnce(torch.empty(0), fail_at=64)
    with pytest.raises(OSError, match="disk is full"):
        dilated_attention_streamed(*draw_qkv(400), out=sink, **PATTERN, range_length=32)
    assert sink.starts == [0, 32, 64] and not sink.committed


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
            ((q, k[:, :5], v[:, :5]), ValueError, "k and v of as many positions as q"),
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

    def test_the_pair_has_the_same_defaults(self) -> None:
        parameters = inspect.signature(package.dilated_attention_streamed).parameters
        given = {field.name: field.default for field in fields(Settings)} | REFUSED
        for name in ("segment_lengths", "dilation_rates"):
            del given[name]
        assert given == {name: parameters[name].default for name in given}


def kinds() -> dict[str, Tensor]:
    """Tensors (1, 64, 2, 4) without plain rows in memory."""
    x = torch.zeros(1, 64, 2, 4, dtype=torch.float64)
    return {
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([x[0]]),
        "jagged": torch.nested.nested_tensor([x[0]], layout=torch.jagged),
        "mkldnn": x.float().to_mkldnn(),
    }


class TestOddKinds:
    """Each argument is named in an error of its own, not in one of torch's."""

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("kind", ["sparse", "nested", "jagged", "mkldnn"])
    @pytest.mark.parametrize("name", ["q", "k", "v", "key_padding_mask", "grad_out", "out", "lse"])
    def test_inputs(self, kind: str, name: str) -> None:
        x = kinds()[kind]
        q, k, v = draw_qkv(64)
        arguments = {"grad_out": q, "q": q, "k": k, "v": v, "out": q, "lse": torch.zeros(1, 2, 64, dtype=q.dtype)}
        with pytest.raises((TypeError, ValueError), match=f"^expected {name} "):
            streamed_backward(**{**arguments, name: x}, **PATTERN)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("kind", ["sparse", "nested", "jagged", "mkldnn"])
    @pytest.mark.parametrize("name", ["out", "lse"])
    def test_targets(self, kind: str, name: str) -> None:
        with pytest.raises((TypeError, ValueError), match=f"^expected {name} to be a dense tensor, got "):
            streamed_forward(*draw_qkv(64), **PATTERN, **{name: kinds()[kind]})

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("kind", ["sparse", "nested"])
    def test_what_a_source_reads(self, kind: str) -> None:
        q, k, v = draw_qkv(64)
        source = Source(k)
        vars(source)["read"] = lambda start, stop: kinds()[kind]
        with pytest.raises(TypeError, match=r"^expected k\.read\(0, 64\) to be a dense tensor, got "):
            dilated_attention_streamed(q, source, v, **PATTERN)

    @pytest.mark.parametrize("make", [lambda x: x.numpy(), lambda x: torch.tensor(1.0), lambda x: [1.0], lambda x: 3])
    @pytest.mark.parametrize("name", ["q", "grad_out", "lse", "dq", "dv"])
    def test_arrays_and_scalars(self, make: Callable[[Tensor], Any], name: str) -> None:
        q, k, v = draw_qkv(64)
        arguments = {"grad_out": q, "q": q, "k": k, "v": v, "out": q, "lse": torch.zeros(1, 2, 64, dtype=q.dtype)}
        with pytest.raises((TypeError, ValueError), match=f"^expected {name} "):
            streamed_backward(**{**arguments, name: make(q)}, **PATTERN)

    @pytest.mark.parametrize("change", [{"read": None}, {"read": 3}, {"read_into": 3}, {"shape": (1, 2**61, 2, 4)}])
    def test_sources(self, change: dict[str, Any]) -> None:
        q, k, v = draw_qkv(64)
        source = Source(k)
        vars(source).update(change)
        with pytest.raises((TypeError, ValueError), match=r"^expected k"):
            dilated_attention_streamed(q, source, v, **PATTERN)

    def test_a_commit_that_cannot_be_called(self) -> None:
        """Refused before the first write rather than after the last."""
        q, k, v = draw_qkv(64)
        sink = Sink(torch.empty_like(q))
        vars(sink)["commit"] = 3
        with pytest.raises(TypeError, match=r"expected out\.commit to be a method, got int"):
            dilated_attention_streamed(q, k, v, out=sink, **PATTERN)
        assert sink.next == 0

    @pytest.mark.parametrize(
        ("size", "strides"),
        [(1, (0, 0, 0, 0)), (512, (512, 8, 0, 1)), (512, (512, 0, 4, 1)), (512, (8, 4, 4, 1)), (512, (1, 1, 4, 1))],
    )
    def test_an_out_whose_elements_share_memory(self, size: int, strides: tuple[int, ...]) -> None:
        """A stride of 0 (expanded) or below what it steps over (unfolded): one row would overwrite another."""
        out = torch.zeros(size, dtype=torch.float64).as_strided((1, 64, 2, 4), strides)
        with pytest.raises(ValueError, match="expected out with memory of its own for each element, got strides"):
            dilated_attention_streamed(*draw_qkv(64), out=out, **PATTERN)
        lse = torch.zeros(1, 1, 64, dtype=torch.float64).expand(1, 2, 64)
        plain = torch.zeros(1, 64, 2, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match="expected lse with memory of its own"):
            streamed_forward(*draw_qkv(64), out=plain, lse=lse, **PATTERN)
        assert not out.any() and not plain.any()

    def test_an_inference_tensor(self) -> None:
        with torch.inference_mode():
            out = torch.zeros(1, 64, 2, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match="expected out to be writable, got an inference tensor"):
            dilated_attention_streamed(*draw_qkv(64), out=out, **PATTERN)


@pytest.mark.parametrize("rate", [3, 2**60])
def test_lengths_near_two_to_the_63(rate: int) -> None:
    """The strides that nothing steps over would not fit 64 bits."""
    q, k, v = draw_qkv(64)
    options: dict[str, Any] = {"segment_lengths": [16, 2**62], "dilation_rates": [1, rate]}
    out = dilated_attention_streamed(q, k, v, **options, range_length=24)
    assert relative_norm(out, dilated_attention(q, k, v, **options)) <= 1e-12
