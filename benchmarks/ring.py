"""Ring attention over the GPUs of one host: scaling, the exchange alone, how much of it is hidden.

    torchrun --standalone --nproc-per-node 4 benchmarks/ring.py                  # H100s, NCCL, bf16, H=12, D=64
    torchrun --standalone --nproc-per-node 4 benchmarks/ring.py --high-priority  # NCCL on a high-priority stream
    torchrun --standalone --nproc-per-node 2 benchmarks/ring.py --smoke          # CPU, gloo, seconds

Every ratio compares two things timed in turn, round by round, in this one run. One device's time is rank 0's with the
others idle; a ring's is the slowest rank's. Correctness comes first: the ring against fp64 at a small size, with twice
one device's own error as the bound; then the ring against one device at the timed size. A red check prints no number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDilatedAttention, counting, remote
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
from dilated_attention_pytorch.ring_attention.plan import RingPlan, closed_form_units, equal_bounds, unit_bytes
from dilated_attention_pytorch.ring_attention.utils.communication import Channel, priority_group
from dilated_attention_pytorch.testing import relative_norm

LOCAL = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
REMOTE = ((2048, 32768, 524288, 1048576), (1, 2, 8, 16))
MILLION = 1 << 20
CHECKED = 2048  # positions of the check against fp64


class Bench:
    """The settings of a run and the group it runs on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.smoke = options, options.smoke
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cpu") if self.smoke else torch.device("cuda", local)
        if self.smoke:
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
        else:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device)
        self.world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        self.group = priority_group(self.world) if options.high_priority else self.world
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.heads, self.width = (2, 16) if self.smoke else (12, 64)
        self.dtype = torch.float32 if self.smoke else torch.bfloat16
        self.shrink = 1024 if self.smoke else 1  # every length is divided by it
        self.rounds = 3 if self.smoke else options.rounds
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def measured(self, case: str, text: str, **numbers: Any) -> None:
        """A line of the table: printed by rank 0, kept for the file."""
        self.say(f"{case}: {text}")
        self.rows.append({"case": case, **numbers})

    def pattern(self, branches: tuple[tuple[int, ...], tuple[int, ...]], shrink: int) -> dict[str, Any]:
        return {"segment_lengths": [max(1, w // shrink) for w in branches[0]], "dilation_rates": list(branches[1])}

    def ring(self, pattern: dict[str, Any], **more: Any) -> RingDilatedAttention:
        wire = {"input": self.dtype, "fp32": None}[self.options.gradient_dtype]
        settings = {"mode": self.options.mode, "backend": self.options.backend, "gradient_dtype": wire, **more}
        return RingDilatedAttention(RingAttentionConfig(**pattern, timeout=120, **settings), self.group)

    def inputs(self, n: int, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """q, k, v and a cotangent, the same on every rank for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (1, n, self.heads, self.width)
        drawn = [torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32) for _ in range(4)]
        return [x.to(self.dtype).to(dtype or self.dtype) for x in drawn]

    def sync(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], *, alone: bool = False) -> float:
        """Seconds of one run: the slowest rank's, or rank 0's while the others wait."""
        self.sync()
        dist.barrier()
        start = time.perf_counter()
        if not alone or self.rank == 0:
            run()
            self.sync()
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
        if alone:
            dist.broadcast(elapsed, 0)
        else:
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return float(elapsed)

    def compare(self, one: Callable[[], object], many: Callable[[], object]) -> tuple[float, float, float]:
        """Median seconds of one device, of the ring, and the median of the rounds' ratios."""
        for _ in range(2):  # compiles, tunes, plans
            self.seconds(one, alone=True), self.seconds(many)
        pairs = [(self.seconds(one, alone=True), self.seconds(many)) for _ in range(self.rounds)]
        a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
        return a, b, statistics.median(x / y for x, y in pairs)

    def fail_together(self, red: str) -> None:
        """Stops every rank if one of them is red."""
        flag = torch.tensor(int(bool(red)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if red:
            print(f"rank {self.rank}: {red}; no timing is printed", file=sys.stderr, flush=True)
        if int(flag):
            dist.destroy_process_group()
            sys.exit(1)


def train(call: Callable[..., Tensor], tensors: list[Tensor], is_causal: bool) -> list[Tensor]:
    """Out and gradients of one forward and backward."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = call(q, k, v, is_causal=is_causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def check_small(bench: Bench, causal: bool) -> dict[str, float]:
    """The ring against fp64, with twice one device's error as the bound; gives that error."""
    shrink = REMOTE[0][-1] // CHECKED
    pattern = bench.pattern(REMOTE, shrink) | {"dilation_rates": [1, 2, 4, 8]}
    bounds = equal_bounds(CHECKED, bench.size)
    rows = slice(bounds[bench.rank], bounds[bench.rank + 1])
    exact = train(_plain(pattern, "sdpa"), bench.inputs(CHECKED, 1, torch.float64), causal)
    alone = train(_plain(pattern, bench.options.backend), bench.inputs(CHECKED, 1), causal)
    own = [x[:, rows] for x in bench.inputs(CHECKED, 1)]
    red, errors = "", {}
    for mode in ("sparse", "ring", "gather"):
        got = train(bench.ring(pattern, mode=mode), own, causal)
        for name, ours, one, want in zip(("out", "dq", "dk", "dv"), got, alone, exact, strict=True):
            errors[name] = relative_norm(one, want)
            # A shard's share of one device's error: relative norms of parts vary around the whole's.
            bound = 2 * max(errors[name], relative_norm(one[:, rows], want[:, rows]))
            error = relative_norm(ours, want[:, rows])
            if not error <= bound:
                red += f"{mode}, causal={causal}: {name} is off by {error:.1e}, one device by {errors[name]:.1e}. "
    bench.fail_together(red)
    return errors


def _plain(pattern: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v, is_causal: dilated_attention(q, k, v, is_causal=is_causal, backend=backend, **pattern)


def all_local(bench: Bench) -> None:
    n = MILLION // bench.shrink
    pattern = bench.pattern(LOCAL, bench.shrink)
    tensors = bench.inputs(n, 2 + bench.rank)
    ring, plain = bench.ring(pattern), _plain(pattern, bench.options.backend)
    for causal in (False, True):
        one, many, ratio = bench.compare(
            lambda c=causal: train(plain, tensors, c), lambda c=causal: train(ring, tensors, c)
        )
        bench.measured(
            f"all local, {bench.size} x {n} tokens, forward+backward{', causal' * causal}",
            f"one device {one * 1e3:.1f} ms, ring {many * 1e3:.1f} ms, {ratio * bench.size:.2f}x its rate",
            one_ms=one * 1e3,
            ring_ms=many * 1e3,
            rate=ratio * bench.size,
        )


def two_remote(bench: Bench, errors: dict[bool, dict[str, float]]) -> None:
    n = MILLION // bench.shrink
    pattern = bench.pattern(REMOTE, bench.shrink)
    keys = DilatedPattern(tuple(pattern["segment_lengths"]), tuple(pattern["dilation_rates"]), bench.heads)
    equal, balanced = equal_bounds(n, bench.size), balanced_bounds(keys, n, bench.size)
    whole = bench.inputs(n, 2)
    ring, plain = bench.ring(pattern), _plain(pattern, bench.options.backend)
    for causal, kind, bounds in ((False, "", equal), (True, ", causal", equal), (True, ", causal, balanced", balanced)):
        rows = slice(bounds[bench.rank], bounds[bench.rank + 1])
        own = [x[:, rows].contiguous() for x in whole]
        if not bench.options.no_large_check:
            alone, got, red = train(plain, whole, causal), train(ring, own, causal), ""
            for name, ours, one in zip(("out", "dq", "dk", "dv"), got, alone, strict=True):
                apart = relative_norm(ours, one[:, rows])
                # One device errs by e, the ring by 2e at most: they are 3e apart at most.
                if not apart <= 3 * errors[causal][name]:
                    red += f"{n} tokens, causal={causal}: {name} is {apart:.1e} from one device's. "
            del alone, got
            bench.fail_together(red)
        with counting() as traffic:
            train(ring, own, causal)
        moved = {name: f"{size / 2**20:.3f}" for name, size in traffic.received.items()}
        one, many, ratio = bench.compare(
            lambda c=causal: train(plain, whole, c), lambda c=causal, own=own: train(ring, own, c)
        )
        bench.measured(
            f"two remote branches, {n} tokens, forward+backward{kind}",
            f"one device {one * 1e3:.1f} ms, ring {many * 1e3:.1f} ms, {ratio:.2f}x; rank 0 received MiB {moved}",
            one_ms=one * 1e3,
            ring_ms=many * 1e3,
            ratio=ratio,
            received_bytes=dict(traffic.received),
        )
        hidden_share(bench, lambda c=causal, own=own: train(ring, own, c), kind)


def exchange_alone(bench: Bench) -> None:
    """Packing, moving and nothing else, against gathering dense K and V."""
    n = MILLION // bench.shrink
    pattern = bench.pattern(REMOTE, bench.shrink)
    keys = DilatedPattern(tuple(pattern["segment_lengths"]), tuple(pattern["dilation_rates"]), bench.heads)
    plan = RingPlan(keys, equal_bounds(n, bench.size), bench.rank, False, bench.device)
    start, stop = plan.shard
    _, k, v, _ = (x[:, start:stop].contiguous() for x in bench.inputs(n, 2))
    channel = Channel(bench.group, 120, "benchmark")
    index = tuple(torch.cat([plan.leaving_index[p][i] for p in plan.peers]) for i in (0, 1))
    counts = [
        [table[p].count if p in table else 0 for p in range(bench.size)] for table in (plan.leaving, plan.arriving)
    ]
    dense = k.new_empty((2, bench.size, *k.shape))

    def sparse() -> None:
        exchange = channel.exchange(remote.pack(k, v, index), *counts, "rows")  # type: ignore[arg-type]
        exchange.wait()
        exchange.release()

    def gather() -> None:
        for i, x in enumerate((k, v)):
            dist.all_gather_into_tensor(dense[i].view(bench.size * k.shape[0], *k.shape[1:]), x, group=bench.group)

    for _ in range(3):
        bench.seconds(sparse), bench.seconds(gather)
    pairs = [(bench.seconds(gather), bench.seconds(sparse)) for _ in range(5 * bench.rounds)]
    slow, fast = (statistics.median(x) for x in zip(*pairs, strict=True))
    per_unit = unit_bytes(1, bench.width, k.element_size())
    units = closed_form_units(keys, n, bench.size)
    closed = "does not apply" if units is None else f"{units * per_unit / 2**20:.3f} MiB"
    bench.measured(
        "exchange alone",
        f"{plan.received_bytes(1, bench.width, k.element_size()) / 2**20:.3f} MiB received "
        f"(closed form {closed}) in {fast * 1e3:.3f} ms with packing; dense K and V, "
        f"{2 * (bench.size - 1) * k.numel() * k.element_size() / 2**20:.1f} MiB, in {slow * 1e3:.3f} ms: "
        f"{statistics.median(a / b for a, b in pairs):.1f}x shorter",
        received_bytes=plan.received_bytes(1, bench.width, k.element_size()),
        sparse_ms=fast * 1e3,
        dense_ms=slow * 1e3,
        ratio=statistics.median(a / b for a, b in pairs),
    )


def hidden_share(bench: Bench, run: Callable[[], object], kind: str) -> None:
    """How much of the time of NCCL's kernels other kernels run too, on each rank."""
    if bench.smoke:
        return
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        bench.sync()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    busy, total, covered = _joined(spans[False]), 0.0, 0.0
    for start, end in _joined(spans[True]):
        total += end - start
        covered += sum(max(0.0, min(end, b) - max(start, a)) for a, b in busy)
    shares = [torch.zeros(2, device=bench.device) for _ in range(bench.size)]
    dist.all_gather(shares, torch.tensor([total / 1e3, covered / max(total, 1e-9)], device=bench.device))
    text = ", ".join(f"rank {i}: {float(s[0]):.2f} ms, {float(s[1]):.0%} hidden" for i, s in enumerate(shares))
    bench.say(f"  exchange kernels (waiting for peers included){kind}: {text}")


def _joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def world_size_one(bench: Bench) -> None:
    n = MILLION // bench.shrink
    pattern = bench.pattern(LOCAL, bench.shrink)
    config = RingAttentionConfig(**pattern, backend=bench.options.backend)
    tensors = bench.inputs(n, 2)
    plain, ring = _plain(pattern, bench.options.backend), RingDilatedAttention(config)
    for _ in range(2):
        train(plain, tensors, False), train(ring, tensors, False)
    pairs = []
    for _ in range(2 * bench.rounds):
        first = bench.seconds(lambda: train(plain, tensors, False), alone=True)
        pairs.append((first, bench.seconds(lambda: train(ring, tensors, False), alone=True)))
    ratio = statistics.median(b / a for a, b in pairs)
    bench.measured("world size 1", f"{ratio - 1:+.1%} over the plain op", ratio=ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="CPU and gloo, a thousandth of the size")
    parser.add_argument("--mode", default="sparse", choices=["sparse", "ring", "gather", "auto"])
    parser.add_argument("--backend", default="auto", choices=["auto", "sdpa", "triton"])
    parser.add_argument("--gradient-dtype", default="fp32", choices=["fp32", "input"])
    parser.add_argument("--high-priority", action="store_true", help="a twin of the group on a high-priority stream")
    parser.add_argument("--no-large-check", action="store_true", help="skip the comparison at the timed size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=["local", "remote", "exchange", "one"])
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    bench = Bench(parser.parse_args())
    errors = {causal: check_small(bench, causal) for causal in (False, True)}
    if bench.rank == 0:
        common.announce()
    bench.say(
        f"{bench.size} ranks, {bench.dtype}, B=1 H={bench.heads} D={bench.width}, "
        f"mode={bench.options.mode}, backend={bench.options.backend}, "
        f"gradients travel in {bench.options.gradient_dtype}"
        f"{', high-priority stream' * bench.options.high_priority}"
    )
    parts: dict[str, Callable[[], None]] = {
        "local": lambda: all_local(bench),
        "remote": lambda: two_remote(bench, errors),
        "exchange": lambda: exchange_alone(bench),
        "one": lambda: world_size_one(bench),
    }
    for name in bench.options.only or parts:
        parts[name]()
    if bench.rank == 0:
        said = "each mode against fp64 within twice one device's own error; then against one device at the timed size"
        common.write(bench.options.out, "ring", bench.rows, check=said)
    dist.barrier()  # rank 0 still writes: no rank takes the group down under another
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
