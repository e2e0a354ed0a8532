"""Times tile shapes of the Triton kernels on lines of `benchmarks/patterns.py`, for `kernels/triton/tuned.py`.

    python benchmarks/tune.py [--out DIR] [--only TEXT] [--seconds 140]   # on a GPU: checks, times, the best per line
    python benchmarks/tune.py --compile [--only TEXT]                     # without: registers, stack, shared memory

A candidate is a kernel with its tiles, on one line. Worker processes that see no GPU compile first. Each candidate is
checked on the line's pattern at 4,096 tokens (4,095 where the line's length is odd) against the reference in fp64: at
most twice the error of torch's flash attention, outputs filled with NaN before. Then it is timed as a CUDA graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import compiling
import patterns
import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.kernels.sdpa import backend as sdpa
from dilated_attention_pytorch.kernels.triton import launch_aligned, launch_branches, query_terms
from dilated_attention_pytorch.kernels.triton.configs import Config
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import AttentionOutput, OutputGradient

WORKERS = 15
SHARED = 232_448  # bytes that a program may have on Hopper
CHECKED = 4096
# Line -> kernel -> candidates: rows of queries, rows of keys, warps, stages, and "early" or "pointers". The
# first is what the table had when they were measured last.
CANDIDATES: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    "five branches, D=256 causal N=262144": {
        "forward": [(128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 3)],
        "dq": [(128, 32, 8, 2), (64, 64, 8, 2)],
        "dkv": [(64, 64, 8, 2, "early"), (32, 64, 8, 2, "early"), (64, 64, 8, 1, "early")],
    },
    "five branches, D=64 causal N=1000003": {
        "forward": [(128, 64, 4, 3), (128, 64, 4, 3, "pointers")],
        "dq": [(64, 64, 4, 2), (64, 64, 4, 2, "pointers")],
        "dkv": [(64, 64, 4, 3, "early"), (64, 64, 4, 4, "early", "pointers"), (64, 64, 4, 2, "early"),
                (64, 64, 4, 4, "early")],
    },
    "slide, D=48 bidirectional N=45681": {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 4), (64, 128, 4, 2), (128, 128, 8, 2)],
        "dq": [(64, 64, 4, 3), (64, 128, 4, 2)],
        "dkv": [(64, 64, 4, 2, "early"), (64, 128, 8, 2, "early"), (64, 128, 4, 2, "early"), (128, 64, 4, 2, "early")],
    },
    "r=1,3,9, D=64 bidirectional N=262144": {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 4), (64, 128, 4, 2), (128, 64, 4, 3)],
        "dq": [(64, 64, 4, 3), (64, 128, 4, 2)],
        "dkv": [(64, 64, 4, 3, "early"), (64, 64, 4, 2, "early"), (64, 128, 8, 2, "early")],
    },
    "batch 16, short segments, D=64 causal N=8192": {
        "forward": [(64, 64, 4, 2), (128, 64, 4, 3), (64, 32, 4, 2)],
        "dq": [(64, 64, 4, 2), (64, 32, 4, 2)],
        "dkv": [(64, 64, 4, 2, "early"), (64, 64, 4, 4, "early"), (32, 64, 4, 2, "early")],
    },
    "five branches, D=96 causal N=262144": {
        "dq": [(128, 64, 8, 3), (64, 64, 4, 2)],
        "dkv": [(32, 64, 4, 2, "early"), (64, 128, 8, 2, "early"), (64, 128, 8, 2), (64, 64, 8, 2, "early")],
    },
    "slide, D=48 bidirectional N=262144": {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 4)],
        "dkv": [(64, 64, 4, 2, "early"), (64, 128, 8, 2, "early"), (64, 128, 4, 2, "early"), (128, 64, 4, 2, "early")],
    },
    "five branches, D=80 causal N=262144": {
        "dq": [(128, 64, 8, 3), (64, 64, 4, 2)],
        "dkv": [(32, 64, 4, 2, "early"), (64, 128, 8, 2, "early")],
    },
    "README, D=64 causal N=131072": {
        "forward": [(128, 64, 4, 3), (64, 64, 4, 3)],
        "dkv": [(64, 64, 4, 3, "early"), (64, 64, 4, 4, "early"), (64, 64, 4, 2, "early")],
    },
    "five branches, heads 32/8, D=128 causal N=100003": {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 3)],
        "dq": [(128, 64, 8, 3)],
        "dkv": [(32, 64, 4, 2, "early"), (64, 128, 8, 2, "early")],
    },
    "five branches, D=64 bidirectional N=1048576": {
        "aligned_forward": [(64, 128, 4, 2), (128, 64, 4, 3), (64, 64, 4, 4)],
        "aligned_dq": [(64, 128, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3)],
        "aligned_dkv": [(64, 64, 4, 3, "early"), (64, 128, 8, 2, "early")],
    },
    "five branches, D=128 bidirectional N=1048576": {
        "aligned_forward": [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        "aligned_dq": [(128, 64, 8, 3), (64, 64, 4, 2)],
        "aligned_dkv": [(32, 128, 8, 3, "early"), (64, 128, 8, 2, "early"), (32, 64, 4, 3)],
    },
    "slide, D=48 bidirectional N=10001": {
        "forward": [(64, 64, 4, 3), (128, 64, 8, 4)],
    },
}  # fmt: skip
# What `auto` has to know: whether heads wider than 128 are faster here or on sdpa.
WIDE = [
    patterns.Line("five branches", *patterns.FIVE, n, 768 // width, width)
    for width, n in ((160, 262_144), (192, 262_144), (256, 32_768))
]
for _line in WIDE:
    CANDIDATES[_line.title] = {
        "forward": [(128, 64, 8, 2)], "dq": [(128, 32, 8, 2)], "dkv": [(64, 64, 8, 2, "early")]
    }  # fmt: skip
# Operations per pair and column of D.
FACTOR = {"forward": 4, "dq": 6, "dkv": 8, "sdpa forward": 4, "sdpa backward": 10}


class Trial(NamedTuple):
    """One candidate on one line."""

    line: patterns.Line
    kernel: str
    shape: tuple[Any, ...]

    @property
    def config(self) -> Config:
        """The shape as the launchers take it."""
        rows, keys, warps, stages, *words = self.shape
        return Config(rows, keys, warps, stages, "early" in words, descriptors="pointers" not in words)


class Case:
    """A line's tensors at one length, and what its kernels read."""

    def __init__(self, line: patterns.Line, seq_len: int, batch: int, device: str) -> None:
        self.line = line
        self.work = line.work(seq_len, batch, device)
        self.x, self.problem = self.work.x, self.work.problem
        q = self.x.q
        self.grad = OutputGradient(torch.randn_like(q), None)
        if device == "cuda":
            out, lse = sdpa.forward(self.x, self.problem)
            self.saved = AttentionOutput(out.to(q.dtype), lse.contiguous())
        else:
            self.saved = AttentionOutput(q, torch.empty(batch, line.num_heads, seq_len))

    @functools.cached_property
    def terms(self) -> query_terms.QueryTerms:
        """What the backward kernels read of each query."""
        delta = query_terms.compute_delta(self.work, self.grad, self.saved, Tape())
        return query_terms.QueryTerms(self.grad.out, self.saved.lse, delta)

    def aligned_dq(self, config: Config) -> tuple[Tensor, Tensor]:
        """dq, and what it leaves for dK/dV."""
        terms = launch_aligned.terms_buffer(self.work, Tape(), 128)
        return launch_aligned.backward_dq(self.work, self.grad, self.saved, terms, Tape(), config), terms

    @functools.cached_property
    def aligned_terms(self) -> Tensor:
        """What a dK/dV of one launch reads of each query."""
        return self.aligned_dq(Config(64, 64, 4, 2))[1]

    def run(self, kernel: str, config: Config) -> tuple[Tensor, ...]:
        """One kernel over all branches, in one launch or one per branch."""
        match kernel:
            case "aligned_forward":
                return tuple(launch_aligned.forward(self.work, Tape(), config))
            case "aligned_dq":
                return self.aligned_dq(config)[:1]
            case "aligned_dkv":
                return launch_aligned.backward_dkv(self.work, self.grad, self.aligned_terms, Tape(), config)
            case "forward":
                return tuple(launch_branches.forward(self.work, Tape(), config))
            case "dq":
                return (launch_branches.backward_dq(self.work, self.terms, Tape(), config),)
            case _:
                return launch_branches.backward_dkv(self.work, self.terms, Tape(), config)

    @functools.cached_property
    def allowed(self) -> dict[str, list[tuple[Tensor, float]]]:
        """Per kernel: what the reference in fp64 says of its results, and how far from it they may be."""
        from dilated_attention_pytorch import dilated_attention_with_lse

        found = []
        for backend, dtype in (("reference", torch.float64), ("sdpa", torch.bfloat16)):
            leaves = [x.to(dtype).requires_grad_() for x in self.x]
            out, lse = dilated_attention_with_lse(*leaves, **self.line.options(backend))
            grads = torch.autograd.grad(out, leaves, self.grad.out.to(dtype))
            found.append((out.detach(), lse.detach(), *grads))
        pairs = [(want, 2 * relative_norm(base, want)) for want, base in zip(*found, strict=True)]
        return {"forward": pairs[:2], "dq": pairs[2:3], "dkv": pairs[3:]}

    def wrong(self, kernel: str, config: Config) -> list[float]:
        """Errors over what is allowed, where that is above 1 or NaN."""
        results = self.run(kernel, config)
        parts = zip(results, self.allowed[kernel.removeprefix("aligned_")], strict=True)
        return [e for got, (want, most) in parts if not (e := relative_norm(got, want) / most) <= 1]


def trials(only: str) -> list[Trial]:
    """All candidates."""
    known = {line.title: line for line in (*patterns.lines(), *WIDE)}
    return [
        Trial(known[title], kernel, shape)
        for title, kernels in CANDIDATES.items()
        for kernel, shapes in kernels.items()
        for shape in shapes
        if only in f"{title} {kernel}"
    ]


def small(line: patterns.Line) -> int:
    """The length that stands for a line's when it is checked: of one parity, which decides how tiles are loaded."""
    return CHECKED - line.seq_len % 2


def compile_part(wanted: list[Trial]) -> Iterator[tuple[Trial, list[Any]]]:
    """Compiles candidates for Hopper without one; yields what each comes to."""
    found: list[Any] = []

    def visit(function: Any, kernel: Any) -> None:
        if function.__name__.startswith(("branch", "aligned")) and all(x.hash != kernel.hash for x in found):
            found.append(kernel)

    compiling.without_gpu(visit)
    for trial in wanted:
        found.clear()
        try:
            Case(trial.line, trial.line.seq_len, trial.line.batch, "cpu").run(trial.kernel, trial.config)
        except Exception as error:
            print(f"did not compile: {trial.line.title} {trial.kernel} {trial.shape}: {str(error)[:200]}", flush=True)
        yield trial, found


def resources(kernels: list[Any]) -> str:
    """The most that any of the kernels needs."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    most = dict.fromkeys(("REG", "STACK", "SHARED"), 0)
    for kernel in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        for name in ("REG", "STACK"):
            most[name] = max(most[name], *map(int, re.findall(rf"{name}:(\d+)", usage)))
        most["SHARED"] = max(most["SHARED"], kernel.metadata.shared)
    fits = "" if most["SHARED"] <= SHARED else ", more than there is"
    return f"{most['REG']} registers, {most['STACK']} bytes of stack, {most['SHARED']} shared{fits}"


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The launches without the host."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object]) -> float:
    """Median of seven."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measure(wanted: list[Trial], deadline: float) -> Iterator[dict[str, Any]]:
    """A row per candidate, in the order of lines."""
    for line, group in itertools.groupby(wanted, key=lambda trial: trial.line):
        if time.monotonic() > deadline:
            print(f"left out: {line.title}", flush=True)
            continue
        torch.cuda.empty_cache()
        checked, whole = Case(line, small(line), 1, "cuda"), Case(line, line.seq_len, line.batch, "cuda")
        for trial in group:
            row = {"case": line.title, "kernel": trial.kernel, "shape": trial.shape}
            try:
                with filled_with_nan():
                    wrong = checked.wrong(trial.kernel, trial.config)
                if wrong:
                    yield row | {"error": f"{max(wrong):.2f} of what is allowed"}
                    continue
                time_ms = milliseconds(graphed(functools.partial(whole.run, trial.kernel, trial.config)))
            except Exception as error:  # out of a resource: the others go on
                yield row | {"error": f"{type(error).__name__}: {str(error)[:120]}"}
                continue
            operations = FACTOR[trial.kernel.removeprefix("aligned_")] * line.pairs() * line.head_dim
            yield row | {"ms": time_ms, "tflops": operations / time_ms / 1e9}
        if line.head_dim > 128:
            yield from beside(whole)
        del checked, whole


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """Fresh tensors hold NaN: an output that no program wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def beside(case: Case) -> Iterator[dict[str, Any]]:
    """The passes of sdpa, from the host, on a line of wide heads."""
    for name, run in (
        ("sdpa forward", functools.partial(sdpa.forward, case.x, case.problem)),
        ("sdpa backward", functools.partial(sdpa.backward, case.grad, case.x, case.saved, case.problem)),
    ):
        time_ms = milliseconds(run)
        rate = FACTOR[name] * case.line.pairs() * case.line.head_dim / time_ms / 1e9
        yield {"case": case.line.title, "kernel": name, "shape": (), "ms": time_ms, "tflops": rate}


def best_of(rows: list[dict[str, Any]], case: str) -> dict[str, tuple[float, tuple[Any, ...]]]:
    """Kernel -> (ms, shape) of the fastest on a line."""
    found: dict[str, tuple[float, tuple[Any, ...]]] = {}
    for row in rows:
        if row["case"] == case and "tflops" in row:
            kernel = row["kernel"]
            found[kernel] = min(found.get(kernel, (float("inf"), ())), (row["ms"], tuple(row["shape"])))
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The best per line and kernel beside the first candidate, which is the table's."""
    for case in dict.fromkeys(row["case"] for row in rows if "kernel" in row):
        print(f"-- {case}")
        for kernel, (time_ms, shape) in best_of(rows, case).items():
            of_kernel = [row for row in rows if row["case"] == case and row.get("kernel") == kernel and "ms" in row]
            rate = next(row["tflops"] for row in of_kernel if row["ms"] == time_ms)
            before = f"{of_kernel[0]['ms']:.3f} {tuple(of_kernel[0]['shape'])}"
            print(f"   {kernel:<8}{time_ms:9.3f} ms {rate:4.0f} TFLOP/s  {shape}, first {before}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="candidates whose line and kernel hold this text")
    parser.add_argument("--seconds", type=float, default=140.0, help="start no line after so long")
    parser.add_argument("--compile", action="store_true", help="compile for Hopper and print what that took")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = trials(options.only)
    if options.compile:
        for trial, kernels in compile_part(wanted):
            print(f"{trial.line.title:<52} {trial.kernel:<8}{trial.shape!s:<40}{resources(kernels)}", flush=True)
        return
    if options.worker is not None:
        for _ in compile_part(wanted[options.worker :: WORKERS]):
            pass
        return
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none; --compile needs none")
    began = time.monotonic()
    common.announce()
    command = [sys.executable, __file__, "--only", options.only, "--worker"]
    # The workers must not hold a CUDA context each, nor ask for one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    workers = [subprocess.Popen([*command, str(i)], env=environment) for i in range(WORKERS)]
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(1.0, options.seconds * 0.5 - (time.monotonic() - began)))
        worker.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    for row in measure(wanted, began + options.seconds - 15):
        rows.append(row)
        found = f"{row['ms']:9.3f} ms {row['tflops']:4.0f}" if "ms" in row else row["error"]
        print(f"{row['case']:<52} {row['kernel']:<8}{row['shape']!s:<32}{found}", flush=True)
    said = "each candidate at 4,096 tokens, within twice torch's flash error of fp64"
    common.write(options.out, "tune", rows, check=said)
    show(rows)


if __name__ == "__main__":
    main()
