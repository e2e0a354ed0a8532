"""What every strategy of the memory pool owes a borrower: sizes, the life of a handle, refused arguments."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from pool_checks import adds_up, assert_disjoint

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.blocks import ALIGNMENT, aligned
from dilated_attention_pytorch.core.memory.strategies.bucketed import BucketedStrategy
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted

DTYPES = [torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
SIZES = [1, 2, 3, 511, 512, 513, 1000, 4096, 65_537, 1 << 20, (1 << 20) + 1, 5_000_003]


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
        with pytest.raises(ValueError, match=r"shape(\[1\])? to (have strides of 64 bits|be below 2\*\*63)"):
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

    def test_integers_of_numpy(self, strategy: str) -> None:
        pool = UnifiedMemoryPool(strategy, limit=np.int64(1 << 22))  # type: ignore[arg-type]
        for shape, want in (((np.int64(3), 4), (3, 4)), (np.int32(5), (5,))):
            with pool.borrow(shape, torch.float32, "cpu", purpose=str(want)) as handle:  # type: ignore[arg-type]
                assert handle.tensor.shape == want
        assert {name: c.requested for name, c in pool.stats().by_purpose.items()} == {"(3, 4)": 48, "(5,)": 20}
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
