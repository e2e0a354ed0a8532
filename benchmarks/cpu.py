"""The sdpa backend on a CPU against the attention calls it cannot do without.

    python benchmarks/cpu.py            # N = 16384 and 65536
    python benchmarks/cpu.py --quick    # N = 16384 alone, fewer rounds
    python benchmarks/cpu.py --smoke    # N = 2048, one round: only to see it run
    python benchmarks/cpu.py --out benchmarks/results

"Calls alone" is torch's own attention on branches that already lie contiguous in memory, one call a branch: what is
left when gathering, mixing and scattering cost nothing. Both are timed in turn, round by round, in one process; the
ratio is the median of the rounds' ratios. Correctness is checked first, on the same inputs, against the reference at a
shorter length, and no number is printed if it fails.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.testing import peak_bytes, relative_norm

HEADS, WIDTH = 8, 64
LENGTHS, RATES = (2048, 4096, 8192, 16384), (1, 2, 4, 8)


def lengths(n: int) -> tuple[int, ...]:
    """The segment lengths, scaled down where the sequence is shorter than the longest."""
    return tuple(w * min(n, LENGTHS[-1]) // LENGTHS[-1] for w in LENGTHS)


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, n, HEADS, WIDTH, generator=generator) for _ in range(3))  # type: ignore[return-value]


def gathered(x: Tensor) -> list[Tensor]:
    """Each branch's rows, contiguous: `(segments, H, w / r, D)`."""
    pattern = DilatedPattern(lengths(x.shape[1]), RATES, HEADS)
    branches = []
    for i, (w, r) in enumerate(pattern.branches):
        segments = x[0].unflatten(0, (-1, w))  # (segments, w, H, D)
        heads = [segments[:, pattern.offset(i, h) :: r, h] for h in range(HEADS)]
        branches.append(torch.stack(heads, 1).contiguous())
    return branches


def check(causal: bool, n: int) -> None:
    """The sdpa backend against the reference, whose memory grows with the square of n."""
    q, k, v = (x[:, :n] for x in inputs(4096))
    pattern = {"segment_lengths": [512, 1024, 2048, 4096], "dilation_rates": RATES, "is_causal": causal}
    want = dilated_attention(q.double(), k.double(), v.double(), backend="reference", **pattern)
    error = relative_norm(dilated_attention(q, k, v, backend="sdpa", **pattern), want)
    common.refuse([f"the sdpa backend is off by a relative norm of {error:.1e}"] if not error < 1e-5 else [])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(n: int, causal: bool, rounds: int) -> tuple[float, float, float]:
    """Median seconds of ours, median seconds of the calls alone, median ratio."""
    q, k, v = inputs(n)
    branches = list(zip(gathered(q), gathered(k), gathered(v), strict=True))

    def ours() -> None:
        dilated_attention(q, k, v, segment_lengths=lengths(n), dilation_rates=RATES, is_causal=causal, backend="sdpa")

    def alone() -> None:
        for branch in branches:
            F.scaled_dot_product_attention(*branch, is_causal=causal)

    ours(), alone()  # warm up
    pairs = [(seconds(ours), seconds(alone)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def peak_mib(n: int, causal: bool) -> float:
    """Peak memory that one forward adds to its inputs, in a process of its own."""
    run = subprocess.run([sys.executable, __file__, "--peak", str(n), str(int(causal))], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return float(run.stdout)


def print_peak(n: int, causal: bool) -> None:
    q, k, v = inputs(n)
    dilated_attention(*(x[:, :64] for x in (q, k, v)), segment_lengths=[64], dilation_rates=[1])  # loads the kernels
    forward = functools.partial(
        dilated_attention, q, k, v, segment_lengths=lengths(n), dilation_rates=RATES, is_causal=causal, backend="sdpa"
    )
    print(peak_bytes(forward) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N = 16384 alone, three rounds")
    parser.add_argument("--smoke", action="store_true", help="N = 2048, one round")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    parser.add_argument("--peak", nargs=2, type=int, metavar=("N", "CAUSAL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], bool(options.peak[1]))
        return
    for causal in (False, True):
        check(causal, 700 if options.smoke else 2500)
    common.announce()
    sizes = (2048,) if options.smoke else (16384,) if options.quick else (16384, 65536)
    rows = []
    print(f"B=1 H={HEADS} D={WIDTH} fp32, w={lengths(sizes[0])}, r={RATES}; forward, medians")
    print(f"{'N':>6} {'mask':>7} {'sdpa s':>8} {'alone s':>8} {'ratio':>6} {'GFLOP/s':>8} {'peak MiB over inputs':>21}")
    for n in sizes:
        for causal in (False, True):
            rounds = 1 if options.smoke else 3 if options.quick else max(5, 3 * 65536 // n)
            ours, alone, ratio = compare(n, causal, rounds)
            flops = 4 * WIDTH * DilatedPattern(lengths(n), RATES, HEADS).pairs(n, is_causal=causal)
            mask, peak = "causal" if causal else "full", peak_mib(n, causal)
            print(
                f"{n:>6} {mask:>7} {ours:8.3f} {alone:8.3f} {ratio:6.2f} {flops / ours / 1e9:8.0f} {peak:21.0f}",
                flush=True,
            )
            row = {"case": f"{mask} N={n}", "n": n, "mask": mask, "seconds": ours, "alone_seconds": alone}
            rows.append(row | {"ratio": ratio, "gflops": flops / ours / 1e9, "peak_mib": peak})
    common.write(options.out, "cpu", rows, check="sdpa against the fp64 reference, relative norm < 1e-5")


if __name__ == "__main__":
    main()
