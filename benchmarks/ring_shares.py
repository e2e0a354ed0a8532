"""What every rank of a ring has to compute, timed on one GPU, rank after rank; nothing travels.

    python benchmarks/ring_shares.py --ranks 2 4 8      # one H100, bf16, H=12, D=64
    python benchmarks/ring_shares.py --smoke            # CPU, seconds

A rank does here what it does in a ring, packing and merging included, on random rows in place of those that would
arrive. One device's time over the slowest rank's is what the ring reaches on as many GPUs if its exchange is hidden:
an upper bound that needs one GPU, which `benchmarks/ring.py` then measures with the exchange on several.

Correctness comes first: at a small size each rank gets what its peers sent, and all shares together are held to fp64,
with twice one device's own error as the bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from common import announce, refuse, write
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.core.memory.unified_pool import Handle
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.choice import backend_for
from dilated_attention_pytorch.ring_attention import exchange
from dilated_attention_pytorch.ring_attention.call import RingCall
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
from dilated_attention_pytorch.ring_attention.plan import RingPlan, equal_bounds
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, OutputGradient

LENGTHS, RATES = (2048, 32768, 524288, 1048576), (1, 2, 8, 16)
CHECKED = 2048  # positions of the check


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
        self, buffer: Handle, sent: Sequence[int], received: Sequence[int], purpose: str, keep: bool = False
    ) -> Ready:
        send = buffer.tensor
        key = (purpose, sum(received), send.dtype)
        if key not in self.rows:
            shape = (sum(received), *send.shape[1:])
            self.rows[key] = torch.randn(shape, device=send.device, dtype=torch.float32).to(send.dtype)
        buffer.release()
        return Ready(self.rows[key])


class Post:
    """In place of a `Channel`, for ranks that run one after another: what the peers sent when they last ran arrives."""

    def __init__(self, rank: int, mail: dict[tuple[str, int, int], Tensor]) -> None:
        self.rank, self.mail = rank, mail

    def exchange(
        self, buffer: Handle, sent: Sequence[int], received: Sequence[int], purpose: str, keep: bool = False
    ) -> Ready:
        send = buffer.tensor
        for peer, part in enumerate(send.split(list(sent))):
            self.mail[purpose, self.rank, peer] = part.clone()
        nothing = [send.new_zeros(count, *send.shape[1:]) for count in received]
        rows = [self.mail.get((purpose, peer, self.rank), zeros) for peer, zeros in enumerate(nothing)]
        buffer.release()
        return Ready(torch.cat(rows))


def inputs(n: int, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a cotangent."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, n, heads, width)
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(4)]


def one_device(tensors: Sequence[Tensor], pattern: DilatedPattern, causal: bool, backend: str) -> list[Tensor]:
    """Out and gradients of one device."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = dilated_attention(
        *leaves, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates, is_causal=causal,
        backend=backend,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


class Share:
    """One rank's part of a forward and backward."""

    def __init__(
        self, tensors: Sequence[Tensor], pattern: DilatedPattern, bounds: tuple[int, ...], rank: int, causal: bool,
        backend: str, channel: Still | Post,
    ) -> None:  # fmt: skip
        start, stop = bounds[rank], bounds[rank + 1]
        plan = RingPlan(pattern, bounds, rank, causal, tensors[0].device)
        scale = tensors[0].shape[-1] ** -0.5
        problem = Problem(pattern, causal, scale, q_start=start, k_start=start, seq_len=bounds[-1])
        computing = backend_for(QKV(*tensors[:3]), problem, backend)
        self.call = RingCall(plan, problem, "sparse", computing, channel, torch.float32, keep=True, zero_keys=False)
        self.own = [x[:, start:stop].contiguous() for x in tensors]

    def __call__(self) -> list[Tensor]:
        """This rank's rows of out and gradients."""
        *qkv, grad = self.own
        x = QKV(*qkv)
        saved, kept = exchange.forward(self.call, x, NO_MASKS)
        grads = exchange.backward(self.call, OutputGradient(grad, None), x, saved, kept, NO_MASKS)
        return [saved.out, *(y.to(grad.dtype) for y in grads)]


def shardings(pattern: DilatedPattern, n: int, ranks: Sequence[int], causal: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The ways to cut a sequence, by name."""
    found = [(f"{size} ranks, equal shards", equal_bounds(n, size)) for size in ranks]
    if causal:
        found += [(f"{size} ranks, balanced shards", balanced_bounds(pattern, n, size)) for size in ranks]
    return found


def check(
    ranks: Sequence[int], heads: int, width: int, device: torch.device, dtype: torch.dtype, backend: str
) -> list[str]:
    """Where shares, put together, are off by more than twice one device's own error, in words."""
    pattern = DilatedPattern(tuple(w * CHECKED // LENGTHS[-1] for w in LENGTHS), RATES, heads)
    tensors = inputs(CHECKED, heads, width, device, dtype)
    red = []
    for causal in (False, True):
        exact = one_device([x.double() for x in tensors], pattern, causal, "sdpa")
        alone = one_device(tensors, pattern, causal, backend)
        for name, bounds in shardings(pattern, CHECKED, ranks, causal):
            mail: dict[tuple[str, int, int], Tensor] = {}
            shares = [
                Share(tensors, pattern, bounds, rank, causal, backend, Post(rank, mail))
                for rank in range(len(bounds) - 1)
            ]
            for _ in range(3):  # rows of the first pass arrive in the second, and their gradients in the third
                parts = [share() for share in shares]
            for what, one, want, *mine in zip(("out", "dq", "dk", "dv"), alone, exact, *parts, strict=True):
                error, bound = relative_norm(torch.cat(mine, 1), want), 2 * relative_norm(one, want)
                if not error <= bound:
                    red.append(f"{name}{', causal' * causal}: {what} is off by {error:.1e}, expected {bound:.1e}")
    return red


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
    refuse(check(options.ranks, heads, width, device, dtype, backend))
    n = 2**20 // shrink
    lengths = tuple(w // shrink for w in LENGTHS)
    pattern = DilatedPattern(lengths, RATES, heads)
    tensors = inputs(n, heads, width, device, dtype)
    announce()
    print(f"{dtype}, B=1 H={heads} D={width}, N={n}, w={lengths}, r={RATES}")

    rows = []
    for causal in (False, True):
        alone = median(partial(one_device, tensors, pattern, causal, backend), device, options.rounds)
        print(f"one device{', causal' * causal}, forward+backward: {alone * 1e3:.1f} ms")
        for name, bounds in shardings(pattern, n, options.ranks, causal):
            shares = [
                median(Share(tensors, pattern, bounds, rank, causal, backend, Still()), device, options.rounds)
                for rank in range(len(bounds) - 1)
            ]
            times = ", ".join(f"{x * 1e3:.1f}" for x in shares)
            bound = alone / max(shares)
            print(f"  {name}: {times} ms; at most {bound:.2f}x one device", flush=True)
            case = f"{name}{', causal' * causal}"
            rows.append({"case": case, "one_ms": alone * 1e3, "rank_ms": [x * 1e3 for x in shares], "at_most": bound})
    said = f"all shares together against fp64 at {CHECKED:,} positions, within twice one device's own error"
    write(options.out, "ring_shares", rows, check=said)


if __name__ == "__main__":
    main()
