"""What users take beside the benchmark's own pattern, on one GPU: correctness first, then a line of the table.

    python benchmarks/patterns.py [--out benchmarks/results] [--only TEXT] [--seconds 500] [--official PATH]
    python benchmarks/patterns.py --redraw benchmarks/results/patterns_NVIDIA_H200.json

Each line is checked first: its pattern, heads and mask at 3,000 tokens against the reference in fp64, with at most
twice the error of torch's flash attention; and at its own length it differs from that by at most three times as much.
Then it prints, per pass:

- ms of `auto` and of `sdpa` (medians); a quotient below 1 means that `auto` took the slower one.
- the pattern rate: 4 D operations per pair forward, 2.5 times that backward, where a key counts once for each branch
  that shows it; and that in percent of dense cuDNN attention at 65,536 tokens with the same heads, width and mask,
  timed right before the line (torch's flash attention where cuDNN has no kernel of that width).
- where the package flash-attn-4 is installed, the same in percent of its dense attention.
- the computed rate: the pairs that the kernel multiplies. Where keys are taken once these are fewer.
- copies: time over what moving q, k, v, out (and their gradients) takes at the measured copy rate.
- GiB that the pass adds to its inputs.

With `--official PATH`, a checkout of torchscale, that code runs the five-branch lines over torch's flash attention.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import gpu
import others
import patterns_chart
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.testing import relative_norm

if TYPE_CHECKING:
    from dilated_attention_pytorch.kernels.triton.work import Work

FIVE = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
SLIDE = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
DENSE, CHECKED = 1 << 16, 3000


class Line(NamedTuple):
    """A case of the table: a pattern and the tensors it is called with."""

    name: str
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    seq_len: int
    num_heads: int
    head_dim: int
    is_causal: bool = True
    num_kv_heads: int = 0
    batch: int = 1
    offsets: str = "modulo"

    @property
    def title(self) -> str:
        """Name, mask and length."""
        mask = "causal" if self.is_causal else "bidirectional"
        return f"{self.name}, D={self.head_dim} {mask} N={self.seq_len}"

    @property
    def pattern(self) -> DilatedPattern:
        """Its pattern over key/value heads."""
        heads = self.num_kv_heads or self.num_heads
        return DilatedPattern(self.segment_lengths, self.dilation_rates, heads, self.offsets)  # type: ignore[arg-type]

    def options(self, backend: str) -> dict[str, Any]:
        """Keywords of `dilated_attention`."""
        return {
            "segment_lengths": self.segment_lengths,
            "dilation_rates": self.dilation_rates,
            "offsets": self.offsets,
            "is_causal": self.is_causal,
            "backend": backend,
        }

    def tensors(self, seq_len: int, batch: int, device: str = "cuda") -> list[Tensor]:
        """q, k and v in bf16, the same in each run; on the CPU, where kernels are only compiled, without values."""
        heads = self.num_heads, *2 * (self.num_kv_heads or self.num_heads,)
        shapes = [(batch, seq_len, h, self.head_dim) for h in heads]
        if device == "cpu":
            return [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        generator = torch.Generator(device).manual_seed(seq_len)
        return [torch.randn(x, device=device, dtype=torch.bfloat16, generator=generator) for x in shapes]

    def work(self, seq_len: int, batch: int, device: str = "cuda") -> Work:
        """What the kernels are asked."""
        from dilated_attention_pytorch.core.problem import Problem
        from dilated_attention_pytorch.kernels.triton.work import prepare
        from dilated_attention_pytorch.types import NO_MASKS, QKV

        problem = Problem(
            pattern=self.pattern, seq_len=seq_len, is_causal=self.is_causal, scale=self.head_dim**-0.5
        )  # fmt: skip
        return prepare(QKV(*self.tensors(seq_len, batch, device)), problem, NO_MASKS)

    def pairs(self) -> int:
        """(query, key) pairs of the multiset, over batch and query heads."""
        group = self.num_heads // self.pattern.num_heads
        return self.batch * group * self.pattern.pairs(self.seq_len, is_causal=self.is_causal)

    def distinct(self) -> int:
        """The pairs left when a key counts once, for patterns that nest; exact where they divide the length."""
        branches = sorted(zip(self.segment_lengths, self.dilation_rates, strict=True))
        rate = math.lcm(*self.dilation_rates)
        total = 0
        for head, residue in itertools.product(range(self.pattern.num_heads), range(rate)):
            inner = 0
            for length, r in branches:
                if residue % r == head % r:
                    length = min(length, self.seq_len)
                    total += (length - inner) // r
                    inner = length
        total = total * self.seq_len // rate
        if self.is_causal:
            # A pair and its mirror image are both shown, or neither; each row shows itself.
            total = (total + self.pattern.num_heads * self.seq_len) // 2
        return self.batch * (self.num_heads // self.pattern.num_heads) * total


def lines() -> Iterator[Line]:
    """The table, most wanted first."""
    million = 1 << 20
    reaching = DilatedPattern.geometric(million, num_heads=12)
    for causal in (False, True):
        yield Line(
            "w=2048*4^i reaching all", reaching.segment_lengths, reaching.dilation_rates, million, 12, 64, causal
        )
        for width, heads in ((64, 12), (128, 6)):
            yield Line("five branches", *FIVE, million, heads, width, causal)
    yield Line("README", (1024, 4096, 16384), (1, 4, 16), 131_072, 8, 64)
    yield Line("five branches, heads 32/8", *FIVE, 131_072, 32, 128, num_kv_heads=8)
    yield Line("five branches, heads 32/8", *FIVE, 100_003, 32, 128, num_kv_heads=8)
    yield Line("five branches", *FIVE, 1_000_003, 12, 64)
    yield Line("batch 8", *FIVE, 16_384, 12, 64, batch=8)
    yield Line("batch 16, short segments", (128, 1024, 4096), (1, 4, 16), 8192, 12, 64, batch=16)
    for n in (10_001, 45_681, 262_144):
        yield Line("slide", *SLIDE, n, 16, 48, False, offsets="blocked")
    for causal in (False, True):
        yield Line("r=1,3,9", (2048, 6144, 18432), (1, 3, 9), 262_144, 12, 64, causal)
    yield Line("paper's rates", FIVE[0], (1, 2, 4, 6, 12), million, 12, 64, False)
    yield Line("two branches", (4096, 65_536), (1, 16), 262_144, 8, 128)
    for width in (32, 80, 96, 256):
        yield Line("five branches", *FIVE, 262_144, max(2, 768 // width), width)
    yield Line(
        "2048,32768,524288,1048576", (2048, 32_768, 524_288, million), (1, 2, 8, 16), million, 12, 64, False
    )  # fmt: skip


def failures(line: Line) -> list[str]:
    """What is wrong with a line, in words: at 3,000 tokens against the reference in fp64; and at its own length, where
    other kernels may run, against torch's flash attention, whose own error is then in the difference."""
    few = line.tensors(min(line.seq_len, CHECKED), 1)
    ours, flash = gpu.errors(few, line.options("auto"))
    inputs = line.tensors(line.seq_len, line.batch)
    cotangent = torch.randn_like(inputs[0])
    both = (gpu.everything(inputs, cotangent, line.options(who)) for who in ("auto", "sdpa"))
    apart = [relative_norm(*x) for x in zip(*both, strict=True)]
    return gpu.above(f"{line.title}, 3,000 tokens,", ours, flash, 2) + gpu.above(line.title, apart, flash, 3)


@functools.cache
def dense_rate(heads: int, width: int, causal: bool, backward: bool) -> tuple[float, str]:
    """TFLOP/s of dense attention at 65,536 tokens, and whose."""
    inputs = gpu.tensors(DENSE, heads, width)
    for who, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            time_ms, _ = gpu.timed(gpu.dense(backend, causal), inputs, backward)
        except RuntimeError:  # torch has no kernel of that kind for the width
            continue
        return heads * dense_pairs(causal) * 4 * width * (3.5 if backward else 1.0) / time_ms / 1e9, who
    return math.nan, "none"


@functools.cache
def fa4_rate(heads: int, width: int, causal: bool, backward: bool) -> float | None:
    """The same of FlashAttention-4; None where it is not installed or has no such kernel."""
    call = others.flash_attention_4()
    if call is None:
        return None
    try:
        time_ms, _ = gpu.timed(functools.partial(call, is_causal=causal), gpu.tensors(DENSE, heads, width), backward)
    except Exception as error:  # of its compiler: any
        print(f"flash-attn-4 at D={width}: {type(error).__name__}, left out")
        return None
    return heads * dense_pairs(causal) * 4 * width * (3.5 if backward else 1.0) / time_ms / 1e9


def dense_pairs(causal: bool) -> float:
    """Pairs of dense attention at 65,536 tokens, for one head."""
    return DENSE * (DENSE + 1) / 2 if causal else float(DENSE**2)


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a millisecond by a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / gpu.milliseconds(lambda: target.copy_(source))


def takes_once(line: Line) -> bool:
    """Whether the kernels take a key once that several branches show."""
    from dilated_attention_pytorch.kernels.triton import launch_aligned
    from dilated_attention_pytorch.kernels.triton.hopper import support

    work = line.work(line.seq_len, 1)
    if not support.why_not(work):
        return True
    return launch_aligned.why_not(work, "forward") is None and launch_aligned.alignment(work).once


def measure(line: Line, backward: bool, rival: Callable[..., Tensor] | None) -> Iterator[dict[str, Any]]:
    """The rows of a line for one pass."""
    rate, whose = dense_rate(line.num_heads, line.head_dim, line.is_causal, backward)
    fa4 = fa4_rate(line.num_heads, line.head_dim, line.is_causal, backward)
    inputs = tuple(line.tensors(line.seq_len, line.batch))
    operations = 4 * line.head_dim * (3.5 if backward else 1.0)
    moved = sum(x.numel() for x in inputs) + inputs[0].numel()
    # The backward reads all four and out's gradient, and writes three.
    moved += (sum(x.numel() for x in inputs) * 2 + 2 * inputs[0].numel()) if backward else 0
    calls: dict[str, Callable[..., Tensor]] = {
        who: functools.partial(dilated_attention, **line.options(who)) for who in ("auto", "sdpa")
    }
    if rival is not None:
        calls["official"] = rival
    computed = line.distinct() if takes_once(line) else line.pairs()
    for who, call in calls.items():
        time_ms, peak = gpu.timed(call, inputs, backward)
        yield {
            "case": f"{line.title} {'fwd+bwd' if backward else 'fwd'}",
            "who": who,
            "ms": time_ms,
            "tflops": line.pairs() * operations / time_ms / 1e9,
            "ratio": line.pairs() * operations / time_ms / 1e9 / rate,
            "dense": f"{whose} {rate:.0f}",
            "fa4_tflops": fa4,
            "computed_tflops": (computed if who == "auto" else line.pairs()) * operations / time_ms / 1e9,
            "copies": time_ms / (2 * moved / copy_rate()),
            "peak_gib": peak,
        }


def show(rows: list[dict[str, Any]]) -> None:
    """One printed line per case and pass."""
    times = {row["who"]: row["ms"] for row in rows}
    ours = rows[0]
    beside = f", official {times['official'] / ours['ms']:.1f}x" if "official" in times else ""
    fa4 = f", {ours['tflops'] / ours['fa4_tflops']:.0%} of FA4's {ours['fa4_tflops']:.0f}" if ours["fa4_tflops"] else ""
    print(
        f"{ours['case']:<60} {ours['ms']:9.3f} ms {ours['tflops']:5.0f} TFLOP/s = {ours['ratio']:4.0%} of "
        f"{ours['dense']:<10}{fa4} computed {ours['computed_tflops']:5.0f}, sdpa {times['sdpa'] / ours['ms']:5.2f}x"
        f"{beside}, "
        f"{ours['copies']:6.1f} copies, {ours['peak_gib']:6.2f} GiB",
        flush=True,
    )


def compile_line(line: Line) -> None:
    """Leaves what a line and its check launch in the cache on disk."""
    import compiling  # Triton, which a machine that redraws may lack

    from dilated_attention_pytorch.kernels.triton import backend
    from dilated_attention_pytorch.kernels.triton.hopper import support
    from dilated_attention_pytorch.kernels.triton.replay import Tape
    from dilated_attention_pytorch.types import AttentionOutput, OutputGradient

    compiling.without_gpu()
    support.why_not_here = lambda device: []  # type: ignore[assignment]
    for seq_len, batch in ((line.seq_len, line.batch), (min(line.seq_len, CHECKED), 1)):
        work = line.work(seq_len, batch, "cpu")
        forward, backward = (backend.choose(work, direction) for direction in ("forward", "backward"))
        saved = AttentionOutput(*forward.family.forward(work, Tape(), *forward.configs))
        # The check asks for lse, and so for its gradient.
        for grad_lse in (None, torch.empty_like(saved.lse)):
            grad = OutputGradient(torch.empty_like(work.x.q), grad_lse)
            backward.family.backward(work, grad, saved, Tape(), *backward.configs)


def first_calls() -> list[dict[str, Any]]:
    """Seconds until the first result of a shape, and of another length of the same kind afterwards."""
    rows = []
    for n in (98_304, 114_688, 98_304):
        line = Line("first call", *FIVE, n, 12, 64, False)
        inputs = [x.requires_grad_() for x in line.tensors(n, 1)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        dilated_attention(*inputs, **line.options("auto")).sum().backward()
        torch.cuda.synchronize()
        rows.append({"case": line.title, "who": "auto", "seconds": time.perf_counter() - start})
        print(f"{line.title}: {rows[-1]['seconds']:.3f} s until out and gradients", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default="", help="lines whose title holds this text")
    parser.add_argument("--seconds", type=float, default=500.0, help="start no line after so long")
    parser.add_argument("--redraw", type=Path, help="draw the chart of a result's JSON anew, without a GPU")
    parser.add_argument("--official", type=Path, help="a checkout of torchscale, to time it beside")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.redraw is not None:
        print(f"drawn: {common.redraw(arguments.redraw, 'patterns', patterns_chart.picture)}")
        return
    wanted = [line for line in lines() if arguments.only in line.title]
    if arguments.compile is not None:
        compile_line(wanted[arguments.compile])
        return
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none; benchmarks/cpu.py times the CPU path")
    deadline = time.monotonic() + arguments.seconds
    common.announce()
    import compiling

    rows = first_calls()
    compiling.side_by_side(len(wanted), "--only", arguments.only)
    rival = others.torchscale(arguments.official) if arguments.official else None
    left_out: list[str] = []
    slower: list[str] = []
    for line in wanted:
        if time.monotonic() > deadline:
            left_out.append(line.title)
            continue
        common.refuse(failures(line))
        for backward in (False, True):
            beside = rival(line) if rival and (line.segment_lengths, line.dilation_rates) == FIVE else None
            found = list(measure(line, backward, beside))
            show(found)
            slower += [found[0]["case"]] if found[0]["ms"] > 1.02 * found[1]["ms"] else []
            rows += found
    said = "each line's out, lse and gradients: twice torch's flash error at 3,000 tokens, near flash at its own length"
    path = common.write(arguments.out, "patterns", rows, check=said)
    if path is not None and len(rows) > 3:
        print(f"drawn: {common.redraw(path, 'patterns', patterns_chart.picture)}")
    print(f"left out: {', '.join(left_out) or 'none'}")
    print(f"auto slower than sdpa: {', '.join(slower) or 'nowhere'}")


if __name__ == "__main__":
    main()
