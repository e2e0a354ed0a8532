"""Plays a recording of `record_pool.py` through strategies and prints what each would have held.

    python benchmarks/replay_pool.py benchmarks/recordings/ring_step.jsonl
    python benchmarks/replay_pool.py benchmarks/recordings/ring_step.jsonl --strategy bucketed simple --device cuda

On the device "meta", the default, nothing is allocated: the figures are exact but for waits, since all work is over
at once.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.blocks import Place
from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.core.memory.runtime import Ordering, Runtime
from dilated_attention_pytorch.core.memory.stats import PoolStats, mib
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES

VERSION = 1  # of the files


class Event(NamedTuple):
    """One line of a recording."""

    kind: str  # "borrow", "release" or "trim"
    number: int = -1  # of the block
    size: int = 0  # bytes asked for
    device: str = ""
    pinned: bool = False
    purpose: str = ""
    streams: tuple[int, ...] = ()  # small numbers; of a borrow one


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a recording; ValueError for another file."""
    return list(_parsed(Path(path)))


def _parsed(path: Path) -> Iterator[Event]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            kind = fields["event"]
            if number == 1:
                if kind != "begin" or fields["version"] != VERSION:
                    raise ValueError(f"expected a recording of version {VERSION}")
            elif kind == "borrow":
                place = fields["device"], bool(fields["pinned"])
                yield Event(kind, fields["id"], fields["bytes"], *place, fields["purpose"], (fields["stream"],))
            elif kind == "release":
                yield Event(kind, fields["id"], streams=tuple(fields["streams"] or ()))
            elif kind == "trim":
                yield Event(kind)
            else:
                raise ValueError(f"expected an event 'borrow', 'release' or 'trim', got {kind!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of a pool's recording ({error})") from error


class PaperRuntime(Runtime):
    """Devices of any name whose memory is counted and not there."""

    def place(self, device: torch.device, pinned: bool) -> Place:
        return Place(device, pinned)

    def ordering(self, place: Place) -> Ordering:
        return "none"

    def node(self, place: Place) -> int | None:
        return None

    def allocate(self, place: Place, size: int, node: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def empty_device(self, place: Place) -> torch.device:
        return torch.device("meta")

    def capturing(self, place: Place) -> bool:
        return False


class Replayed(NamedTuple):
    """What one strategy made of a recording."""

    strategy: str
    stats: PoolStats  # at the end, blocks that were never released still lent
    seconds: float  # for all events


def replay(events: Iterable[Event], strategy: str, device: str = "meta", limit: int | None = None) -> Replayed:
    """Plays events through a new pool; "meta" counts, "cpu" and "cuda" allocate, on CUDA with streams as recorded."""
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
                lent[event.number] = pool.borrow(event.size, torch.uint8, where, event.purpose, pinned=event.pinned)
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
