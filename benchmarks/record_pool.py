"""Records what a pool is asked for, for `benchmarks/pool.py` to play again.

    python benchmarks/record_pool.py ring benchmarks/recordings/ring_step.jsonl
    python benchmarks/record_pool.py staging benchmarks/recordings/staging.jsonl
    python benchmarks/record_pool.py streamed benchmarks/recordings/streamed_pass.jsonl

`ring`: four steps of three layers, forward and backward, N=32,768, H=4, D=64, bf16, two branches over four gloo ranks;
the exchange buffers of rank 0. `staging` is no measurement: 48 ranges of a sequence staged through two sets of pinned
buffers to a device and back, each range with what its remote branches add. `streamed`: four calls of
`dilated_attention_streamed` on files of random rows, on CUDA where there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from replay_pool import VERSION

from dilated_attention_pytorch import RingAttentionConfig, RingDilatedAttention, UnifiedMemoryPool
from dilated_attention_pytorch.ring_attention import exchange_pool

RANKS, LAYERS, STEPS = 4, 3, 4
PATTERN = {"segment_lengths": [2048, 16384, 32768], "dilation_rates": [1, 4, 8]}


@contextmanager
def recording(pool: Any, path: Path) -> Iterator[None]:
    """Writes each borrow, release and trim of a pool inside the `with` as a line of JSON, for `replay_pool.py`.

    The pool has no hook for it: for that long its own three methods, which run under its lock, are wrapped.
    """
    if "_lend" in vars(pool):
        raise ValueError("expected no recording under way, got a pool that is recorded")
    begun, streams, tickets = time.perf_counter(), {None: 0}, dict[Any, int]()
    lend, take_back, trim = pool._lend, pool._take_back, pool._trim

    def number(stream: Any) -> int:
        return streams.setdefault(stream, len(streams))

    with path.open("w", encoding="utf-8", buffering=1) as file:

        def write(event: str, **fields: Any) -> None:
            fields = {"event": event, **fields, "us": round((time.perf_counter() - begun) * 1e6)}
            file.write(json.dumps(fields, separators=(",", ":")) + "\n")

        def recorded_lend(place: Any, size: int, purpose: str) -> Any:
            ticket = lend(place, size, purpose)
            where = {"device": str(place.device), "pinned": place.pinned, "purpose": purpose}
            tickets[ticket] = len(tickets) + 1
            write("borrow", id=tickets[ticket], bytes=size, **where, stream=number(ticket.stream))
            return ticket

        def recorded_take_back(ticket: Any, arena: Any, used: Any) -> None:
            take_back(ticket, arena, used)
            numbers = None if used is None else sorted({number(x) for x in used})
            if ticket in tickets:  # what was borrowed earlier is no part of the recording
                write("release", id=tickets[ticket], streams=numbers)

        def recorded_trim() -> int:
            freed = trim()
            write("trim")
            return freed

        write("begin", version=VERSION, strategy=pool.strategy, limit=pool.limit)
        pool._lend, pool._take_back, pool._trim = recorded_lend, recorded_take_back, recorded_trim
        try:
            yield
        finally:
            del pool._lend, pool._take_back, pool._trim  # the class's own again


def record(pool: UnifiedMemoryPool, run: Callable[[], object], path: Path) -> None:
    """Whatever `run` borrows from the pool."""
    with recording(pool, path):
        run()


def ring_rank(rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    attention = RingDilatedAttention(RingAttentionConfig(**PATTERN, remote_rows="refetch"), dist.group.WORLD)
    q, k, v = (torch.randn(1, 32768 // RANKS, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def steps() -> None:
        for _ in range(STEPS):
            x = q
            for _ in range(LAYERS):
                x = attention(x, k, v)
            x.float().sum().backward()

    if rank == 0:
        record(exchange_pool(), steps, path)
    else:
        steps()
    dist.destroy_process_group()


def ring(path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=ring_rank, args=(rank, port, path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")


def staging(path: Path) -> None:
    pool = UnifiedMemoryPool("simple")
    row = 4 * 64 * 2  # H, D, bf16
    length, ranges = 2048, 48

    def walk() -> None:
        flying: list[list[object]] = []
        for i in range(ranges):
            remote = sum(min(i, reach) * length // rate for reach, rate in ((8, 4), (32, 16)))
            rows = length + remote
            sizes = {"queries": length, "keys": rows, "values": rows}
            held = [
                pool.borrow(n * row, torch.uint8, "cpu", f"{name} staged", pinned=True) for name, n in sizes.items()
            ]
            held += [pool.borrow(n * row, torch.uint8, "cpu", f"{name} on the device") for name, n in sizes.items()]
            held += [pool.borrow(length * row, torch.uint8, "cpu", "out", pinned=True)]
            flying.append(held)
            if len(flying) > 2:  # two sets: one is copied while the other is computed
                for handle in flying.pop(0):
                    handle.release()  # type: ignore[attr-defined]
        for held in flying:
            for handle in held:
                handle.release()  # type: ignore[attr-defined]

    record(pool, walk, path)


def streamed(path: Path) -> None:
    from dilated_attention_pytorch import dilated_attention_streamed

    pool, n = UnifiedMemoryPool("simple"), 65536
    with tempfile.TemporaryDirectory() as folder:
        q, k, v = (
            torch.from_file(f"{folder}/{name}", shared=True, size=n * 64, dtype=torch.bfloat16)
            .view(1, n, 1, 64)
            .normal_()
            for name in "qkv"
        )
        pattern = {"segment_lengths": [2048, 16384, 65536], "dilation_rates": [1, 4, 16]}

        def passes() -> None:
            for _ in range(4):
                dilated_attention_streamed(q, k, v, **pattern, range_length=4096, pool=pool)

        record(pool, passes, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ring", "staging", "streamed"])
    parser.add_argument("path", type=Path)
    given = parser.parse_args()
    {"ring": ring, "staging": staging, "streamed": streamed}[given.what](given.path)


if __name__ == "__main__":
    main()
