"""The pool on CUDA: a block released on a busy stream and borrowed on another never shows the old writer's data."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.runtime import Runtime
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted

pytestmark = pytest.mark.gpu

SIZE = 8 << 20
BUSY = 50_000_000  # cycles that a kernel of torch's spends asleep: some 30 ms


def race(pool: UnifiedMemoryPool, rounds: int = 20) -> tuple[int, int]:
    """Old writers that come late, on one stream; new ones on another. Returns bytes that were wrong, and reuses."""
    old, new = torch.cuda.Stream(), torch.cuda.Stream()
    wrong, reused, address = torch.zeros((), dtype=torch.int64, device="cuda"), 0, 0
    torch.cuda.synchronize()
    for i in range(rounds):
        with torch.cuda.stream(old), pool.borrow(SIZE, torch.uint8, "cuda", "old") as handle:
            torch.cuda._sleep(BUSY // 10)
            handle.tensor.fill_(1)
            address = handle.tensor.data_ptr()
        with torch.cuda.stream(new), pool.borrow(SIZE, torch.uint8, "cuda", "new") as handle:
            reused += handle.tensor.data_ptr() == address
            handle.tensor.fill_(2)
            torch.cuda._sleep(BUSY // 5 if i % 2 else 0)  # the old writer, were it not waited for, would write now
            wrong += (handle.tensor != 2).sum()
    torch.cuda.synchronize()
    return int(wrong), reused


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_busy_block_never_shows_its_old_writer(strategy: str) -> None:
    pool = UnifiedMemoryPool(strategy)
    wrong, reused = race(pool)
    assert wrong == 0
    assert reused > 0 and pool.stats().waits > 0, "nothing was reused, so nothing was shown"


def test_the_race_is_seen_without_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that cannot go red proves nothing."""
    monkeypatch.setattr(Runtime, "wait", lambda *_: None)
    assert race(UnifiedMemoryPool("simple"))[0] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pinned_memory_is_not_written_before_its_copy_is_done(strategy: str) -> None:
    pool, copies = UnifiedMemoryPool(strategy), torch.cuda.Stream()
    arrived: list[tuple[int, Any]] = []
    with torch.cuda.stream(copies):
        for value in range(12):
            handle = pool.borrow(SIZE, torch.uint8, "cpu", "staging", pinned=True)
            handle.tensor.fill_(value)
            if value % 4 == 0:
                torch.cuda._sleep(BUSY)
            arrived.append((value, handle.tensor.to("cuda", non_blocking=True)))
            handle.release(copies)
    torch.cuda.synchronize()
    assert all(bool((x == value).all()) for value, x in arrived)
    assert pool.stats().live == 0


def test_a_limit_on_pinned_memory_waits_for_copies() -> None:
    pool = UnifiedMemoryPool("simple", limit=2 * SIZE)
    kept = []
    for value in range(6):
        with pool.borrow(SIZE, torch.uint8, "cpu", "staging", pinned=True) as handle:
            handle.tensor.fill_(value)
            torch.cuda._sleep(BUSY // 10)
            kept.append(handle.tensor.to("cuda", non_blocking=True))
    torch.cuda.synchronize()
    assert [int(x.min()) for x in kept] == [int(x.max()) for x in kept] == list(range(6))
    assert pool.stats().peak_reserved <= 2 * SIZE and pool.stats().waits > 0


def test_what_is_no_stream_is_refused_before_anything_changes() -> None:
    pool = UnifiedMemoryPool("simple")
    handle = pool.borrow(SIZE, torch.uint8, "cuda", "x")
    with pytest.raises(TypeError, match=r"expected stream to be a torch.cuda.Stream, got str 'copies'"):
        handle.release("copies")
    assert pool.stats().live == 1 and not handle.released
    handle.release()
    assert pool.stats().live == 0


def test_backward_threads_take_their_blocks_from_the_pool() -> None:
    """`torch.cuda.use_mem_pool` holds for one thread; the pool hands tensors out itself."""
    pool = UnifiedMemoryPool("bucketed")

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            with pool.borrow(grad.shape, grad.dtype, grad.device, "backward") as handle:
                return handle.tensor.copy_(grad) * 2

    x = torch.ones(SIZE, device="cuda", requires_grad=True)
    for _ in range(3):
        (grad,) = torch.autograd.grad(Doubles.apply(x).sum(), x)
    assert bool((grad == 2).all()) and pool.stats().hits == 2


def test_a_workspace_held_over_a_graph_keeps_its_address() -> None:
    pool = UnifiedMemoryPool("fragment_aware")
    workspace = pool.borrow(1024, torch.float32, "cuda", "workspace")
    x = torch.ones(1024, device="cuda")
    out = torch.empty_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        workspace.tensor.copy_(x).mul_(3)
        with pool.borrow(1024, torch.float32, "cuda", "inside") as inside:
            inside.tensor.copy_(workspace.tensor).add_(1)
            out.copy_(inside.tensor)
        with pytest.raises(RuntimeError, match="borrowed before the capture"):
            workspace.release()
    for value in (1.0, 2.0):
        x.fill_(value)
        with pool.borrow(1024, torch.float32, "cuda", "between") as other:
            other.tensor.fill_(-1.0)
            graph.replay()
            assert bool((out == 3 * value + 1).all()) and bool((other.tensor == -1).all())
    assert pool.stats().bypassed == 1
    workspace.release()


def test_the_pools_segments_are_its_own() -> None:
    """Device memory comes from a `torch.cuda.MemPool`: no activation lies beside a block that stays."""

    def segments(address: int) -> list[dict[str, Any]]:
        return [s for s in torch.cuda.memory_snapshot() if s["address"] <= address < s["address"] + s["total_size"]]

    pool = UnifiedMemoryPool("simple")
    held = pool.borrow(3 << 20, torch.uint8, "cuda", "x")
    address = held.tensor.data_ptr()
    (own,) = segments(address)
    assert tuple(own["segment_pool_id"]) != (0, 0)
    others = [torch.empty(3 << 20, dtype=torch.uint8, device="cuda") for _ in range(4)]
    assert all(segments(x.data_ptr())[0]["address"] != own["address"] for x in others)
    held.release()
    pool.trim()
    assert not [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == own["segment_pool_id"]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_borrower_that_dies_while_its_work_runs(strategy: str, pinned: bool) -> None:
    """Its handle is collected, not released: the block comes back, and the next one sees nothing of the old writer."""
    pool, place = UnifiedMemoryPool(strategy), "cpu" if pinned else "cuda"
    source, old = torch.full((SIZE,), 1, dtype=torch.uint8, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(old):
            handle = pool.borrow(SIZE, torch.uint8, place, "dies", pinned=pinned)
            torch.cuda._sleep(BUSY // 10)
            handle.tensor.copy_(source, non_blocking=True)
        ring: list[Any] = [handle]
        ring.append(ring)
        del handle, ring
        gc.collect()
        with pool.borrow(SIZE, torch.uint8, place, "next", pinned=pinned) as handle:
            handle.tensor.fill_(2)
            torch.cuda._sleep(BUSY // 5)  # the old writer, were it not waited for, would write now
            torch.cuda.synchronize()
            assert bool((handle.tensor == 2).all())
    stats = pool.stats()
    assert (stats.live, stats.dropped) == (0, 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_than_the_device_has_is_refused_by_name_and_books_nothing(strategy: str) -> None:
    pool = UnifiedMemoryPool(strategy)
    with pytest.raises(PoolExhausted, match="for 'too much'"):
        pool.borrow(1 << 44, torch.uint8, "cuda", "too much")
    assert pool.stats().reserved == pool.stats().peak_reserved == pool.stats().live == 0
    pool.borrow(SIZE, torch.uint8, "cuda", "fits").release()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_page_locked_memory_alone() -> None:
    """CUDA is none of a child's; that it drops its copy of the pool unlocks nothing of the parent's."""
    pool = UnifiedMemoryPool("simple")
    handle = pool.borrow(SIZE, torch.uint8, "cpu", "staging", pinned=True)
    handle.tensor.fill_(5)
    gc.collect()  # earlier tests' graphs and device memory are the parent's to free
    child = os.fork()
    if child == 0:
        code = 1
        try:
            empty = pool.stats().live == 0
            handle.release()
            del handle, pool
            gc.collect()
            code = 0 if empty else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert handle.tensor.is_pinned() and bool((handle.tensor.to("cuda", non_blocking=True) == 5).all())
    handle.release()
    assert pool.stats().live == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_devices_do_not_mix() -> None:
    pool = UnifiedMemoryPool("adaptive")
    for _ in range(2):
        for device in ("cuda:0", "cuda:1"):
            with pool.borrow(SIZE, torch.uint8, device, "x") as handle:
                assert str(handle.tensor.device) == device
    assert {name: c.misses for name, c in pool.stats().by_device.items()} == {"cuda:0": 1, "cuda:1": 1}
