"""Plays a recording of `UnifiedMemoryPool.record` through strategies and prints what each would have held.

    python -m dilated_attention_pytorch.core.memory.replay events.jsonl
    python -m dilated_attention_pytorch.core.memory.replay events.jsonl --strategy bucketed simple --device cuda

On the device "meta", the default, nothing is allocated: the figures are exact but for waits, since all work is over
at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.blocks import Place
from dilated_attention_pytorch.core.memory.events import Event, read_events
from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.memory.runtime import Ordering
from dilated_attention_pytorch.core.memory.stats import PoolStats, mib
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool


class Replayed(NamedTuple):
    """What one strategy made of a recording.

    Attributes:
        strategy: its name.
        stats: the pool's, at the end.
        seconds: for all events.
    """

    strategy: str
    stats: PoolStats
    seconds: float


class PaperRuntime:
    """Devices of any name whose memory is counted and not there."""

    def place(self, device: torch.device, pinned: bool) -> Place:
        """See `Runtime`."""
        return Place(device, pinned)

    def ordering(self, place: Place) -> Ordering:
        """See `Runtime`."""
        return "none"

    def node(self, place: Place) -> int | None:
        """See `Runtime`."""
        return None

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        """See `Runtime`."""
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def empty_device(self, place: Place) -> torch.device:
        """See `Runtime`."""
        return torch.device("meta")

    def emptied(self, place: Place) -> None:
        """See `Runtime`."""

    def current_stream(self, place: Place) -> Hashable:
        """See `Runtime`."""
        return None

    def record(self, stream: Hashable) -> Any:
        """See `Runtime`."""

    def finished(self, event: Any) -> bool:
        """See `Runtime`."""
        return True

    def wait(self, stream: Hashable, event: Any) -> None:
        """See `Runtime`."""

    def synchronize(self, event: Any) -> None:
        """See `Runtime`."""

    def capturing(self, place: Place) -> bool:
        """See `Runtime`."""
        return False


def replay(events: Iterable[Event], strategy: str, device: str = "meta", limit: int | None = None) -> Replayed:
    """Plays events through a new pool.

    Args:
        events: of `read_events`.
        strategy: of the pool.
        device: "meta" counts; "cpu" and "cuda" allocate, on CUDA with streams like those recorded.
        limit: of the pool.

    Returns:
        The pool's figures at the end, blocks that were never released still lent.
    """
    runtime = PaperRuntime() if device == "meta" else None
    pool = UnifiedMemoryPool(strategy, limit, runtime=runtime)
    streams: dict[int, torch.cuda.Stream] = {}
    lent: dict[int, Handle] = {}
    on_cuda = torch.device(device).type == "cuda"

    def stream(number: int) -> torch.cuda.Stream:
        if number not in streams:
            streams[number] = torch.cuda.Stream(device)
        return streams[number]

    begun = time.perf_counter()
    for event in events:
        if event.kind == "trim":
            pool.trim()
        elif event.kind == "release" and event.number in lent:
            used = [stream(n) for n in event.streams] if on_cuda and event.streams else None
            lent.pop(event.number).release(used)
        elif event.kind == "borrow":
            where = event.device if device == "meta" else "cpu" if event.pinned else device
            with torch.cuda.stream(stream(event.streams[0])) if on_cuda else nullcontext():
                lent[event.number] = pool.borrow(
                    event.size, torch.uint8, where, event.purpose, pinned=event.pinned
                )  # fmt: skip
    return Replayed(strategy, pool.stats(), time.perf_counter() - begun)


def table(results: Sequence[Replayed]) -> str:
    """The results side by side."""
    lines = [
        f"{'strategy':<15} {'peak lent':>11} {'peak reserved':>13} {'hits':>7} {'misses':>7} {'unusable':>8} "
        f"{'us/event':>8}"
    ]
    for strategy, stats, seconds in results:
        count = 2 * (stats.hits + stats.misses) or 1
        lines.append(
            f"{strategy:<15} {mib(stats.peak):>11} {mib(stats.peak_reserved):>13} {stats.hits:>7} {stats.misses:>7} "
            f"{stats.fragmentation:>8.0%} {seconds / count * 1e6:>8.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording")
    parser.add_argument("--strategy", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--device", default="meta", help='"meta" (counts alone), "cpu" or a CUDA device')
    parser.add_argument("--limit", type=int, help="bytes the pool may hold")
    given = parser.parse_args(arguments)
    events = read_events(given.recording)
    print(table([replay(events, name, given.device, given.limit) for name in given.strategy]))


if __name__ == "__main__":
    main()
