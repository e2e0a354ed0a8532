"""Limits, trimming, threads and forks, over every strategy of the memory pool."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import pytest
import torch
from fake_streams import FakeRuntime
from pool_checks import adds_up
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted


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
