"""Every strategy of the memory pool on the load it is for, beside torch.empty and beside the others.

    python benchmarks/pool.py [--device cuda] [--out benchmarks/results] [--rounds 2]

A load is a list of borrows and releases. Each borrow is followed by a write to every page of it, which is what makes
memory real; pinned memory is copied to the device on CUDA. On the CPU every run has a forked process to itself, time
is that process's own (user and system, so a busy machine adds little), and resident memory is the kernel's count at
its highest; on CUDA time is by the clock, and memory is what torch's allocator reserved at the most. `reserved` is
the pool's own count. Least of the rounds. After each load stand the strategy it is meant for and what it won and
lost.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from replay_pool import Event, read_events

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory import topology
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES
from dilated_attention_pytorch.testing import peak_bytes

RECORDINGS = Path(__file__).parent / "recordings"
CONTENDERS = ("torch.empty", *STRATEGIES)
KIB, MIB = 1 << 10, 1 << 20


class Load:
    """Borrows and releases, drawn with a seed."""

    def __init__(self, seed: int, pinned: bool = False) -> None:
        self.draw = random.Random(seed)
        self.events: list[Event] = []
        self.live: list[int] = []
        self._pinned = pinned

    def borrow(self, size: int) -> None:
        number = len(self.events)
        self.events.append(Event("borrow", number, size, "cpu", self._pinned, "x", (0,)))
        self.live.append(number)

    def release(self, index: int) -> None:
        self.events.append(Event("release", self.live.pop(index), streams=(0,)))

    def random(self, count: int, lowest: int, highest: int, most: int) -> None:
        """Sizes log-uniform, up to `most` blocks live, released in any order."""
        for _ in range(count):
            self.borrow(int(lowest * (highest / lowest) ** self.draw.random()))
            if len(self.live) > self.draw.randint(1, most):
                self.release(self.draw.randrange(len(self.live)))

    def fixed_set(self, count: int) -> None:
        """The same four buffers, all of them at once, again and again; their sizes are no round numbers."""
        for _ in range(count):
            for size in (6.1, 4.6, 5.7, 9.1):
                self.borrow(round(size * MIB))
            while self.live:
                self.release(0)


def fixed_set() -> list[Event]:
    load = Load(1)
    load.fixed_set(150)
    return load.events


def in_turn() -> list[Event]:
    """Two sent, two received, in the same order again and again: four sizes that are never all needed."""
    load = Load(6)
    for _ in range(150):
        for size in (6 * MIB, 4 * MIB):
            load.borrow(size), load.borrow(size + MIB)
            load.release(0), load.release(0)
    return load.events


def wobbling_sizes() -> list[Event]:
    load = Load(2)
    for _ in range(400):
        load.borrow(round(4 * MIB * load.draw.uniform(0.9, 1.0)))
        if len(load.live) > 3:
            load.release(0)
    return load.events


def many_sizes() -> list[Event]:
    load = Load(3)
    load.random(800, 16 * KIB, 4 * MIB, 16)
    return load.events


def changing() -> list[Event]:
    load = Load(4)
    load.fixed_set(60)
    load.random(600, 16 * KIB, 4 * MIB, 16)
    return load.events


def staging() -> list[Event]:
    load = Load(5, pinned=True)
    for _ in range(200):
        load.borrow(4 * MIB)
        if len(load.live) > 2:
            load.release(0)
    return load.events


LOADS: dict[str, tuple[str, Callable[[], list[Event]]]] = {
    "fixed set": ("simple", fixed_set),
    "four sizes in turn": ("fragment_aware", in_turn),
    "wobbling sizes": ("bucketed", wobbling_sizes),
    "many sizes, overlapping": ("fragment_aware", many_sizes),
    "fixed set, then many sizes": ("adaptive", changing),
    "pinned staging": ("numa", staging),
}


def all_loads() -> dict[str, tuple[str, list[Event]]]:
    """The strategy that each load is meant for, and its events; those made here and those recorded."""
    loads = {name: (meant, make()) for name, (meant, make) in LOADS.items()}
    recorded = {
        f"recording {path.stem}": ("adaptive", read_events(path)) for path in sorted(RECORDINGS.glob("*.jsonl"))
    }
    return {**loads, **recorded}


@dataclass
class Result:
    load: str
    contender: str
    microseconds: float  # a borrow, its use and its release
    lent_mib: float
    reserved_mib: float  # the pool's count; for torch.empty what was lent
    taken_mib: float  # from the system: resident pages, or CUDA memory that torch reserved
    hits: int
    misses: int
    says: str


class Player:
    """One contender playing a load."""

    def __init__(self, contender: str, device: torch.device) -> None:
        self.device = device
        self.pool = None if contender == "torch.empty" else UnifiedMemoryPool(contender)
        self.cuda = device.type == "cuda"
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.sink = torch.empty(64 * MIB, dtype=torch.uint8, device=device) if self.cuda else None

    def stream(self, number: int) -> AbstractContextManager[Any]:
        if not self.cuda or number == 0:
            return nullcontext()
        if number not in self.streams:
            self.streams[number] = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self.streams[number])

    def play(self, events: list[Event]) -> int:
        """Returns the most bytes lent."""
        lent: dict[int, Any] = {}
        sizes: dict[int, int] = {}
        now = most = 0
        for event in events:
            if event.kind == "borrow":
                device = "cpu" if event.pinned else self.device
                pinned = event.pinned and self.cuda
                with self.stream(event.streams[0]):
                    if self.pool is None:
                        x = lent[event.number] = torch.empty(
                            event.size, dtype=torch.uint8, device=device, pin_memory=pinned
                        )
                    else:
                        handle = lent[event.number] = self.pool.borrow(
                            event.size, torch.uint8, device, event.purpose, pinned=event.pinned
                        )
                        x = handle.tensor
                    x[::4096] = 1
                    if pinned and self.sink is not None:
                        self.sink[: event.size].copy_(x, non_blocking=True)
                sizes[event.number] = event.size
                now += event.size
                most = max(most, now)
            elif event.kind == "release" and event.number in lent:
                now -= sizes.pop(event.number)
                with self.stream(event.streams[0] if event.streams else 0):
                    if self.pool is None:
                        del lent[event.number]
                    else:
                        lent.pop(event.number).release()
        del x
        return most


def run(load: str, events: list[Event], contender: str, device: torch.device) -> Result:
    player = Player(contender, device)
    most: list[int] = []
    clock = time.perf_counter if player.cuda else time.process_time
    if player.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    begun = clock()
    if player.cuda:
        most.append(player.play(events))
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_reserved() - before
    else:
        taken = peak_bytes(lambda: most.append(player.play(events)))
    seconds = clock() - begun
    borrows = sum(event.kind == "borrow" for event in events)
    stats = None if player.pool is None else player.pool.stats()
    return Result(
        load, contender, seconds / borrows * 1e6, most[0] / MIB,
        (most[0] if stats is None else stats.peak_reserved) / MIB, taken / MIB,
        0 if stats is None else stats.hits, borrows if stats is None else stats.misses,
        "" if stats is None else "; ".join(stats.strategies.values()),
    )  # fmt: skip


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, whose memory nobody used before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(function(*arguments)))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


def measure(load: str, events: list[Event], device: torch.device, rounds: int) -> list[Result]:
    found: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            arguments = load, events, name, device
            found[name].append(run(*arguments) if device.type == "cuda" else forked(run, *arguments))
            gc.collect()
    best = [min(results, key=lambda r: r.microseconds) for results in found.values()]
    for result in best:
        result.taken_mib = min(r.taken_mib for r in found[result.contender])
    return best


def verdict(results: list[Result], meant: str) -> str:
    """What the strategy that a load is meant for won and lost, in time and in memory."""
    by_name = {r.contender: r for r in results}
    own, said = by_name[meant], []
    for name, other in by_name.items():
        if name != meant:
            time_ratio = own.microseconds / other.microseconds
            memory = own.taken_mib / other.taken_mib if other.taken_mib else 1.0
            ratios = {"time": time_ratio, "memory taken": memory}
            if name != "torch.empty":
                ratios["memory reserved"] = own.reserved_mib / other.reserved_mib
            won = [what for what, ratio in ratios.items() if ratio < 0.95]
            lost = [what for what, ratio in ratios.items() if ratio > 1.05]
            outcome = "; ".join(f"{k} {' and '.join(v)}" for k, v in (("wins", won), ("loses", lost)) if v) or "even"
            said.append(f"  against {name}: {outcome} ({', '.join(f'{k} x{v:.2f}' for k, v in ratios.items())})")
    return f"{meant}, which it is meant for:\n" + "\n".join(said)


def failures(events: list[Event]) -> list[str]:
    """Strategies that change a block while it is lent, seen on the first borrows of a load."""
    found = []
    for name in STRATEGIES:
        pool, lent = UnifiedMemoryPool(name), dict[int, Any]()
        for event in events[:120]:
            if event.kind == "borrow":
                lent[event.number] = pool.borrow(event.size, torch.uint8, "cpu", event.purpose)
                lent[event.number].tensor.fill_(event.number % 251)
            elif event.kind == "release" and event.number in lent:
                handle = lent.pop(event.number)
                if not bool((handle.tensor == event.number % 251).all()):
                    found.append(f"{name} changed block {event.number}")
                handle.release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(1)
    common.announce()
    nodes = len(topology.nodes())
    if nodes < 2:
        print("numa places nothing here: one node")
    loads = all_loads()
    # In a process of its own: what malloc keeps of it would serve the runs that follow.
    check = failures if device.type == "cuda" else partial(forked, failures)
    common.refuse(problem for _, events in loads.values() for problem in check(events))
    everything = []
    begun = time.perf_counter()
    for load, (meant, events) in loads.items():
        results = measure(load, events, device, given.rounds)
        everything += [{"case": f"{r.load}, {r.contender}", **asdict(r)} for r in results]
        borrows = sum(e.kind == "borrow" for e in events)
        print(f"\n{load}: {borrows} borrows, at most {results[0].lent_mib:.1f} MiB lent")
        print(f"  {'':<15} {'us/borrow':>9} {'reserved MiB':>12} {'taken MiB':>10} {'hits':>6} {'misses':>6}")
        for r in results:
            reserved = "" if r.contender == "torch.empty" else f"{r.reserved_mib:.1f}"
            counts = f"{r.hits:>6} {r.misses:>6}"
            print(f"  {r.contender:<15} {r.microseconds:9.1f} {reserved:>12} {r.taken_mib:10.1f} {counts}")
        print(verdict(results, meant))
        print(f"  adaptive said: {next(r.says for r in results if r.contender == 'adaptive')}")
    print(f"\n{time.perf_counter() - begun:.0f} s")
    common.write(given.out, "pool", everything, check="the contents of lent blocks, on the first borrows of every load")


if __name__ == "__main__":
    main()
