"""The op on one GPU beside torch's dense attention, in one run: correctness first, then one table and one picture.

    python benchmarks/gpu.py [--out benchmarks/results] [--only TEXT] [--seconds 500]
    python benchmarks/gpu.py --redraw benchmarks/results/gpu_NVIDIA_H200.json

Every line gives milliseconds (median), the rate in TFLOP/s that the pairs of the pattern come to (4 D a pair forward,
2.5 times that backward; causal pairs counted as they are), and that rate against dense cuDNN attention at 65,536 tokens
with the same heads, width and mask, timed before and after the lines it is compared with. Where a check fails nothing
is printed but the failure. With `--seconds` the lines that do not fit are named and left out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.testing import relative_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shape = tuple[tuple[int, ...], tuple[int, ...], int, int, str]
# Segment lengths, rates, heads, width, offsets.
SHAPES: dict[str, Shape] = {
    "D=64": ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), 12, 64, "modulo"),
    "D=128": ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16), 6, 128, "modulo"),
    "paper rates": ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12), 12, 64, "modulo"),
    "slide": ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16), 16, 48, "blocked"),
}
MILLION, DENSE = 1 << 20, 1 << 16


def tensors(n: int, heads: int, width: int, grad: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(n)
    make = functools.partial(torch.randn, 1, n, heads, width, device="cuda", dtype=torch.bfloat16, generator=generator)
    return tuple(make().requires_grad_(grad) for _ in range(3))


def options(shape: str, causal: bool, backend: str = "auto") -> dict[str, Any]:
    lengths, rates, _, _, offsets = SHAPES[shape]
    return {
        "segment_lengths": lengths,
        "dilation_rates": rates,
        "offsets": offsets,
        "is_causal": causal,
        "backend": backend,
    }


def check() -> list[str]:
    """Each shape, full and causal, against the reference in fp64 at 4,000 tokens: failures in words."""
    failures = []
    for name, (_, _, heads, width, _) in SHAPES.items():
        for causal in (False, True):
            title = f"{name} {'causal' if causal else 'full'}"
            failures += disagreements(title, tensors(4000, min(heads, 4), width), options(name, causal))
    return failures


PARTS = "out", "lse", "dq", "dk", "dv"


def everything(inputs: Sequence[Tensor], cotangent: Tensor, settings: Mapping[str, Any]) -> list[Tensor]:
    """out, lse and the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = dilated_attention_with_lse(*leaves, **settings)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def errors(inputs: Sequence[Tensor], settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """How far each part is from fp64: as the settings' backend gives it, and as torch's flash attention does."""
    cotangent = torch.randn_like(inputs[0])
    want = everything([x.double() for x in inputs], cotangent, {**settings, "backend": "reference"})
    ours, flash = (everything(inputs, cotangent, {**settings, **other}) for other in ({}, {"backend": "sdpa"}))
    return [relative_norm(*x) for x in zip(ours, want, strict=True)], [
        relative_norm(*x) for x in zip(flash, want, strict=True)
    ]


def above(title: str, found: Sequence[float], flash: Sequence[float], times: int) -> list[str]:
    """The parts whose error is above so many times that of torch's flash attention, in words."""
    return [
        f"{title} {part}: error {error:.1e}, {times} times torch's flash is {times * base:.1e}"
        for part, error, base in zip(PARTS, found, flash, strict=True)
        if not error <= times * base
    ]


def disagreements(title: str, inputs: Sequence[Tensor], settings: Mapping[str, Any]) -> list[str]:
    """out, lse and gradients whose error from fp64 is above twice that of torch's flash attention, in words."""
    return above(title, *errors(inputs, settings), times=2)


def milliseconds(run: Callable[[], object]) -> float:
    """Median over device events; the queue is kept full, so that launches overlap as they do in use."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = int(min(100, max(5, 0.15 / (time.perf_counter() - start))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def timed(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool) -> tuple[float, float]:
    """Milliseconds, and the peak GiB that the pass adds to its inputs."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    cotangent = torch.randn_like(inputs[0]) if backward else None

    def run() -> object:
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, cotangent) if backward else out

    time_ms = milliseconds(run)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    del kept
    return time_ms, peak


def dense(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

    return call


def graphed(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The call captured in a CUDA graph: what the device needs, without the host."""
    for _ in range(3):
        call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*inputs)
    return graph.replay


def flops(shape: str, n: int, causal: bool, backward: bool) -> float:
    lengths, rates, heads, width, offsets = SHAPES[shape]
    pairs = DilatedPattern(lengths, rates, heads, offsets).pairs(n, is_causal=causal)  # type: ignore[arg-type]
    return pairs * 4 * width * (3.5 if backward else 1.0)


def dense_rate(shape: str, causal: bool, backward: bool) -> float:
    heads, width = SHAPES[shape][2:4]
    time_ms, _ = timed(dense(SDPBackend.CUDNN_ATTENTION, causal), tensors(DENSE, heads, width), backward)
    pairs = DENSE * (DENSE + 1) / 2 if causal else DENSE**2
    return heads * pairs * 4 * width * (3.5 if backward else 1.0) / time_ms / 1e9


class Table:
    """Lines as they are measured; printed at once, kept for the files."""

    def __init__(self, seconds: float, only: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.deadline, self.only, self.left_out = time.monotonic() + seconds, only, 0

    def wants(self, name: str) -> bool:
        if self.only not in name:
            return False
        if time.monotonic() > self.deadline:
            print(f"{name}: left out, the time is spent")
            self.left_out += 1
            return False
        return True

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        ratio = f"{row['ratio']:6.2f}" if row.get("ratio") else " " * 6
        print(
            f"{row['case']:<34} {row['who']:<12} {row['ms']:10.3f} ms {row['tflops']:7.0f} TFLOP/s {ratio} "
            f"{row.get('peak_gib', 0):7.2f} GiB",
            flush=True,
        )


def long_sequences(table: Table) -> None:
    """A million tokens: this backend, sdpa, and the rate of dense cuDNN around them."""
    for shape in ("D=64", "D=128"):
        heads, width = SHAPES[shape][2:4]
        for causal in (False, True):
            for backward in (False, True):
                case = f"{shape} {'causal' if causal else 'full'} {'fwd+bwd' if backward else 'fwd'} N=1M"
                if not table.wants(case):
                    continue
                before = dense_rate(shape, causal, backward)
                inputs = tensors(MILLION, heads, width)
                measured = {
                    who: timed(functools.partial(dilated_attention, **options(shape, causal, who)), inputs, backward)
                    for who in ("auto", "sdpa")
                }
                rate = (before + dense_rate(shape, causal, backward)) / 2
                table.add(case=case, who="dense cuDNN", ms=0.0, tflops=rate, ratio=1.0)
                for who, (time_ms, peak) in measured.items():
                    tflops = flops(shape, MILLION, causal, backward) / time_ms / 1e9
                    table.add(case=case, who=who, ms=time_ms, tflops=tflops, ratio=tflops / rate, peak_gib=peak)


def other_patterns(table: Table) -> None:
    """The paper's rates and the slide encoder's pattern, against the sdpa backend."""
    cases = [("paper rates", MILLION), *(("slide", n) for n in (10_000, 46_000, 262_144, MILLION))]
    for shape, n in cases:
        heads, width = SHAPES[shape][2:4]
        for backward in (False, True):
            case = f"{shape} full {'fwd+bwd' if backward else 'fwd'} N={n}"
            if not table.wants(case):
                continue
            inputs = tensors(n, heads, width)
            for who in ("auto", "sdpa"):
                time_ms, peak = timed(
                    functools.partial(dilated_attention, **options(shape, False, who)), inputs, backward
                )
                tflops = flops(shape, n, False, backward) / time_ms / 1e9
                table.add(case=case, who=who, ms=time_ms, tflops=tflops, peak_gib=peak)


def short_sequences(table: Table) -> None:
    """From 1k to 64k tokens forward, as called and as a replayed CUDA graph, beside torch's flash and cuDNN."""
    heads, width = SHAPES["D=64"][2:4]
    for causal in (False, True):
        for n in (1024, 2048, 4096, 8192, 16384, 65536):
            case = f"D=64 {'causal' if causal else 'full'} fwd N={n}"
            if not table.wants(case):
                continue
            inputs = tensors(n, heads, width)
            calls = {
                "auto": functools.partial(dilated_attention, **options("D=64", causal)),
                "sdpa": functools.partial(dilated_attention, **options("D=64", causal, "sdpa")),
                "dense flash": dense(SDPBackend.FLASH_ATTENTION, causal),
                "dense cuDNN": dense(SDPBackend.CUDNN_ATTENTION, causal),
            }
            pairs = heads * (n * (n + 1) / 2 if causal else n**2)
            for who, call in calls.items():
                work = pairs * 4 * width if who.startswith("dense") else flops("D=64", n, causal, False)
                time_ms, peak = timed(call, inputs, False)
                table.add(case=case, who=who, ms=time_ms, tflops=work / time_ms / 1e9, peak_gib=peak)
                if who in ("auto", "dense flash"):
                    time_ms = milliseconds(graphed(call, inputs))
                    table.add(case=case, who=f"{who} *", ms=time_ms, tflops=work / time_ms / 1e9)


def flex_attention(table: Table) -> None:
    """FlexAttention with the multiplicity as a score: it can express the pattern, but skips only empty 128 x 128 tiles,
    of which a dilated pattern leaves few."""
    n = 8192
    case = f"D=64 full fwd N={n}"
    if not table.wants(f"flex {case}"):
        return
    from torch.nn.attention import flex_attention as flex

    lengths, rates, heads, width, _ = SHAPES["D=64"]

    def multiplicity(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        count = torch.zeros_like(i)
        for w, r in zip(lengths, rates, strict=True):
            mine = ((i % w) % r == h % r) & ((j % w) % r == h % r) & (i // w == j // w)
            count = count + mine.to(count.dtype)
        return count

    mask = flex.create_block_mask(lambda b, h, i, j: multiplicity(h, i, j) > 0, 1, heads, n, n, device="cuda")
    compiled = torch.compile(flex.flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + multiplicity(h, i, j).clamp(min=1).to(s.dtype).log()

        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads_first, score_mod=score, block_mask=mask).transpose(1, 2)

    inputs = tensors(n, heads, width)
    difference = relative_norm(call(*inputs), dilated_attention(*inputs, **options("D=64", False)))
    if not difference < 1e-2:
        sys.exit(f"FlexAttention and the op differ by {difference:.1e}")
    time_ms, peak = timed(call, inputs, False)
    table.add(case=case, who="flex", ms=time_ms, tflops=flops("D=64", n, False, False) / time_ms / 1e9, peak_gib=peak)


COLOURS = {"auto": "#0072b2", "sdpa": "#e69f00", "dense flash": "#cc79a7", "dense cuDNN": "#777777"}


def picture(outcome: dict[str, Any]) -> Figure:
    """The chart of a run, from what its JSON holds: rates at a million tokens, and times by length."""
    from matplotlib.figure import Figure

    machine, versions, rows = outcome["machine"], outcome["versions"], outcome["rows"]
    major, minor = versions["cudnn"] // 10_000, versions["cudnn"] // 100 % 100
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        f"{machine['gpu']}: torch {versions['torch']}, triton {versions['triton']}, cuDNN {major}.{minor}; bf16, "
        f"{outcome['date']}",
        fontsize=10,
    )
    rates, times = figure.subplots(1, 2)
    _draw_rates(rates, [row for row in rows if row["case"].endswith("N=1M")])
    _draw_times(times, [row for row in rows if re.fullmatch(r"D=64 full fwd N=\d+", row["case"])])
    for axis in (rates, times):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_rates(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """TFLOP/s of a million tokens, each with its percentage of dense cuDNN's."""
    names = {"auto": "triton", "sdpa": "sdpa", "dense cuDNN": "dense cuDNN, 65,536 tokens"}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for i, (who, name) in enumerate(names.items()):
        mine = [row for row in rows if row["who"] == who]
        heights = [cases.index(row["case"]) + 0.27 * (i - 1) for row in mine]
        bars = axis.barh(heights, [row["tflops"] for row in mine], 0.25, color=COLOURS[who], label=name)
        if who != "dense cuDNN":
            axis.bar_label(bars, [f"{row['ratio']:.0%}" for row in mine], padding=2, fontsize=7)
    words = {" N=1M": "", "full": "bidirectional", "fwd": "forward", "bwd": "backward"}
    labels = [functools.reduce(lambda text, pair: text.replace(*pair), words.items(), case) for case in cases]
    axis.set_yticks(range(len(cases)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("TFLOP/s at 1,048,576 tokens; percent of dense cuDNN's", fontsize=9)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=3, fontsize=8)


def _draw_times(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Milliseconds of a forward pass by length, as called and, dashed, as a replayed CUDA graph."""
    for who in dict.fromkeys(row["who"] for row in rows):
        name = who.removesuffix(" *")
        if name not in COLOURS:
            continue
        points = sorted((int(row["case"].split("N=")[1]), row["ms"]) for row in rows if row["who"] == who)
        label, line = name.replace("auto", "triton"), "o-"
        if name != who:
            label, line = f"{label}, CUDA graph", ".--"
        axis.loglog(*zip(*points, strict=True), line, color=COLOURS[name], label=label, markersize=5)
    lengths = sorted({int(row["case"].split("N=")[1]) for row in rows})
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=8)
    axis.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axis.minorticks_off()
    axis.grid(color="#cfd8dc", linewidth=0.5)
    axis.set(xlabel="tokens", ylabel="ms, forward, bidirectional, D=64, H=12")
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default="", help="lines whose name holds this text")
    parser.add_argument("--seconds", type=float, default=500.0, help="start no line after so long")
    parser.add_argument("--redraw", type=Path, help="draw the chart of a result's JSON anew, without a GPU")
    arguments = parser.parse_args()
    if arguments.redraw is not None:
        print(f"drawn: {common.redraw(arguments.redraw, 'gpu', picture)}")
        return
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none; benchmarks/cpu.py times the CPU path")
    table = Table(arguments.seconds, arguments.only)
    common.refuse(check())
    common.announce()
    print("bf16, B=1; medians; the ratio is to dense cuDNN at 65,536 tokens; * is a replayed CUDA graph")
    for measure in (long_sequences, other_patterns, short_sequences, flex_attention):
        measure(table)
    said = (
        "each pattern, full and causal, forward and backward, within twice torch's flash error of fp64 at 4,000 tokens"
    )
    path = common.write(arguments.out, "gpu", table.rows, check=said)
    assert path is not None
    print(f"and {common.redraw(path, 'gpu', picture).name}; lines left out: {table.left_out}")


if __name__ == "__main__":
    main()
