"""The slide encoder at full size (12 layers, 768 wide, random weights): one command for CPU and GPU.

    python benchmarks/slides.py [--out benchmarks/results] [--tiles 10000 45680 70000] [--seconds 200]

Correctness comes first; where it fails nothing is timed. On a CPU: how long it takes to encode 10,000 tiles and what
memory that adds, what building and loading cost, and how much a fine-tuning step keeps for its backward; with `--batch`
three slides in a batch against each alone, which takes six times as long. On a CUDA device: that batch, inference and a
fine-tuning step in bf16 for each number of tiles, with Triton and beside it with torch's own attention (`sdpa`).

Inference runs a model whose weights are bf16. Fine-tuning keeps weights and AdamW's moments in fp32 and computes under
autocast, with the official dropout 0.25 and stochastic depth 0.1; the step is forward, backward, update, without
gradient checkpointing unless the line says so. Milliseconds are medians; memory is the peak of what PyTorch has
allocated, weights, moments and tiles included.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from torch import Tensor

from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.testing import peak_bytes, relative_norm
from dilated_attention_pytorch.types import QKV

LARGEST = 45_680  # tiles of the slide whose fine-tuning takes 39.7 GiB in the official code
LIMIT_GIB = 20.0
GIB = 2**30
CHECK = {
    "cpu": "two layers against the reference in fp64 at 1,069 tiles, both padding modes",
    "cuda": "Triton and sdpa in bf16 against fp32 at 5,792 tiles: output and gradients",
}


def slide(n: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """n tiles of a round piece of tissue, in raster order."""
    generator = torch.Generator().manual_seed(n)
    side = int((n * 1.6) ** 0.5) + 2
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = (x - side / 2) ** 2 + (y - side / 2) ** 2
    inside = distance.flatten().argsort()[:n].sort().values
    coords = 256 * torch.stack((x.flatten()[inside], y.flatten()[inside]), -1)
    tiles = torch.randn(1, n, 1536, generator=generator)
    return tiles.to(device, dtype), coords[None].to(device)


def encoder(**options: Any) -> SlideEncoder:
    torch.manual_seed(0)
    return SlideEncoder(**options)


def check_cpu() -> None:
    """Two layers against the reference in fp64, at the demo slide's length, in both padding modes."""
    for padding in ("none", "zero_keys"):
        sizes = {"in_chans": 1536, "embed_dim": 64, "depth": 2, "num_heads": 16, "ffn_dim": 64, "padding": padding}
        ours = encoder(**sizes).eval()
        truth = encoder(**sizes, backend="reference", dtype=torch.float64).eval()
        truth.load_state_dict({name: x.double() for name, x in ours.state_dict().items()})
        tiles, coords = slide(1069)
        with torch.inference_mode():
            error = relative_norm(ours(tiles, coords).tiles, truth(tiles.double(), coords).tiles)
        if not error < 1e-5:
            sys.exit(f"padding={padding!r} is wrong (relative norm {error:.1e}); nothing is timed")


def encode_cpu(n: int) -> dict[str, Any]:
    """Seconds and the memory that one slide adds, and what the process holds at its highest."""
    model = encoder(padding="zero_keys").eval()
    tiles, coords = slide(n)
    seconds: list[float] = []

    def run() -> object:
        start, busy = time.perf_counter(), time.process_time()
        out = model(tiles, coords).pooled
        seconds.extend((time.perf_counter() - start, time.process_time() - busy))
        return out

    with torch.inference_mode():
        model(tiles[:, :1000], coords[:, :1000])
        peak = peak_bytes(run)
    status = Path("/proc/self/status").read_text().splitlines()
    whole = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return {
        "tiles": n,
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
        "added_gib": peak / GIB,
        "process_gib": whole / GIB,
    }


def build_and_load() -> dict[str, Any]:
    """Building at random and loading a checkpoint, each in a process of its own, the import left out of the seconds."""
    script = (
        "import sys, time, torch; from dilated_attention_pytorch.models import SlideEncoder\n"
        "start, busy = time.perf_counter(), time.process_time()\n"
        "if sys.argv[1] == 'build': torch.save({'model': SlideEncoder().state_dict()}, sys.argv[2])\n"
        "else: SlideEncoder.from_pretrained(sys.argv[2])\n"
        "seconds, busy = time.perf_counter() - start, time.process_time() - busy\n"
        "status = open('/proc/self/status').read().splitlines()\n"
        "print(seconds, busy, next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in ("build", "load"):
            command = [sys.executable, "-c", script, step, f"{folder}/slide.pth"]
            printed = subprocess.run(command, capture_output=True, text=True)
            if printed.returncode:
                sys.exit(printed.stderr)
            seconds, busy, kib = printed.stdout.split()
            found |= {f"{step}_seconds": float(seconds), f"{step}_cpu_seconds": float(busy)}
            found[f"{step}_process_gib"] = int(kib) * 1024 / GIB
    return found


def batch(device: str, lengths: tuple[int, ...] = (1069, 4002, 9731)) -> dict[str, float]:
    """The largest relative norm between a slide in a padded batch and the same slide alone, full size, fp32."""
    slides = [slide(n, device) for n in lengths]
    shape = (len(lengths), max(lengths))
    tiles = torch.zeros(*shape, 1536, device=device)
    coords, mask = torch.zeros(*shape, 2, dtype=torch.int64, device=device), torch.zeros(shape, dtype=torch.bool)
    mask = mask.to(device)
    for b, (some, at) in enumerate(slides):
        tiles[b, : lengths[b]], coords[b, : lengths[b]], mask[b, : lengths[b]] = some[0], at[0], True
    found = {}
    with torch.inference_mode():
        for padding in ("none", "zero_keys"):
            model = encoder(padding=padding, device=device).eval()
            together = model(tiles, coords, mask)
            errors = []
            for b, (some, at) in enumerate(slides):
                alone = model(some, at)
                errors.append(relative_norm(together.pooled[b], alone.pooled[0]))
                errors.append(relative_norm(together.tiles[b, : lengths[b]], alone.tiles[0]))
            found[padding] = max(errors)
            del model, together
    return found


def compared_batch(device: str) -> dict[str, float]:
    found = batch(device)
    for padding, error in found.items():
        print(f"a batch of 1,069, 4,002 and 9,731 tiles against each alone, {padding}, fp32: {error:.1e}")
    return found


def kept_bytes(depth: int, n: int, autocast: bool) -> int:
    """What a fine-tuning forward keeps for its backward, each storage once, weights and tiles left out."""
    model = encoder(depth=depth).train() if autocast else encoder(depth=depth, dtype=torch.bfloat16).train()
    tiles, coords = slide(n)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        pooled = model(tiles, coords).pooled
    total = sum(storage.nbytes() for storage in kept.values())
    del pooled
    return total


def kept_per_token(autocast: bool) -> dict[str, float]:
    """Bytes a token and layer, and outside of the layers; differences take out what does not grow with the tiles."""
    few, many = 128, 640
    one, two = ([kept_bytes(depth, n, autocast) for n in (few, many)] for depth in (1, 2))
    layer = (two[1] - one[1] - two[0] + one[0]) / (many - few)
    outside = (one[1] - one[0]) / (many - few) - layer
    return {"layer": layer, "outside": outside, "at_45680_gib": (12 * layer + outside) * (LARGEST + 1) / GIB}


def cpu(n: int, with_batch: bool) -> list[dict[str, Any]]:
    check_cpu()
    print(f"checked; CPU, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    load = os.getloadavg()[0]
    print(f"load of the machine before: {load:.1f}; on a busy one CPU seconds tell more than seconds", flush=True)
    row = {"load_before": load, **encode_cpu(n)}
    rows: dict[str, Any] = {f"encode {n:,} tiles": row}
    print(
        f"encoding {n:,} tiles: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} of CPU time), {row['added_gib']:.2f} "
        f"GiB added, the process {row['process_gib']:.2f} GiB at its highest",
        flush=True,
    )
    rows["build and load"] = row = build_and_load()
    for step in ("build", "load"):
        print(
            f"{step}: {row[f'{step}_seconds']:.2f} s ({row[f'{step}_cpu_seconds']:.2f} of CPU time), the process "
            f"{row[f'{step}_process_gib']:.2f} GiB at its highest",
            flush=True,
        )
    for name, autocast in (("fp32 weights under autocast", True), ("bf16 weights", False)):
        rows[f"kept, {name}"] = row = kept_per_token(autocast)
        print(
            f"kept for the backward in bf16, {name}: {row['layer']:,.0f} bytes a token and layer, "
            f"{row['outside']:,.0f} a token outside of them: {row['at_45680_gib']:.1f} GiB at {LARGEST:,} tiles"
        )
    if with_batch:
        rows["batch against each alone"] = compared_batch("cpu")
    return [{"case": case, **row} for case, row in rows.items()]


def finetune_step(model: SlideEncoder, tiles: Tensor, coords: Tensor) -> Callable[[], None]:
    head = torch.nn.Linear(768, 2, device="cuda")
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-5, fused=True)
    target = torch.ones(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = head(model(tiles, coords).pooled)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_gpu(n: int = 5792) -> list[str]:
    """Outputs and gradients at 5,792 tiles against fp32: Triton may err twice what torch's attention does in bf16."""
    tiles, coords = slide(n, "cuda")
    results = {}
    for name, backend in (("truth", "sdpa"), ("sdpa", "sdpa"), ("triton", "triton")):
        model = encoder(padding="zero_keys", backend=backend, device="cuda", dropout=0.0, drop_path=0.0).eval()
        with torch.autocast("cuda", torch.bfloat16, enabled=name != "truth"):
            out = model(tiles, coords)
        out.pooled.float().square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[name] = {"pooled": out.pooled.detach(), "tiles": out.tiles.detach(), "gradients": grads}
        del model, out
    failures = []
    for part, want in results["truth"].items():
        error, base = (relative_norm(results[who][part], want) for who in ("triton", "sdpa"))
        print(f"check, {part}: Triton {error:.1e} from fp32, sdpa {base:.1e}")
        if not error <= 2 * base:
            failures.append(f"{part}: {error:.1e}, twice sdpa's error is {2 * base:.1e}")
    return failures


def measured(run: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds and peak GiB."""
    run(), run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times), torch.cuda.max_memory_allocated() / GIB


def gpu_line(n: int, job: str, backend: Any, padding: Any = "zero_keys", checkpointing: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": f"{n:,} tiles, {job}{', checkpointing' * checkpointing}, {padding}, {backend}",
        "tiles": n,
        "job": job,
        "backend": backend,
        "padding": padding,
        "checkpointing": checkpointing,
    }
    try:
        torch.cuda.empty_cache()
        model = encoder(padding=padding, backend=backend, gradient_checkpointing=checkpointing, device="cuda")
        if job == "inference":
            model = model.bfloat16().eval()
            given = slide(n, "cuda", torch.bfloat16)

            def run() -> object:
                with torch.inference_mode():
                    return model(*given).pooled
        else:
            run = finetune_step(model.train(), *slide(n, "cuda", torch.bfloat16))
        row["ms"], row["peak_gib"] = measured(run)
        told = f"{row['ms']:9.1f} ms {row['peak_gib']:7.2f} GiB"
    except torch.OutOfMemoryError:
        told = "  out of memory"
    job += ", checkpointing" if checkpointing else ""
    print(f"{n:>7,} tiles  {job:<26} {padding:<10} {backend:<7} {told}", flush=True)
    return row


def gpu(numbers: list[int], seconds: float) -> tuple[list[dict[str, Any]], bool]:
    x = torch.empty(1, 1, 1, 48, device="cuda", dtype=torch.bfloat16)
    choice = choose_backend(QKV(x, x, x), one_segment(1, 1, 1, 1.0))
    if choice.backend != "triton":
        sys.exit(f"expected a device for the Triton backend: {choice.reason}")
    deadline = time.monotonic() + seconds
    if failures := check_gpu():
        sys.exit("wrong results, so nothing is timed:\n  " + "\n  ".join(failures))
    print(f"checked; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    # What the requirement is about comes first, then Triton, then what it stands beside.
    jobs: list[tuple[Any, ...]] = [(LARGEST, "fine-tuning", "triton")]
    jobs += [(n, job, "triton") for n in numbers for job in ("inference", "fine-tuning")]
    jobs += [(n, job, "sdpa") for n in numbers for job in ("inference", "fine-tuning")]
    jobs += [(LARGEST, "fine-tuning", "triton", "none")]
    jobs += [(n, "fine-tuning", "triton", "zero_keys", True) for n in numbers]
    rows, left_out = [], []
    for job in dict.fromkeys(jobs):
        if time.monotonic() > deadline:
            left_out.append(job)
            continue
        rows.append(gpu_line(*job))
    for job in left_out:
        print(f"left out, the time is spent: {job}")
    peak = rows[0].get("peak_gib", float("inf"))
    holds = peak < LIMIT_GIB
    print(
        f"{'holds' if holds else 'FAILS'}: fine-tuning {LARGEST:,} tiles in bf16 without checkpointing under "
        f"{LIMIT_GIB:.0f} GiB: {peak:.2f}"
    )
    return [*rows, {"case": "batch against each alone", **compared_batch("cuda")}], holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one, by default")
    parser.add_argument("--tiles", type=int, nargs="+", help="10000 45680 70000; one number on a CPU, 10000")
    parser.add_argument("--seconds", type=float, default=200.0, help="GPU: start no line after so long")
    parser.add_argument("--batch", action="store_true", help="CPU: the batch of three slides too")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    holds = True
    if device == "cuda":
        found, holds = gpu(arguments.tiles or [10_000, LARGEST, 70_000], arguments.seconds)
    else:
        numbers = arguments.tiles or [10_000]
        if len(numbers) != 1:
            sys.exit(f"expected one number of --tiles on a CPU, got {numbers}")
        found = cpu(numbers[0], arguments.batch)
    write(arguments.out, "slides", found, check=CHECK[device])
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    main()
