"""The order of streams, over every strategy of the memory pool, on fake devices and, where there is one, on CUDA."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from fake_streams import GARBAGE, FakeRuntime
from pool_checks import adds_up

from dilated_attention_pytorch import UnifiedMemoryPool

CUDA_0 = torch.device("cuda", 0)


def test_a_use_that_is_over_keeps_no_neighbours_apart() -> None:
    runtime = FakeRuntime()
    first, second, last = (runtime.stream(name) for name in ("first", "second", "last"))
    pool = UnifiedMemoryPool("fragment_aware", runtime=runtime)
    with runtime.using(first, CUDA_0):
        pool.borrow(2 << 20, torch.uint8, CUDA_0, purpose="both").release()
        handle = pool.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x")
        beside = pool.borrow(1 << 20, torch.uint8, CUDA_0, purpose="beside")
        handle.release()
    with runtime.using(second, CUDA_0):  # which comes after the first one's use
        handle = pool.borrow(1 << 20, torch.uint8, CUDA_0, purpose="x")
    runtime.advance(first)
    beside.release([last])
    handle.release([last])
    (arena,) = pool._arenas.values()
    assert [block.size for block in arena.strategy.free_blocks()] == [2 << 20]


@pytest.mark.parametrize("stream", [[8], {}, torch.zeros(2).numpy()], ids=["list", "dict", "array"])
def test_what_cannot_be_a_stream_is_named(stream: object) -> None:
    runtime = FakeRuntime()
    pool = UnifiedMemoryPool(runtime=runtime)
    with runtime.using(runtime.stream("own"), CUDA_0):
        handle = pool.borrow(1000, torch.uint8, CUDA_0, purpose="x")
        with pytest.raises(TypeError, match=r"^expected stream to be of Hashable or NoneType, got"):
            handle.release([stream])
        handle.release()  # it was not taken back by the call that was refused


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
