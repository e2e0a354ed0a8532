"""What every rank of a ring has to compute, timed on one GPU, rank after rank; nothing travels.

    python benchmarks/ring_shares.py --ranks 2 4 8      # one H100, bf16, H=12, D=64
    python benchmarks/ring_shares.py --smoke            # CPU, seconds

A rank does here what it does in a ring, packing and merging included, on random rows in place of those that would
arrive. One device's time over the slowest rank's is what the ring reaches on as many GPUs if its exchange is hidden:
an upper bound that needs one GPU, which `benchmarks/ring.py` then measures with the exchange on several.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import announce, write
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.core.memory.unified_pool import Handle
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.ring_attention import schedule
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
from dilated_attention_pytorch.ring_attention.plan import RingPlan, equal_bounds
from dilated_attention_pytorch.ring_attention.variants.triton import OpStep

LENGTHS, RATES = (2048, 32768, 524288, 1048576), (1, 2, 8, 16)


class Ready:
    """In place of a `Pending`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        return self.rows

    def release(self) -> None:
        """Nothing was lent."""


class Still:
    """In place of a `Channel`: what would arrive is random, and already there."""

    def __init__(self) -> None:
        self.rows: dict[tuple[object, ...], Tensor] = {}

    def exchange(
        self, buffer: Handle, sent: Sequence[int], received: Sequence[int], purpose: str, *, keep: bool = False
    ) -> Ready:
        send = buffer.tensor
        key = (purpose, sum(received), send.dtype)
        if key not in self.rows:
            shape = (sum(received), *send.shape[1:])
            self.rows[key] = torch.randn(shape, device=send.device, dtype=torch.float32).to(send.dtype)
        buffer.release()
        return Ready(self.rows[key])


def median(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a run."""
    times = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the result's JSON")
    parser.add_argument("--smoke", action="store_true", help="CPU, a thousandth of the size")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    shrink, heads, width = (1024, 2, 16) if options.smoke else (1, 12, 64)
    dtype, backend = (torch.float32, "sdpa") if options.smoke else (torch.bfloat16, "triton")
    n = 2**20 // shrink
    lengths = tuple(w // shrink for w in LENGTHS)
    pattern = DilatedPattern(lengths, RATES, heads)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, n, heads, width, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for _ in range(4)
    )
    announce()
    print(f"{dtype}, B=1 H={heads} D={width}, N={n}, w={lengths}, r={RATES}")

    rows = []
    for causal in (False, True):

        def one(causal: bool = causal) -> None:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = dilated_attention(
                *leaves, segment_lengths=lengths, dilation_rates=RATES, is_causal=causal, backend=backend
            )
            torch.autograd.grad(out, leaves, grad)

        alone = median(one, device, options.rounds)
        print(f"one device{', causal' * causal}, forward+backward: {alone * 1e3:.1f} ms")
        shards = [(size, "equal", equal_bounds(n, size)) for size in options.ranks]
        if causal:
            shards += [(size, "balanced", balanced_bounds(pattern, n, size)) for size in options.ranks]
        for size, kind, bounds in shards:
            shares = []
            for rank in range(size):
                start, stop = bounds[rank], bounds[rank + 1]
                plan = RingPlan(pattern, bounds, rank, causal, device)
                problem = Problem(pattern, causal, width**-0.5, 0.0, start, start, n, "exact", "none")
                call = schedule.Call(plan, problem, "sparse", OpStep(backend), Still(), torch.float32, True)
                own = [x[:, start:stop].contiguous() for x in (q, k, v, grad)]

                def share(call: schedule.Call = call, own: list[Tensor] = own) -> None:
                    (out, lse), kept = schedule.forward(call, *own[:3], None, None)
                    grads = schedule.backward(call, own[3], None, *own[:3], out, lse, kept, None, None)
                    [x.to(dtype) for x in grads]

                shares.append(median(share, device, options.rounds))
            times = ", ".join(f"{x * 1e3:.1f}" for x in shares)
            bound = alone / max(shares)
            print(f"  {size} ranks, {kind} shards: {times} ms; at most {bound:.2f}x one device", flush=True)
            case = f"{size} ranks, {kind} shards{', causal' * causal}"
            rows.append({"case": case, "one_ms": alone * 1e3, "rank_ms": [x * 1e3 for x in shares], "at_most": bound})
    write(options.out, "ring_shares", rows, check="none: tests/test_ring_exact.py holds the parts that are timed")


if __name__ == "__main__":
    main()
