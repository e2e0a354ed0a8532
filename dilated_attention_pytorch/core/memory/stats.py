"""What a pool counts, and the table it prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from dilated_attention_pytorch.core.messages import quoted

MOST_PURPOSES = 256  # counted one by one
OTHERS = "other purposes"


@dataclass
class Counts:
    """Bytes and calls of one purpose, of one device, or of all.

    Attributes:
        current: bytes lent now, as they were asked for.
        peak: the highest `current` so far.
        requested: bytes asked for since the beginning.
        waste: bytes lent now beyond what was asked for: the rounding of live blocks.
        live: blocks lent now.
        hits: borrows served from what the pool held.
        misses: borrows that took memory from the system.
        waits: borrows that made a stream, or for host memory the caller, wait for another's use of the block.
    """

    current: int = 0
    peak: int = 0
    requested: int = 0
    waste: int = 0
    live: int = 0
    hits: int = 0
    misses: int = 0
    waits: int = 0

    def lend(self, asked: int, given: int, *, hit: bool, waited: bool) -> None:
        """Counts a borrow of `asked` bytes, in a block of `given` bytes."""
        self.current += asked
        self.peak = max(self.peak, self.current)
        self.requested += asked
        self.waste += given - asked
        self.live += 1
        self.hits += hit
        self.misses += not hit
        self.waits += waited

    def take_back(self, asked: int, given: int) -> None:
        """Counts the release of such a borrow."""
        self.current -= asked
        self.waste -= given - asked
        self.live -= 1


@dataclass
class PoolStats(Counts):
    """A pool's figures at one moment; bytes are `Counts`' unless said.

    `reserved == current + waste + free` at any time.

    Attributes:
        reserved: bytes held from the system.
        peak_reserved: the highest `reserved` so far.
        free: bytes held and not lent.
        fragmentation: the share of the free bytes that lie in blocks too small for a request like the latest ones
            (the mean of the last 256 sizes of a place, weighted by their bytes): if such requests kept coming, so
            much of what is held would serve none of them. 0 if nothing is free.
        trims: calls of `trim`, the pool's own included.
        dropped: handles that were dropped without a release.
        bypassed: borrows during the capture of a CUDA graph, which the graph's own memory serves.
        by_purpose: the same counts for every purpose, the one borrowed for last at the end. From 256 purposes on, those
            with no block lent and no borrow for the longest time are counted together, as "other purposes", whose peak
            is the highest of theirs.
        by_device: the same counts for every place, "cpu pinned" and "cuda:0" among them.
        strategies: what each place's strategy is doing.
    """

    reserved: int = 0
    peak_reserved: int = 0
    free: int = 0
    fragmentation: float = 0.0
    trims: int = 0
    dropped: int = 0
    bypassed: int = 0
    by_purpose: dict[str, Counts] = field(default_factory=dict)
    by_device: dict[str, Counts] = field(default_factory=dict)
    strategies: dict[str, str] = field(default_factory=dict)

    def lend_to(self, purpose: str, device: str, asked: int, given: int, *, hit: bool, waited: bool) -> None:
        """Counts a borrow in all, for its purpose and for its device."""
        counts = self.by_purpose.pop(purpose, None)
        if counts is None:
            counts = Counts()
            self._make_room()
        self.by_purpose[purpose] = counts
        for each in (self, counts, self.by_device.setdefault(device, Counts())):
            each.lend(asked, given, hit=hit, waited=waited)

    def take_back_from(self, purpose: str, device: str, asked: int, given: int) -> None:
        """Counts a release in all, for its purpose and for its device."""
        for each in (self, self.by_purpose[purpose], self.by_device[device]):
            each.take_back(asked, given)

    def _make_room(self) -> None:
        """Counts the purposes that are longest unused among the others, if there are too many for one more."""
        excess = len(self.by_purpose) + 1 - MOST_PURPOSES
        if excess > 0:
            idle = [name for name, counts in self.by_purpose.items() if not counts.live and name != OTHERS]
            for old in map(self.by_purpose.pop, idle[:excess]):
                others = self.by_purpose.setdefault(OTHERS, Counts())
                for each in fields(Counts):
                    both = getattr(old, each.name), getattr(others, each.name)
                    setattr(others, each.name, max(both) if each.name == "peak" else sum(both))


def fragmentation(free: Iterable[int], recent: Iterable[int]) -> tuple[int, int]:
    """Free bytes that a typical request cannot use, and all free bytes.

    Args:
        free: sizes of the free blocks.
        recent: sizes of the latest requests.
    """
    asked, free = list(recent), list(free)
    total = sum(asked)
    typical = sum(size * size for size in asked) / total if total else 0.0
    return sum(size for size in free if size < typical), sum(free)


def mib(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def owners(by_purpose: Mapping[str, Counts], most: int = 5) -> str:
    """Who holds most, for errors."""
    holding = sorted((c.current + c.waste, name, c.live) for name, c in by_purpose.items() if c.live)
    named = [f"{quoted(name)} {mib(size)} in {live} blocks" for size, name, live in reversed(holding[-most:])]
    return ", ".join(named) or "none"


def table(stats: PoolStats, limit: int | None) -> str:
    """`UnifiedMemoryPool.report`."""
    named: dict[str, Counts] = {"all": stats, **{f"device {n}": c for n, c in stats.by_device.items()}}
    named |= {f"purpose {n}": c for n, c in stats.by_purpose.items()}
    rows = [("", *(each.name for each in fields(Counts)))]
    for name, c in named.items():
        calls = (str(n) for n in (c.live, c.hits, c.misses, c.waits))
        rows.append((name, mib(c.current), mib(c.peak), mib(c.requested), mib(c.waste), *calls))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        " ".join([name.ljust(first), *(cell.rjust(w + 1) for cell, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]
    lines.append(
        f"reserved {mib(stats.reserved)} (peak {mib(stats.peak_reserved)}, "
        f"limit {'none' if limit is None else mib(limit)}), "
        f"free {mib(stats.free)}, of it {stats.fragmentation:.0%} too small for the latest requests; "
        f"{stats.trims} trims, {stats.dropped} handles dropped, {stats.bypassed} borrows under graph capture"
    )
    lines += [f"{device}: {text}" for device, text in stats.strategies.items()]
    return "\n".join(lines)
