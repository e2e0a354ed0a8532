"""One suite over every strategy of the memory pool, on the CPU, on fake devices with fake streams and on CUDA."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_streams import GARBAGE, FakeRuntime
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory import replay, topology
from dilated_attention_pytorch.core.memory.blocks import ALIGNMENT, aligned
from dilated_attention_pytorch.core.memory.events import read_events
from dilated_attention_pytorch.core.memory.stats import fragmentation
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted

NAMES = list(STRATEGIES)
DTYPES = [torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
SIZES = [1, 2, 3, 511, 512, 513, 1000, 4096, 65_537, 1 << 20, (1 << 20) + 1, 5_000_003]
CUDA_0, CUDA_1 = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def pool(strategy: str) -> Iterator[UnifiedMemoryPool]:
    pool = UnifiedMemoryPool(strategy)
    yield pool
    adds_up(pool)


def adds_up(pool: UnifiedMemoryPool) -> Any:
    stats = pool.stats()
    assert stats.reserved == stats.current + stats.waste + stats.free
    assert 0 <= stats.fragmentation <= 1
    for table in (stats.by_purpose, stats.by_device):
        for field in ("current", "requested", "waste", "live", "hits", "misses", "waits"):
            assert sum(getattr(c, field) for c in table.values()) == getattr(stats, field), field
    assert stats.peak_reserved >= stats.reserved and stats.peak >= stats.current
    return stats


def spans(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())


def assert_disjoint(tensors: list[Tensor]) -> None:
    found = spans(tensors)
    assert all(a[1] <= b[0] for a, b in pairwise(found)), "two live blocks overlap"


class TestSizes:
    @pytest.mark.parametrize("shape", [0, (0,), (3, 0, 5)], ids=str)
    def test_nothing(self, pool: UnifiedMemoryPool, device: torch.device, shape: Any) -> None:
        with pool.borrow(shape, torch.float32, device, purpose="none") as handle:
            assert handle.tensor.shape == torch.empty(shape).shape and handle.tensor.device.type == device.type
            assert pool.stats().live == 1
        assert pool.stats().reserved == pool.stats().live == 0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_all_sizes_live_together(self, pool: UnifiedMemoryPool, device: torch.device, dtype: torch.dtype) -> None:
        alignment = ALIGNMENT if device.type == "cuda" else 64
        handles = [pool.borrow(n, dtype, device, purpose=str(n)) for n in SIZES]
        for n, handle in zip(SIZES, handles, strict=True):
            x = handle.tensor
            assert x.shape == (n,) and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % alignment == 0
            x.fill_(n % 2)
        assert_disjoint([h.tensor for h in handles])
        for n, handle in zip(SIZES, handles, strict=True):
            assert bool((handle.tensor == n % 2).all())
            handle.release()
        assert pool.stats().current == 0

    def test_a_shape_is_what_empty_makes_of_it(self, pool: UnifiedMemoryPool) -> None:
        for shape in ((), (1,), (2, 3, 5), torch.Size([7, 1]), [4, 4], 9):
            with pool.borrow(shape, torch.float64, "cpu", "shapes") as handle:
                assert handle.tensor.shape == torch.empty(shape).shape
                assert handle.tensor.stride() == torch.empty(shape).stride()
                assert not handle.tensor.requires_grad

    def test_huge(self, pool: UnifiedMemoryPool, device: torch.device) -> None:
        held = pool.borrow(1000, torch.uint8, device, purpose="small")
        with pytest.raises(PoolExhausted, match=r"'too much' on .*'small'"):
            pool.borrow(1 << 60, torch.uint8, device, purpose="too much")
        assert pool.stats().live == 1
        held.release()
        with pool.borrow(1000, torch.uint8, device, purpose="small") as again:
            again.tensor.fill_(1)

    @pytest.mark.parametrize("shape", [(1 << 63) - 1, 1 << 63, 10**30, (1 << 40, 1 << 40)], ids=str)
    def test_more_than_torch_can_count(self, strategy: str, shape: Any) -> None:
        alone = isinstance(shape, int) and shape >= 1 << 63
        refused, message = (ValueError, "shape to be below") if alone else (PoolExhausted, "64 bits")
        for limit in (None, (1 << 63) - 1):
            pool = UnifiedMemoryPool(strategy, limit)
            with pytest.raises(refused, match=message):
                pool.borrow(shape, torch.uint8, "cpu", purpose="x")
            stats = adds_up(pool)
            assert stats.reserved == stats.peak_reserved == stats.live == 0

    @pytest.mark.parametrize("shape", [(0, 1 << 63), (0, 1 << 62, 8)], ids=str)
    def test_nothing_of_more_than_torch_can_count(self, pool: UnifiedMemoryPool, shape: Any) -> None:
        with pytest.raises(ValueError, match=r"shape to (have strides of 64 bits|be below 2\*\*63)"):
            pool.borrow(shape, torch.uint8, "cpu", purpose="x")

    def test_bucketed_wastes_less_than_a_quarter(self) -> None:
        rounded = BucketedStrategy(None).rounded  # type: ignore[arg-type]
        for size in [*range(1, 20_000), *(2**k + d for k in range(12, 40) for d in (-1, 0, 1, 511, 513))]:
            assert size <= rounded(size) and rounded(size) % ALIGNMENT == 0
            assert rounded(size) < 1.25 * size or size <= 2048, size
            assert rounded(rounded(size)) == rounded(aligned(size)) == rounded(size)


class TestHandles:
    def test_a_block_comes_back_at_its_address(self, pool: UnifiedMemoryPool, device: torch.device) -> None:
        with pool.borrow((5, 7), torch.float32, device, purpose="x") as handle:
            address = handle.tensor.data_ptr()
        for _ in range(10):
            with pool.borrow((5, 7), torch.float32, device, purpose="x") as handle:
                assert handle.tensor.data_ptr() == address
        stats = adds_up(pool)
        assert (stats.hits, stats.misses, stats.live) == (10, 1, 0)

    def test_never_filled_unless_asked(self, pool: UnifiedMemoryPool, device: torch.device) -> None:
        with pool.borrow(1000, torch.uint8, device, purpose="x") as handle:
            handle.tensor.fill_(7)
        with pool.borrow(1000, torch.uint8, device, purpose="x") as handle:
            assert bool((handle.tensor == 7).all())
        with pool.borrow(1000, torch.uint8, device, purpose="x", zero=True) as handle:
            assert not bool(handle.tensor.any())

    def test_release_is_idempotent(self, pool: UnifiedMemoryPool) -> None:
        first = pool.borrow(100, torch.uint8, "cpu", purpose="x")
        first.release()
        second = pool.borrow(100, torch.uint8, "cpu", purpose="x")
        first.release()  # must not free the second's block
        third = pool.borrow(100, torch.uint8, "cpu", purpose="x")
        assert_disjoint([second.tensor, third.tensor])
        assert first.released and not second.released
        with pytest.raises(ValueError, match="expected a handle that was not released"):
            first.tensor  # noqa: B018

    def test_exceptions_between_borrow_and_release(self, pool: UnifiedMemoryPool) -> None:
        for _ in range(3):
            with pytest.raises(KeyError), pool.borrow(100, torch.uint8, "cpu", purpose="x"):
                raise KeyError
        assert (pool.stats().live, pool.stats().misses) == (0, 1)

    def test_a_dropped_handle_returns_its_block(self, pool: UnifiedMemoryPool) -> None:
        handle = pool.borrow(100, torch.uint8, "cpu", purpose="x")
        ring: list[Any] = [handle]
        ring.append(ring)
        del handle, ring
        gc.collect()
        stats = adds_up(pool)
        assert (stats.live, stats.current, stats.dropped) == (0, 0, 1)
        with pool.borrow(100, torch.uint8, "cpu", purpose="x"):
            assert pool.stats().misses == 1

    def test_a_release_by_tensor_refuses_what_is_not_lent(self, pool: UnifiedMemoryPool) -> None:
        handle = pool.borrow(100, torch.uint8, "cpu", purpose="x")
        tensor = handle.tensor
        for foreign in (torch.empty(100), tensor[:], tensor.view(10, 10)):
            with pytest.raises(ValueError, match="foreign or already released"):
                pool.release(foreign)
        with pytest.raises(ValueError, match="foreign or already released"):
            UnifiedMemoryPool().release(tensor)
        pool.release(tensor)
        assert handle.released
        with pool.borrow(100, torch.uint8, "cpu", purpose="x") as other:
            assert other.tensor.data_ptr() == tensor.data_ptr()
            with pytest.raises(ValueError, match="foreign or already released"):
                pool.release(tensor)
            assert not other.released

    def test_memory_of_inference_mode_serves_training(self, pool: UnifiedMemoryPool) -> None:
        with torch.inference_mode(), pool.borrow(10, torch.float32, "cpu", purpose="x") as handle:
            handle.tensor.fill_(1.0)
        with pool.borrow(10, torch.float32, "cpu", purpose="x") as handle:
            x = torch.ones(10, requires_grad=True)
            handle.tensor.copy_(x.detach())
            (x * handle.tensor).sum().backward()
            assert x.grad is not None and x.grad.sum() == 10

    @pytest.mark.parametrize("size", [0, 10])
    def test_a_handle_outlives_inference_mode(self, pool: UnifiedMemoryPool, size: int) -> None:
        with torch.inference_mode():
            handle = pool.borrow(size, torch.float32, "cpu", purpose="x", zero=True)
            assert torch.is_inference_mode_enabled()
        assert not handle.tensor.is_inference() and not handle.tensor.requires_grad
        handle.tensor.fill_(1.0)
        x = torch.ones(size, requires_grad=True)
        (x * handle.tensor).sum().backward()
        assert x.grad is not None and x.grad.sum() == size
        handle.release()

    @pytest.mark.parametrize("size", [0, 10])
    @pytest.mark.parametrize("pinned", [False, True])
    def test_the_default_device_is_not_asked(self, strategy: str, size: int, pinned: bool) -> None:
        pool = UnifiedMemoryPool(strategy)
        with torch.device("meta"), pool.borrow(size, torch.float32, "cpu", "x", pinned=pinned, zero=True) as handle:
            assert handle.tensor.device.type == "cpu" and not handle.tensor.any()

    def test_autograd_notices_what_it_should_not_have_saved(self) -> None:
        """Blocks of whole allocations share a version counter with the next borrower's tensor."""
        pool = UnifiedMemoryPool("simple")
        x = torch.ones(10, requires_grad=True)
        with pool.borrow(10, torch.float32, "cpu", purpose="x") as handle:
            y = (x * handle.tensor.fill_(2.0)).sum()
        with pool.borrow(10, torch.float32, "cpu", purpose="x") as handle:
            handle.tensor.fill_(3.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


class TestArguments:
    def test_constructor(self) -> None:
        with pytest.raises(ValueError, match=r"one of \['simple', 'bucketed', 'fragment_aware', 'numa', 'adaptive'\]"):
            UnifiedMemoryPool("best")
        with pytest.raises(ValueError, match=r"strategy to be one of .* got \['simple'\]"):
            UnifiedMemoryPool(["simple"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="limit to be at least 1, got 0"):
            UnifiedMemoryPool(limit=0)
        for limit in (1.5, True, "1"):
            with pytest.raises(TypeError, match="limit"):
                UnifiedMemoryPool(limit=limit)  # type: ignore[arg-type]

    def test_borrow(self, pool: UnifiedMemoryPool) -> None:
        for shape in ("3", 1.5, (1, 2.0), (True,), None):
            with pytest.raises(TypeError, match="shape"):
                pool.borrow(shape, torch.float32, "cpu", purpose="x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="shape"):
            pool.borrow((2, -1), torch.float32, "cpu", purpose="x")
        with pytest.raises(TypeError, match="dtype"):
            pool.borrow(3, "float32", "cpu", purpose="x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="device"):
            pool.borrow(3, torch.float32, 0, purpose="x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="purpose"):
            pool.borrow(3, torch.float32, "cpu", purpose=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'cpu' or 'cuda', got 'mps'"):
            pool.borrow(3, torch.float32, "mps", purpose="x")
        with pytest.raises(ValueError, match="expected device to be there, got 'cuda:99'"):
            pool.borrow(3, torch.float32, "cuda:99", purpose="x")
        for device in ("foo", "cuda:-1"):
            with pytest.raises(ValueError, match=f"device to name a device.* got '{device}'"):
                pool.borrow(3, torch.float32, device, purpose="x")
        for flag in ("pinned", "zero"):
            with pytest.raises(TypeError, match=f"{flag} to be a bool, got str 'no'"):
                pool.borrow(3, torch.float32, "cpu", purpose="x", **{flag: "no"})
        assert pool.stats().requested == 0

    def test_integers_of_numpy(self, strategy: str, tmp_path: Path) -> None:
        pool = UnifiedMemoryPool(strategy, limit=np.int64(1 << 22))  # type: ignore[arg-type]
        with pool.record(tmp_path / "events.jsonl"):
            for shape, want in (((np.int64(3), 4), (3, 4)), (np.int32(5), (5,))):
                with pool.borrow(shape, torch.float32, "cpu", purpose="x") as handle:  # type: ignore[arg-type]
                    assert handle.tensor.shape == want
        assert [e.size for e in read_events(tmp_path / "events.jsonl") if e.kind == "borrow"] == [48, 20]
        with pytest.raises(TypeError, match="shape to be an int or a sequence of ints, got ndarray"):
            pool.borrow(np.array([3, 4]), torch.float32, "cpu", purpose="x")  # type: ignore[arg-type]

    @pytest.mark.parametrize("stream", ["nonsense", 0, 1.5, ["nonsense"]], ids=str)
    def test_what_is_no_stream(self, pool: UnifiedMemoryPool, device: torch.device, stream: Any) -> None:
        handle = pool.borrow(3, torch.float32, device, purpose="x")
        for release in (handle.release, lambda stream: pool.release(handle.tensor, stream)):
            with pytest.raises(TypeError, match=r"stream to be a torch\.cuda\.Stream, got"):
                release(stream)
            assert pool.stats().live == 1 and not handle.released
        handle.release([None] if device.type == "cpu" else None)
        assert pool.stats().live == 0
        with pytest.raises(TypeError, match="tensor to be a Tensor, got str"):
            pool.release("x")  # type: ignore[arg-type]

    @pytest.mark.gpu
    def test_pinned_memory_is_host_memory(self, pool: UnifiedMemoryPool) -> None:
        with pytest.raises(ValueError, match="pinned"):
            pool.borrow(3, torch.float32, "cuda", purpose="x", pinned=True)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
    def test_pinned_without_cuda_is_ordinary_memory(self, pool: UnifiedMemoryPool) -> None:
        with pool.borrow(3, torch.float32, "cpu", purpose="x", pinned=True) as handle:
            assert not handle.tensor.is_pinned()
        assert list(pool.stats().by_device) == ["cpu pinned"]


class TestLimit:
    def test_it_trims_then_names_the_largest_owners(self, strategy: str) -> None:
        pool = UnifiedMemoryPool(strategy, limit=9 << 20)
        pool.borrow(2 << 20, torch.uint8, "cpu", purpose="passing").release()
        rows = pool.borrow(4 << 20, torch.uint8, "cpu", purpose="rows")
        mask = pool.borrow(1 << 20, torch.uint8, "cpu", purpose="mask")
        pool.borrow(3 << 20, torch.uint8, "cpu", purpose="fits after trimming").release()
        before = pool.stats()
        with pytest.raises(PoolExhausted, match=r"'gradients'.*limit of 9437184.*'rows' 4.0 MiB in 1.*'mask' 1.0 MiB"):
            pool.borrow(6 << 20, torch.uint8, "cpu", purpose="gradients")
        after = adds_up(pool)
        assert after.current == before.current == 5 << 20 and after.peak_reserved <= 9 << 20
        assert after.trims > 0 and "gradients" not in after.by_purpose
        rows.release(), mask.release()
        with pool.borrow(6 << 20, torch.uint8, "cpu", purpose="gradients"):
            pass

    def test_a_limit_smaller_than_a_slab(self, strategy: str) -> None:
        pool = UnifiedMemoryPool(strategy, limit=5000)
        with pool.borrow(4000, torch.uint8, "cpu", purpose="x"):
            assert pool.stats().reserved <= 5000

    def test_a_request_gets_its_own_size_where_its_class_has_no_room(self, strategy: str) -> None:
        """And the block serves such requests again, but none that is larger."""
        pool = UnifiedMemoryPool(strategy, limit=1_200_000)
        addresses = set()
        for _ in range(3):
            with pool.borrow(1_100_000, torch.uint8, "cpu", purpose="x") as handle:
                handle.tensor.fill_(1)
                addresses.add(handle.tensor.data_ptr())
        stats = adds_up(pool)
        assert len(addresses) == 1 and (stats.hits, stats.misses, stats.trims) == (2, 1, 0)
        with pool.borrow(1_190_000, torch.uint8, "cpu", purpose="x") as larger:
            larger.tensor.fill_(1)
            assert larger.tensor.numel() == 1_190_000 and adds_up(pool).reserved <= 1_200_000
        pool.trim()
        assert pool.stats().reserved == 0

    def test_the_refusal_names_the_rounding(self, strategy: str) -> None:
        pool = UnifiedMemoryPool(strategy, limit=4100)
        with pytest.raises(PoolExhausted, match=r"4100 bytes \(4608 in whole units of 512\).* limit of 4100 bytes"):
            pool.borrow(4100, torch.uint8, "cpu", purpose="x")
        with pytest.raises(PoolExhausted, match="expected 4608 bytes for"):
            pool.borrow(4608, torch.uint8, "cpu", purpose="x")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, torch.OutOfMemoryError])
    def test_a_failed_allocation_books_nothing(
        self, strategy: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Tensor:
            raise error

        pool = UnifiedMemoryPool(strategy, runtime=FakeRuntime())
        monkeypatch.setattr(FakeRuntime, "allocate", fail)
        with pytest.raises(PoolExhausted if error is torch.OutOfMemoryError else error):
            pool.borrow(1 << 20, torch.uint8, "cpu", purpose="x")
        monkeypatch.undo()
        assert adds_up(pool).reserved == pool.stats().peak_reserved == 0
        pool.borrow(1 << 20, torch.uint8, "cpu", purpose="x").release()

    def test_trim(self, pool: UnifiedMemoryPool) -> None:
        handles = [pool.borrow(3 << 20, torch.uint8, "cpu", purpose="x") for _ in range(4)]
        address = handles[0].tensor.data_ptr()
        for handle in handles[1:]:
            handle.release()
        before = pool.stats().reserved
        freed = pool.trim()
        assert freed > 0 and pool.stats().reserved == before - freed and handles[0].tensor.data_ptr() == address
        handles[0].release()
        pool.trim()
        assert pool.stats().reserved == 0

    def test_memory_of_the_system(self, strategy: str) -> None:
        runtime = FakeRuntime(capacity=1 << 20)
        pool = UnifiedMemoryPool(strategy, runtime=runtime)
        with pytest.raises(PoolExhausted, match="the fake device is full"):
            pool.borrow(2 << 20, torch.uint8, "cuda:1", purpose="x")
        assert adds_up(pool).reserved == 0


class TestStreams:
    """Fake streams through the very code that CUDA's go through."""

    @pytest.fixture
    def runtime(self) -> FakeRuntime:
        return FakeRuntime()

    @pytest.fixture
    def fakes(self, strategy: str, runtime: FakeRuntime) -> UnifiedMemoryPool:
        return UnifiedMemoryPool(strategy, runtime=runtime)

    def test_a_busy_block_waits_for_its_writer(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        old, new = runtime.stream("old"), runtime.stream("new")
        seen = []
        with runtime.using(old, CUDA_0), fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x") as handle:
            x = handle.tensor
            runtime.launch(old, lambda: x.fill_(1))
        with runtime.using(new, CUDA_0), fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x") as handle:
            y = handle.tensor
            runtime.launch(new, lambda: y.fill_(2))
            runtime.advance(new)  # before the old writer ran
            runtime.advance(old)
            runtime.launch(new, lambda: seen.append(y.clone()))
        runtime.finish()
        assert x.data_ptr() == y.data_ptr() and bool((seen[0] == 2).all())
        assert fakes.stats().waits == 1 and fakes.stats().misses == 1

    def test_the_same_stream_waits_for_nothing(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        for _ in range(3):
            with fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x") as handle:
                runtime.launch(runtime.defaults[CUDA_0], handle.tensor.zero_)
        assert fakes.stats().waits == 0 and fakes.stats().misses == 1

    def test_a_finished_block_is_taken_before_a_busy_one(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        slow, fast, new = (runtime.stream(name) for name in ("slow", "fast", "new"))
        handles, addresses = [], []
        for stream in (fast, slow):
            with runtime.using(stream, CUDA_0):
                handles.append(fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x"))
                addresses.append(handles[-1].tensor.data_ptr())
        for stream, handle in zip((fast, slow), handles, strict=True):
            with runtime.using(stream, CUDA_0):
                handle.release()
        runtime.advance(fast)
        with runtime.using(new, CUDA_0), fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x") as handle:
            assert handle.tensor.data_ptr() == addresses[0]
        assert fakes.stats().waits == 0

    def test_named_streams_are_those_waited_for(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        side = [runtime.stream("side 0"), runtime.stream("side 1")]
        order: list[str] = []
        handle = fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x")
        for stream in side:
            runtime.launch(stream, lambda stream=stream: order.append(stream.name))
        handle.release(side)
        with fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x"):
            runtime.launch(runtime.defaults[CUDA_0], lambda: order.append("new"))
        runtime.advance(runtime.defaults[CUDA_0])
        assert "new" not in order
        runtime.finish()
        assert order[-1] == "new" and len(order) == 3

    def test_unnamed_the_borrowers_stream_counts_as_well(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        a, b, c = (runtime.stream(name) for name in "abc")
        with runtime.using(a, CUDA_0):
            handle = fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x")
            order: list[str] = []
            runtime.launch(a, lambda: order.append("a"))
        with runtime.using(b, CUDA_0):  # as a backward thread may do
            handle.release()
        with runtime.using(c, CUDA_0), fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x"):
            runtime.launch(c, lambda: order.append("c"))
        runtime.advance(c), runtime.advance(b), runtime.advance(c)
        assert order == []
        runtime.finish()
        assert order == ["a", "c"]

    def test_new_memory_too_has_a_past(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        """What the allocator gives may be in use on the stream that asks; other streams must not overtake it."""
        a, b = runtime.stream("a"), runtime.stream("b")
        with runtime.using(a, CUDA_0):
            first = fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x")
        with runtime.using(b, CUDA_0), fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x") as second:
            y, seen = second.tensor, []
            runtime.launch(b, lambda: y.fill_(2))
            runtime.advance(b)
            runtime.advance(a)
            runtime.launch(b, lambda: seen.append(bool((y == 2).all())))
            runtime.finish()
        assert seen == [True] and GARBAGE != 2
        first.release()

    def test_pinned_memory_is_not_written_while_it_is_read(
        self, fakes: UnifiedMemoryPool, runtime: FakeRuntime
    ) -> None:
        """The processor does not wait in a stream: even on the same one a block is busy until its copies are done."""
        copies = runtime.stream("copies")
        arrived = []
        for value in range(4):
            with runtime.using(copies, CUDA_0):
                handle = fakes.borrow(1000, torch.uint8, "cpu", purpose="staging", pinned=True)
                x = handle.tensor.fill_(value)
                runtime.launch(copies, lambda x=x, value=value: arrived.append(bool((x == value).all())))
                handle.release()
        runtime.finish()
        assert arrived == [True] * 4
        before = fakes.stats().misses
        fakes.borrow(1000, torch.uint8, "cpu", purpose="staging", pinned=True).release()
        assert fakes.stats().misses == before  # now they are free

    def test_pinned_memory_at_the_limit_waits_rather_than_fail(self, strategy: str, runtime: FakeRuntime) -> None:
        fakes = UnifiedMemoryPool(strategy, limit=1 << 20, runtime=runtime)
        copies, done = runtime.stream("copies"), []
        for _ in range(5):
            with fakes.borrow(1 << 20, torch.uint8, "cpu", purpose="staging", pinned=True) as handle:
                runtime.launch(copies, lambda: done.append(1))
                handle.release(copies)
        assert len(done) == 4 and fakes.stats().misses == 1 and fakes.stats().waits == 4

    def test_a_dropped_handle_waits_for_every_stream_seen(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        side, new, order = runtime.stream("side"), runtime.stream("new"), []
        with runtime.using(side, CUDA_0):
            fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="y").release()
        runtime.finish()
        handle = fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x")
        runtime.launch(side, lambda: order.append("side"))
        del handle
        gc.collect()
        with runtime.using(new, CUDA_0):
            held = [fakes.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x")]
            runtime.launch(new, lambda: order.append("new"))
        runtime.advance(new)
        runtime.finish()
        assert (fakes.stats().dropped, fakes.stats().misses, len(held)) == (1, 1, 1)
        assert order == ["side", "new"]

    def test_trimming_waits_for_the_last_use(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        side, done = runtime.stream("side"), []
        with fakes.borrow(1000, torch.uint8, CUDA_0, purpose="x") as handle:
            runtime.launch(side, lambda: done.append(1))
            handle.release(side)
        fakes.trim()
        assert done == [1] and fakes.stats().reserved == 0 and runtime.empty_places

    def test_devices_do_not_mix(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        places = [("cuda:0", False), ("cuda:1", False), ("cpu", False), ("cpu", True)]
        for _ in range(2):
            for device, pinned in places:
                with fakes.borrow(1000, torch.uint8, device, purpose=device, pinned=pinned):
                    pass
            runtime.finish()
        stats = adds_up(fakes)
        assert sorted(stats.by_device) == ["cpu", "cpu pinned", "cuda:0", "cuda:1"]
        assert all((c.hits, c.misses) == (1, 1) for c in stats.by_device.values())
        assert [place for place, _ in runtime.raw] == [runtime.place(torch.device(d), p) for d, p in places]

    def test_graph_capture_gets_memory_of_its_own(self, fakes: UnifiedMemoryPool, runtime: FakeRuntime) -> None:
        workspace = fakes.borrow(1000, torch.uint8, "cpu", purpose="workspace", pinned=True)
        runtime.is_capturing = True
        with fakes.borrow(1000, torch.uint8, "cpu", purpose="inside") as handle:
            handle.tensor.fill_(1)
        with pytest.raises(RuntimeError, match="'workspace', borrowed before the capture"):
            workspace.release()
        runtime.is_capturing = False
        assert (fakes.stats().bypassed, fakes.stats().live) == (1, 1)
        workspace.release()
        assert adds_up(fakes).live == 0


class TestThreads:
    def test_many(self, pool: UnifiedMemoryPool) -> None:
        wrong: list[str] = []

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            held: list[tuple[Any, int]] = []
            for step in range(300):
                size = int(torch.randint(1, 5000, (), generator=generator))
                tag = (seed * 37 + step) % 251
                handle = pool.borrow(size, torch.uint8, "cpu", purpose=f"thread {seed}")
                handle.tensor.fill_(tag)
                held.append((handle, tag))
                if len(held) > 5:
                    old, was = held.pop(int(torch.randint(0, 5, (), generator=generator)))
                    if not bool((old.tensor == was).all()):
                        wrong.append(f"thread {seed}, step {step}")
                    if step % 7:
                        old.release()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        stats = adds_up(pool)
        assert stats.live == 0 and stats.hits + stats.misses == 1800

    def test_backward_threads_may_borrow(self, pool: UnifiedMemoryPool) -> None:
        class Doubles(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                with pool.borrow(grad.shape, grad.dtype, grad.device, purpose="backward") as handle:
                    return handle.tensor.copy_(grad).mul(2)

        x = torch.ones(100, requires_grad=True)
        Doubles.apply(x).sum().backward()
        assert x.grad is not None and x.grad.sum() == 200 and pool.stats().live == 0


class TestForks:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_child_starts_empty(self, strategy: str) -> None:
        pool = UnifiedMemoryPool(strategy)
        handle = pool.borrow(1000, torch.uint8, "cpu", purpose="parent")
        handle.tensor.fill_(5)
        pool.borrow(3000, torch.uint8, "cpu", purpose="parent").release()
        ours, theirs = multiprocessing.Pipe()
        with pool._lock:  # as another thread may hold it at the moment of the fork
            child = os.fork()
            if child == 0:
                try:
                    begun = pool.stats()
                    with pool.borrow(1000, torch.uint8, "cpu", purpose="child") as own:
                        own.tensor.fill_(6)
                        handle.release()
                        apart = own.tensor.data_ptr()
                    theirs.send((begun.live, begun.reserved, pool.stats().live, pool.stats().misses, apart))
                finally:
                    os._exit(0)
        theirs.close()
        assert ours.poll(20), "the child hangs"
        live, reserved, after, misses, apart = ours.recv()
        os.waitpid(child, 0)
        assert (live, reserved, after, misses) == (0, 0, 0, 1) and apart != handle.tensor.data_ptr()
        assert bool((handle.tensor == 5).all()) and pool.stats().live == 1
        handle.release()


class TestRecordings:
    def test_a_replay_is_what_was(self, strategy: str, tmp_path: Path) -> None:
        pool = UnifiedMemoryPool(strategy)
        with pool.record(tmp_path / "events.jsonl"):
            with pytest.raises(ValueError, match="expected no recording under way"), pool.record(tmp_path / "other"):
                pass
            held = []
            for i in range(400):
                held.append(pool.borrow(100 + 997 * (i * 31 % 17), torch.uint8, "cpu", purpose=f"p{i % 3}"))
                if i % 3:
                    held.pop(i * 7 % len(held)).release()
                if i == 200:
                    pool.trim()
        want = pool.stats()
        pool.borrow(1, torch.uint8, "cpu", purpose="not recorded").release()
        events = read_events(tmp_path / "events.jsonl")
        for device in ("meta", "cpu"):
            again = replay.replay(events, strategy, device).stats
            assert (again.hits, again.misses, again.requested) == (want.hits, want.misses, want.requested)
            assert (again.current, again.peak, again.live) == (want.current, want.peak, want.live)
            assert again.peak_reserved == want.peak_reserved
        assert [e.kind for e in events].count("trim") == 1

    def test_the_command_line(self, tmp_path: Path) -> None:
        pool = UnifiedMemoryPool("simple")
        with pool.record(tmp_path / "events.jsonl"):
            pool.borrow(2 << 20, torch.uint8, "cpu", purpose="x").release()
        command = [sys.executable, "-m", "dilated_attention_pytorch.core.memory.replay", str(tmp_path / "events.jsonl")]
        done = subprocess.run(
            [*command, "--strategy", "simple", "bucketed"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["strategy", "simple", "bucketed"] and "2.0 MiB" in lines[1]

    @pytest.mark.parametrize("text", ['{"event":"borrow"}', "no json", '{"event":"begin","version":9}'])
    def test_another_file_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match=r"other, line 1: not a line of a pool's recording"):
            read_events(tmp_path / "other")


def test_report(pool: UnifiedMemoryPool) -> None:
    with pool.borrow(3 << 20, torch.uint8, "cpu", purpose="rows"):
        text = pool.report()
    assert "purpose rows" in text and "device cpu" in text and "3.0 MiB" in text and f"cpu: {pool.strategy}" in text


def test_fragmentation_is_what_a_typical_request_cannot_use() -> None:
    assert fragmentation([], [10]) == (0, 0)
    assert fragmentation([100, 200, 700], [300, 300]) == (300, 1000)
    assert fragmentation([100, 200, 700], []) == (0, 1000)
    pool = UnifiedMemoryPool("fragment_aware")
    handles = [pool.borrow(100 << 10, torch.uint8, "cpu", purpose="x") for _ in range(10)]
    for handle in handles[::2]:
        handle.release()
    assert pool.stats().fragmentation == pytest.approx(24 / 524, abs=1e-2)  # the slab's end alone is too small
    with pool.borrow(3 << 20, torch.uint8, "cpu", purpose="x"):
        assert pool.stats().fragmentation == 1.0  # holes of 100 KiB serve no such request
    for handle in handles[1::2]:
        handle.release()
    assert len(list(pool._arenas[next(iter(pool._arenas))].strategy.free_blocks())) == 2  # coalesced, slab by slab


class TestAdaptive:
    def begun(self, pool: UnifiedMemoryPool) -> str:
        pool.borrow(1, torch.uint8, "cpu", purpose="x").release()
        return self.chosen(pool)

    def chosen(self, pool: UnifiedMemoryPool) -> str:
        return pool.stats().strategies["cpu"]

    def test_few_sizes_held_together(self) -> None:
        pool = UnifiedMemoryPool("adaptive")
        assert "nothing seen yet" in self.begun(pool)
        kept = pool.borrow(1_100_000, torch.uint8, "cpu", purpose="lent over the change")
        for _ in range(40):
            held = [pool.borrow(size, torch.uint8, "cpu", purpose="x") for size in (1_100_000, 2_200_000, 4_300_000)]
            for handle in held:
                handle.release()
        assert self.chosen(pool).startswith("adaptive: simple; of the last")
        kept.tensor.fill_(1)
        assert adds_up(pool).live == 1
        reserved = pool.stats().reserved
        kept.release()  # the strategy that was left gives it up
        assert pool.stats().reserved < reserved
        pool.trim()
        assert pool.stats().reserved == 0

    def test_sizes_that_wobble(self) -> None:
        pool = UnifiedMemoryPool("adaptive")
        for i in range(140):
            pool.borrow((1 << 20) + 4096 * (i * 37 % 101), torch.uint8, "cpu", purpose="x").release()
        assert self.chosen(pool).startswith(
            ("adaptive: bucketed; of the last", "adaptive: fragment_aware; of the last")
        )
        assert pool.stats().peak_reserved < 4 << 20

    def test_a_load_that_changes(self) -> None:
        pool = UnifiedMemoryPool("adaptive")
        for _ in range(200):
            held = [pool.borrow(size, torch.uint8, "cpu", purpose="x") for size in (1_100_000, 2_200_000, 4_300_000)]
            for handle in held:
                handle.release()
        assert self.chosen(pool).startswith("adaptive: simple")
        held = []
        for i in range(1200):
            held.append(pool.borrow(1000 + (i * 7919 % 97) ** 2 * 30, torch.uint8, "cpu", purpose="x"))
            if len(held) > 8:
                held.pop(i * 5 % 8).release()
        assert self.chosen(pool).startswith("adaptive: fragment_aware; of the last")
        for handle in held:
            handle.tensor.fill_(1)
            handle.release()
        adds_up(pool)
        pool.trim()
        assert pool.stats().reserved == 0


class TestNuma:
    @pytest.fixture
    def sys(self, tmp_path: Path) -> Path:
        for node, cpus in {0: "0-1\n", 1: "2,4-5\n", 2: "\n"}.items():
            folder = tmp_path / f"devices/system/node/node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(cpus)
        for pci, node in {"0000:3b:00.0": "1", "0000:5e:00.0": "-1", "0000:5f:00.0": "7"}.items():
            folder = tmp_path / "bus/pci/devices" / pci
            folder.mkdir(parents=True)
            (folder / "numa_node").write_text(node)
        return tmp_path

    def test_topology(self, sys: Path) -> None:
        assert topology.nodes(sys) == {0: {0, 1}, 1: {2, 4, 5}}  # a node of memory alone binds nobody
        assert topology.device_node("0000:3b:00.0", sys) == 1
        for pci in ("0000:5e:00.0", "0000:5f:00.0", "0000:00:00.0"):
            assert topology.device_node(pci, sys) is None

    @pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel shows no map")
    def test_pages_lie_where_the_kernel_says(self) -> None:
        node = next(iter(topology.nodes()))
        size = 3_000_001
        kept = [topology.allocate_pages(size, node) for _ in range(3)]
        for tensor in kept:
            assert tensor.numel() == size and not bool(tensor.any())
            pages = topology.pages_by_node(tensor.data_ptr())
            assert pages is not None and sum(pages.values()) >= -(-size // 4096)
            if len(topology.nodes()) == 1:
                assert set(pages) == {node}

    def test_another_map(self, tmp_path: Path) -> None:
        (tmp_path / "self").mkdir()
        (tmp_path / "self/numa_maps").write_text(
            "7f00 default anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n8f00 default file=/Nothing N1=9\n"
        )
        assert topology.pages_by_node(0x7F00, tmp_path) == {0: 1, 1: 2}
        assert topology.pages_by_node(0x8F00, tmp_path) == {1: 9}
        assert topology.pages_by_node(0x1, tmp_path) is None
        assert topology.pages_by_node(0x7F00, tmp_path / "none") is None

    def test_a_node_has_its_own_arena(self) -> None:
        runtime = FakeRuntime()
        pool = UnifiedMemoryPool("numa", runtime=runtime)
        addresses = []
        for runtime.nodes in (0, 1, 0, 1):
            with pool.borrow(1000, torch.uint8, "cpu", purpose="x") as handle:
                addresses.append(handle.tensor.data_ptr())
        assert addresses[:2] == addresses[2:] and addresses[0] != addresses[1]
        assert "nodes [0, 1]" in pool.stats().strategies["cpu"]
        assert UnifiedMemoryPool("adaptive", runtime=runtime).strategy == "adaptive"

    def test_adaptive_takes_it_where_there_are_nodes(self) -> None:
        runtime = FakeRuntime()
        runtime.nodes = 1
        pool = UnifiedMemoryPool("adaptive", runtime=runtime)
        pool.borrow(1000, torch.uint8, "cpu", purpose="x").release()
        pool.borrow(1000, torch.uint8, "cuda:0", purpose="x").release()
        assert pool.stats().strategies["cpu"].startswith("adaptive: numa")
        assert pool.stats().strategies["cuda:0"].startswith("adaptive: fragment_aware")

    def test_one_node_says_so(self) -> None:
        pool = UnifiedMemoryPool("numa", runtime=FakeRuntime())
        pool.borrow(1000, torch.uint8, "cpu", purpose="x").release()
        assert "nothing to place" in pool.stats().strategies["cpu"]


@pytest.mark.gpu
def test_pinned_memory_is_page_locked_in_its_own_size(strategy: str) -> None:
    pool = UnifiedMemoryPool(strategy)
    with pool.borrow(3_000_000, torch.uint8, "cpu", purpose="x", pinned=True) as handle:
        assert handle.tensor.is_pinned()
        handle.tensor.fill_(3)
        arrived = handle.tensor.to("cuda", non_blocking=True)
        handle.release()
        assert bool((arrived == 3).all())
    torch.cuda.synchronize()
    time.sleep(0.01)
    assert pool.trim() > 0 and pool.stats().reserved == 0


@pytest.mark.gpu
def test_trimming_gives_device_memory_back(strategy: str) -> None:
    pool = UnifiedMemoryPool(strategy)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pool.borrow(64 << 20, torch.uint8, "cuda", purpose="x").release()
    assert torch.cuda.memory_reserved() >= before + (64 << 20)
    pool.trim()
    assert torch.cuda.memory_reserved() == before  # no empty_cache: the pool's segments are its own
