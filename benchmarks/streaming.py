"""Sequences larger than the device: how long streaming takes beside copying alone and computing alone.

    python benchmarks/streaming.py [--only 64m,host,billion] [--out benchmarks/results]    # one GPU, about five minutes
    python benchmarks/streaming.py --device cpu --tokens 16777216 [--dir /tmp]             # files, under 2 GiB of RAM
    python benchmarks/streaming.py --device cpu --tokens 65536 --shrink 64 --only 64m,host,billion,file   # a minute

One head of width 64 in bf16, segments of 2048 .. 2097152 and rates 1 .. 1024 in powers of two. The sections:

- 64m: 2^26 tokens in host memory, forward and forward+backward. `copies` moves the same bytes the same way and computes
  nothing, `compute` computes every range on data that is there and moves nothing; the goal is 1.3 times the longer of
  the two. First from ordinary memory (through pinned staging), then from the same memory page-locked.
- host: forward of the longest power of two whose q, k, v and out fit this machine's memory.
- billion: forward of 2^30 tokens from a source that makes its rows from a few GiB, to a sink that keeps samples.
- file: forward from and to memory-mapped files, with the resident memory that Linux accounts for.

Correctness comes first, on a small case against fp64; each section then holds sampled rows to twice the error of
`dilated_attention` itself on those queries. A red check prints no number. The table comes last.
"""

from __future__ import annotations

import argparse
import gc
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import write
from torch import Tensor

from dilated_attention_pytorch import (
    DilatedPattern,
    UnifiedMemoryPool,
    dilated_attention,
    dilated_attention_with_lse,
)
from dilated_attention_pytorch.streaming import pipeline, streamed_backward, streamed_forward
from dilated_attention_pytorch.streaming.call import Settings, StreamedCall, prepare
from dilated_attention_pytorch.streaming.passes import BackwardPass, ForwardPass, Loaded
from dilated_attention_pytorch.streaming.sources import writer
from dilated_attention_pytorch.testing import relative_norm

WIDTH, DTYPE = 64, torch.bfloat16
ROW = WIDTH * DTYPE.itemsize
GIB = 1 << 30
GOAL_RATIO, GOAL_DEVICE, GOAL_RSS = 1.3, 8 * GIB, 2 * GIB
RUN, SAMPLES = 4096, 64  # in each of a few segments: queries in a row, and how many of them are checked
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Bench:
    """The settings of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.options = options
        lengths, rates = tuple((2048 << i) // options.shrink for i in range(11)), tuple(1 << i for i in range(11))
        self.pattern: dict[str, Any] = {"segment_lengths": lengths, "dilation_rates": rates}
        self.limit = options.limit or (GOAL_DEVICE if self.is_cuda else GIB)
        self.pool = UnifiedMemoryPool(strategy="simple")
        self.tile = torch.randn(1, 2 * self.tile_rows, 1, WIDTH).to(DTYPE)
        self.rows: list[dict[str, Any]] = []

    @property
    def tile_rows(self) -> int:
        """Rows that data is made of: a range or so."""
        return max(self.pattern["segment_lengths"])

    def settings(self) -> Settings:
        lengths, rates = self.pattern["segment_lengths"], self.pattern["dilation_rates"]
        return Settings(lengths, rates, device=self.device, device_limit=self.limit, pool=self.pool)

    def fill(self, x: Tensor, salt: int = 0) -> Tensor:
        """Random rows at the speed of copying: every run of rows starts elsewhere in the tile."""
        for i, rows in enumerate(x.split(self.tile_rows, dim=1)):
            rows.copy_(self.tile_at(i, salt)[:, : rows.shape[1]])
        return x

    def tile_at(self, number: int, salt: int) -> Tensor:
        """One tile of rows."""
        first = (number * 7919 + salt * 104729) % self.tile_rows
        return self.tile[:, first : first + self.tile_rows]

    def host(self, tokens: int, salt: int | None = None) -> Tensor:
        """A host tensor whose pages are there; random with a salt, else zero."""
        x = torch.empty(1, tokens, 1, WIDTH, dtype=DTYPE)
        return x.zero_() if salt is None else self.fill(x, salt)

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def add(self, **row: Any) -> None:
        """Keeps a line of the table and shows it."""
        self.rows.append(row)
        print("  " + ", ".join(f"{name} {show(value)}" for name, value in row.items()), flush=True)


def show(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# What is timed.


class CopiesForward(ForwardPass):
    """The copies of a forward without its computation."""

    def compute(self, start: int, stop: int, loaded: Loaded) -> dict[str, Tensor]:
        q = loaded["q", None]
        return {"out": torch.empty_like(q), "lse": q.new_empty(q.shape[:3], dtype=torch.float32)}


class CopiesBackward(BackwardPass):
    """The copies of a backward without its computation."""

    def compute(self, start: int, stop: int, loaded: Loaded) -> dict[str, Tensor]:
        return {f"d{name}": torch.empty_like(loaded[name, None]) for name in "qkv"}


def copies(bench: Bench, call: StreamedCall, targets: dict[str, Any]) -> None:
    """Everything but the computation."""
    plain = call.work()
    work = (CopiesBackward if call.sizes.is_backward else CopiesForward)(plain.plan, plain.readers, plain.engine)
    writers = {name: writer(name, x) for name, x in targets.items()}
    pipeline.run(work, writers, bench.device, bench.pool, lambda: None)


def computing(bench: Bench, call: StreamedCall) -> Callable[[], None]:
    """Everything but the copies: each range is computed from data of its shape that is on the device."""
    work, kept = call.work(), {}

    def resident(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        if (shape, name) not in kept:
            x = torch.randn(shape, device=bench.device).to(dtype)
            kept[shape, name] = x.abs() + 8 if name == "lse" else x  # about the log of a few thousand weights
        return kept[shape, name]

    def run() -> None:
        with torch.no_grad():
            for start, stop in work.plan.ranges:
                loads = work.loads(start, stop)
                work.compute(start, stop, {x.key: resident(x.shape, x.dtype, x.name) for x in loads})
            bench.wait()

    return run


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def moved(call: StreamedCall, wants_lse: bool = False) -> int:
    """Bytes that a pass copies in and out."""
    work, n = call.work(), call.problem.seq_len
    results = n * call.sizes.results(DTYPE.itemsize)
    if not call.sizes.is_backward and not wants_lse:
        results -= n * call.sizes.num_heads * call.sizes.accumulator
    return results + sum(load.nbytes for bounds in work.plan.ranges for load in work.loads(*bounds))


@contextmanager
def peak_device(bench: Bench) -> Iterator[Callable[[], int]]:
    """Bytes that torch holds on the device at most, whatever for."""
    if bench.is_cuda:
        bench.wait()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() if bench.is_cuda else 0


# Checks.


def check(bench: Bench) -> list[str]:
    """Streaming against fp64 on a small case, ranges that fit segments and ranges that cut them: failures in words."""
    n = 5 * 1024 + 77
    pattern = {"segment_lengths": [64, 512, 4096, 1 << 20], "dilation_rates": [1, 4, 16, 64]}
    inputs = [torch.randn(1, n, 1, WIDTH).to(DTYPE) for _ in range(4)]

    def whole(dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        *leaves, grad = (x.to(device, dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = dilated_attention_with_lse(*leaves, **pattern)
        return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(out, leaves, grad))]

    truth, base = whole(torch.float64, "cpu"), whole(DTYPE, bench.device)
    failures = []
    for length in (512, 1000):
        settings = {**pattern, "range_length": length, "device": bench.device}
        out, lse = streamed_forward(*inputs[:3], **settings)
        grads = streamed_backward(inputs[3], *inputs[:3], out, lse, **settings)
        for name, got, plain, want in zip(
            ("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), base, truth, strict=True
        ):
            error, allowed = relative_norm(got, want), max(2 * relative_norm(plain, want), 1e-6)
            if not error <= allowed:
                failures.append(f"ranges of {length}, {name}: error {error:.1e}, twice the whole's is {allowed:.1e}")
    return failures


class Sample(NamedTuple):
    """Rows to check: positions in a short run of queries, of a segment that holds all their keys."""

    start: int
    stop: int
    run: int
    positions: Tensor


def samples(bench: Bench, tokens: int) -> list[Sample]:
    """The same ones each time: in the first of the largest segments, a middle one and the last."""
    size = min(max(bench.pattern["segment_lengths"]), tokens)
    generator, found = torch.Generator().manual_seed(0), []
    for start in sorted({0, tokens // 2 // size * size, (tokens - 1) // size * size}):
        stop = min(start + size, tokens)
        run = start + int(torch.randint(max(1, stop - start - RUN), (), generator=generator))
        positions = run + torch.randperm(min(RUN, stop - run), generator=generator)[:SAMPLES]
        found.append(Sample(start, stop, run, positions))
    return found


def check_rows(
    bench: Bench, tokens: int, read: Callable[[str, int, int], Tensor], out: Callable[[Tensor], Tensor]
) -> None:
    """Sampled rows of a result against fp64: at most twice the error of the op itself on the same queries.

    Args:
        read: `(name, start, stop)` to rows of q, k or v.
        out: positions to rows of the result.
    """
    for start, stop, run, positions in samples(bench, tokens):
        q = read("q", run, min(run + RUN, stop))
        k, v = (read(name, start, stop) for name in "kv")
        where = {"q_start": run - start, "k_start": 0, "seq_len": stop - start}
        plain = dilated_attention(*(x.to(bench.device) for x in (q, k, v)), **where, **bench.pattern).cpu()
        truth = torch.cat([exact_row(bench, q[0, p - run, 0], k, v, int(p) - start) for p in positions], 1)
        error = relative_norm(out(positions), truth)
        allowed = 2 * relative_norm(plain[:, positions - run], truth)
        if not error <= allowed:
            sys.exit(f"rows from {run:,} on: error {error:.1e}, twice the op's own is {allowed:.1e}")


def exact_row(bench: Bench, query: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    """One query's result in fp64, from the keys that the pattern names."""
    pattern = DilatedPattern(**bench.pattern, num_heads=1)
    at = torch.cat([torch.tensor(list(keys)) for keys in pattern.keys_of(position, 0, k.shape[1])])
    logits = k[0, at, 0].double() @ query.double() * WIDTH**-0.5
    return (logits.softmax(0) @ v[0, at, 0].double())[None, None, None]


# Sections.


def sixty_four_million(bench: Bench) -> None:
    tokens = bench.options.tokens or 1 << 26
    q, k, v, grad = (bench.host(tokens, salt) for salt in range(4))
    out, dq, dk, dv = (bench.host(tokens) for _ in range(4))
    lse = torch.zeros(1, 1, tokens)
    held = [q, k, v, grad, out, dq, dk, dv, lse]
    named = {"q": q, "k": k, "v": v}
    for memory in ("ordinary", "page-locked"):
        if memory == "page-locked":
            if not bench.is_cuda:
                break
            start = time.perf_counter()
            for x in held:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))
            print(
                f"  page-locking {sum(x.nbytes for x in held) / GIB:.0f} GiB took {time.perf_counter() - start:.1f} s"
            )
        bench.pool.trim()
        settings = bench.settings()
        forward = prepare(settings, named)
        backward = prepare(settings, named | {"grad_out": grad, "out": out, "lse": lse})
        grads = {"dq": dq, "dk": dk, "dv": dv}
        # A pass as it is used, with its lse where a backward follows.
        passes = {
            "forward": [(forward, {"out": out})],
            "forward+backward": [(forward, {"out": out, "lse": lse}), (backward, grads)],
        }
        for name, calls in passes.items():

            def whole(calls: Any = calls) -> None:
                for call, targets in calls:
                    call.into(targets)

            def alone(calls: Any = calls) -> None:
                for call, targets in calls:
                    copies(bench, call, targets)

            # Copies first: they leave nonsense in `out`, which the real pass then overwrites.
            copying = seconds(alone, bench.options.repeats)
            compute = sum(seconds(computing(bench, call), bench.options.repeats) for call, _ in calls)
            with peak_device(bench) as peak:
                total = seconds(whole, bench.options.repeats)
                device = peak()
            check_rows(bench, tokens, lambda x, a, b: named[x][:, a:b], lambda at: out[:, at])
            bytes_moved = sum(moved(call, "lse" in targets) for call, targets in calls)
            longer = max(copying, compute)
            bench.add(
                section="64m", tokens=tokens, what=f"{name}, {memory}", seconds=total, copies=copying, compute=compute,
                ratio=total / longer, goal=GOAL_RATIO, met=total <= GOAL_RATIO * longer, gib=bytes_moved / GIB,
                gib_per_s=bytes_moved / GIB / total, device_gib=device / GIB, device_met=device < GOAL_DEVICE,
                ranges=len(forward.plan().ranges),
            )  # fmt: skip
    if bench.is_cuda:
        for x in held:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(x.data_ptr()))


def from_host(bench: Bench) -> None:
    available = available_bytes()
    room = available - 8 * GIB if bench.is_cuda else available // 4
    tokens = bench.options.tokens or 1 << (max(room, 4 * ROW) // (4 * ROW)).bit_length() - 1
    q, k, v = (bench.host(tokens, salt) for salt in range(3))
    out = bench.host(tokens)
    print(f"  {available / GIB:.0f} GiB of memory available: {tokens:,} tokens, {4 * tokens * ROW / GIB:.1f} GiB")
    named = {"q": q, "k": k, "v": v}
    call = prepare(bench.settings(), named)
    warm = min(tokens, 4 * call.plan().length)  # compiles kernels and pins staging memory
    settings = replace(bench.settings(), range_length=call.plan().length)
    short = prepare(settings, {name: x[:, :warm] for name, x in named.items()})
    short.into({"out": out[:, :warm]})
    with peak_device(bench) as peak:
        start = time.perf_counter()
        call.into({"out": out})
        total = time.perf_counter() - start
        device = peak()
    check_rows(bench, tokens, lambda x, a, b: named[x][:, a:b], lambda at: out[:, at])
    gib = moved(call) / GIB
    bench.add(
        section="host", tokens=tokens, what="forward, ordinary", seconds=total, gib=gib, gib_per_s=gib / total,
        device_gib=device / GIB, device_met=device < GOAL_DEVICE, ranges=len(call.plan().ranges),
    )  # fmt: skip


class TileSource:
    """A long sequence made of one tile of rows, which every run of rows enters elsewhere."""

    def __init__(self, bench: Bench, tokens: int, salt: int) -> None:
        self.bench, self.salt = bench, salt
        self.shape, self.dtype = (1, tokens, 1, WIDTH), DTYPE

    def read(self, start: int, stop: int) -> Tensor:
        out = torch.empty(1, stop - start, 1, WIDTH, dtype=DTYPE)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        size, at = self.bench.tile_rows, start
        while at < stop:
            number, within = divmod(at, size)
            until = min(stop, (number + 1) * size)
            rows = self.bench.tile_at(number, self.salt)[:, within : within + until - at]
            out[:, at - start : until - start].copy_(rows)
            at = until


class SampleSink:
    """Keeps the rows at some positions, counts all, and looks for anything that is not a number among a few."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions.sort().values
        self.kept = torch.zeros(1, len(positions), 1, WIDTH, dtype=DTYPE)
        self.count, self.committed = 0, False

    def write(self, start: int, rows: Tensor) -> None:
        bounds = torch.tensor([start, start + rows.shape[1]])
        first, last = torch.searchsorted(self.positions, bounds).tolist()
        self.kept[:, first:last] = rows[:, self.positions[first:last] - start]
        if not rows[:, ::997].isfinite().all():
            raise ValueError(f"expected finite rows from {start:,} on")
        self.count += rows.shape[1]

    def commit(self) -> None:
        self.committed = True

    def at(self, positions: Tensor) -> Tensor:
        return self.kept[:, torch.searchsorted(self.positions, positions)]


def billion(bench: Bench) -> None:
    tokens = bench.options.tokens or 1 << 30
    sources = {name: TileSource(bench, tokens, salt) for salt, name in enumerate("qkv")}
    # Kernels are compiled and staging memory is pinned by a short sequence of the same ranges.
    length = prepare(bench.settings(), sources).plan().length
    short = {name: TileSource(bench, min(tokens, 4 * length), salt) for salt, name in enumerate("qkv")}
    warm = prepare(replace(bench.settings(), range_length=length), short)
    warm.into({"out": SampleSink(torch.arange(1))})
    sink = SampleSink(torch.cat([x.positions for x in samples(bench, tokens)]).unique())
    call = prepare(bench.settings(), sources)
    with peak_device(bench) as peak:
        start = time.perf_counter()
        call.into({"out": sink})
        total = time.perf_counter() - start
        device = peak()
    if sink.count != tokens or not sink.committed:
        sys.exit(f"expected {tokens:,} rows and a commit, got {sink.count:,}")
    check_rows(bench, tokens, lambda x, a, b: sources[x].read(a, b), sink.at)
    gib = moved(call) / GIB
    bench.add(
        section="billion", tokens=tokens, what="forward, source to sink", seconds=total, gib=gib, gib_per_s=gib / total,
        device_gib=device / GIB, device_met=device < GOAL_DEVICE, ranges=len(call.plan().ranges),
    )  # fmt: skip


def from_files(bench: Bench) -> None:
    tokens = bench.options.tokens or 1 << 24
    folder = Path(tempfile.mkdtemp(prefix="streaming-", dir=bench.options.dir))
    try:

        def mapped(name: str) -> Tensor:
            x = torch.from_file(str(folder / name), shared=True, size=tokens * WIDTH, dtype=DTYPE)
            return x.view(1, tokens, 1, WIDTH)

        for salt, name in enumerate("qkv"):
            with (folder / name).open("wb") as file:
                for number in range(-(-tokens // bench.tile_rows)):
                    rows = bench.tile_at(number, salt)[:, : tokens - number * bench.tile_rows]
                    file.write(rows.contiguous().view(torch.uint8).numpy().data)
        x = {name: mapped(name) for name in ("q", "k", "v", "out")}
        call = prepare(bench.settings(), {name: x[name] for name in "qkv"})
        with resident() as memory:
            start = time.perf_counter()
            call.into({"out": x["out"]})
            total = time.perf_counter() - start
        check_rows(bench, tokens, lambda name, a, b: x[name][:, a:b].clone(), lambda at: x["out"][:, at])
        gib = moved(call) / GIB
        bench.add(
            section="file", tokens=tokens, what="forward, memory-mapped", seconds=total, gib=gib, gib_per_s=gib / total,
            files_gib=4 * tokens * ROW / GIB, rss_gib=memory["VmHWM"] / GIB, anonymous_gib=memory["RssAnon"] / GIB,
            file_backed_gib=memory["RssFile"] / GIB, rss_met=memory["VmHWM"] < GOAL_RSS, ranges=len(call.plan().ranges),
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)


@contextmanager
def resident() -> Iterator[dict[str, int]]:
    """The process's peak resident memory by the kernel's own mark, and by kind as seen every few milliseconds.

    The whole process counts, torch's libraries too; pages of mapped files are in RssFile and in VmHWM.
    """
    peak = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def look() -> None:
        for line in _STATUS.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)

    def watch() -> None:
        while not done.wait(0.005):
            look()

    _RESET.write_text("5")  # the mark back to what is resident now
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
        look()
    finally:
        done.set()
        watcher.join()


def available_bytes() -> int:
    """Memory that a new process could have, by the kernel and by the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found = min(found, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return found


SECTIONS = {"64m": sixty_four_million, "host": from_host, "billion": billion, "file": from_files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help=f"sections, from {', '.join(SECTIONS)}; on a GPU all but file, on a CPU file")
    parser.add_argument("--tokens", type=int, help="in place of a section's own number")
    parser.add_argument("--shrink", type=int, default=1, help="divides the segment lengths, for short sequences")
    parser.add_argument("--limit", type=int, help="device_limit in bytes; 8 GiB, on a CPU 1 GiB")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median counts, in 64m")
    parser.add_argument("--dir", type=Path, help="where files are made, and removed after")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args()
    bench = Bench(options)
    wanted = (options.only or ("64m,host,billion" if bench.is_cuda else "file")).split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"expected sections from {list(SECTIONS)}, got {sorted(unknown)}")
    if failures := check(bench):
        sys.exit("\n".join(["streaming is wrong; nothing is timed", *failures]))
    name = torch.cuda.get_device_name(bench.device) if bench.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {platform.platform()}; correctness checked", flush=True)
    started = time.perf_counter()
    for section in wanted:
        print(section, flush=True)
        SECTIONS[section](bench)
        gc.collect()
        bench.pool.trim()
        print(f"  {time.perf_counter() - started:.0f} s so far", flush=True)
    print(table(bench.rows))
    rows = [{"case": f"{row['section']}, {row['what']}", **row} for row in bench.rows]
    write(options.out, "streaming", rows, check="small cases against fp64, then sampled rows of every section")


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "what", "tokens", "seconds", "copies", "compute", "ratio", "gib", "gib_per_s", "device_gib", "rss_gib",
        "anonymous_gib", "file_backed_gib",
    )  # fmt: skip
    used = [c for c in columns if any(c in row for row in rows)]
    lines = [["section", *used]] + [[row["section"], *(show(row.get(c, "")) for c in used)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
