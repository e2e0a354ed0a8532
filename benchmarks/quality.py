"""Whether a longer context helps, and which pattern makes use of it: byte models trained from scratch on source code.

    python benchmarks/quality.py --folder runs/quality [--seconds 500] [--only TEXT ...] [--seeds 1] [--out FOLDER]
    python benchmarks/quality.py --folder runs/smoke --smoke       # CPU, seconds: tiny models, nothing to conclude

A run is a decoder of 25M parameters whose context grows, as is practised: 500 steps at 2,048, then 200 at the run's
own. A step is 131,072 bytes whatever the context, so all runs read as many. Runs of one attention and seed share their
first part, the start; shifted ones begin from the unshifted start, since a shift adds no weights. At 2,048, where
patterns differ little, only dense attention and fixed segments are run. Segments from 8,192 on begin from the dense
start, and are run where they are not dense. Weights are bf16, with masters in fp32. The
text is the installed packages' Python files in the order of their paths, one package after another; packages drawn by
their name's hash are for validation alone, and all runs are judged on the same bytes of them.

Reported per run: validation bits per byte, overall and by position. Bytes late in long windows are others than those
late in short ones, so a run's are also kept by their positions in windows of every other context: two runs compare on
the same bytes. And retrieval: lines of a name, one byte beyond ASCII, and four digits are planted in the training text
and asked for later, one in each kilobyte whatever the context; the share of digits that are likeliest, given those
before them, is reported by the distance of the line. Bytes per second, from the median step, and memory too.

A call works until `--seconds` have passed, and the next one goes on: finished runs are kept as JSON in the folder,
starts as files, what was interrupted as its last checkpoint. Two processes, each with a GPU, an `--only` and an `--out`
of its own, may share a folder: at worst both make the same start. The results of all finished runs go into one JSON
and one chart.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import statistics
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import quality_chart
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, LongNetLM, dilated_attention
from dilated_attention_pytorch.core.files import replace_file, replace_text

ATTENTIONS = ("dense", "fixed", "fixed+shift", "geometric", "geometric+shift", "geometric from 8,192")
FIXED = ((1024, 4096, 16384), (1, 4, 16))
DIGITS = 4  # of a planted value
ASKED_EVERY = 1024  # bytes of training text
SAID = "the op at 2,000 positions against the reference in fp64, within 2% in the models' precision; losses are finite"


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    step_bytes: int = 1 << 17
    start_steps: int = 500  # at the first context
    steps: int = 200  # after them, at a run's own
    learning_rate: float = 1e-3
    contexts: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    longest_dense: int = 32_768
    shortest_segment: int = 1024
    validation_bytes: int = 1 << 21
    corpus_bytes: int = 150 << 20
    probes: int = 32  # validation windows per distance
    device: str = "cuda"


SMOKE = Setup(32, 2, 2, 2048, 4, 4, 3e-3, (256, 1024), 1024, 64, 4096, 1 << 20, 2, "cpu")


@dataclass(frozen=True)
class Run:
    """One model."""

    attention: str
    context: int
    seed: int

    @property
    def name(self) -> str:
        """Its name in the folder and in the table."""
        return f"{self.attention.replace(' from 8,192', '8192')}-{self.context}-seed{self.seed}"

    @property
    def is_long(self) -> bool:
        """Whether its shortest segment is eight times as long, and so covers the start's context: it is dense there."""
        return self.attention.endswith("8,192")

    def steps(self, setup: Setup) -> range:
        """Its own, counted from the start's first."""
        return range(setup.start_steps, setup.start_steps + setup.steps)

    def start(self, setup: Setup) -> Start:
        """What it begins with."""
        family = "dense" if self.is_long else self.attention.removesuffix("+shift")
        return Start(family, setup.contexts[0], self.seed)

    def model(self, setup: Setup) -> LongNetLM:
        """The model at its start."""
        if self.attention == "dense":
            lengths, rates = (self.context,), (1,)
        elif self.attention.startswith("fixed"):
            lengths, rates = FIXED
        else:
            shortest = setup.shortest_segment * (8 if self.is_long else 1)
            pattern = DilatedPattern.geometric(self.context, shortest, num_heads=setup.heads)
            lengths, rates = pattern.segment_lengths, pattern.dilation_rates
        torch.manual_seed(self.seed)
        return LongNetLM(
            vocab_size=256, d_model=setup.width, nhead=setup.heads, num_decoder_layers=setup.layers,
            dim_feedforward=4 * setup.width, segment_lengths=lengths, dilation_rates=rates, activation="gelu",
            segment_shift="alternate" if self.attention.endswith("shift") else 0, device=setup.device,
            dtype=torch.bfloat16 if setup.device == "cuda" else torch.float32,
        )  # fmt: skip


class Start(Run):
    """The steps that all runs of one attention and seed share, at the first context."""

    @property
    def name(self) -> str:
        return f"start-{self.attention}-seed{self.seed}"

    def steps(self, setup: Setup) -> range:
        return range(setup.start_steps)


def runs(setup: Setup, seeds: int) -> Iterator[Run]:
    """All runs: one seed of everything first, the slowest last."""
    first, *longer = setup.contexts
    for seed in range(seeds):
        dense = [Run("dense", context, seed) for context in setup.contexts if context <= setup.longest_dense]
        yield from dense[:-1]
        yield Run("fixed", first, seed)
        others = [Run(name, context, seed) for context in longer for name in ATTENTIONS if name != "dense"]
        yield from (run for run in others if not run.is_long or run.context > 8 * setup.shortest_segment)
        yield from dense[-1:]


def corpus(setup: Setup) -> tuple[Tensor, Tensor, str]:
    """Training and validation bytes, uint8, and what identifies them."""
    train, validation = bytearray(), bytearray()
    paths = sysconfig.get_paths()
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if {"site-packages", "dist-packages"} & set(parts):  # the other root, within the standard library's folder
                continue
            held_back = zlib.crc32(parts[0].encode()) % 16 == 0
            target, most = (validation, setup.validation_bytes) if held_back else (train, setup.corpus_bytes)
            if len(target) < most:
                target += path.read_bytes() + b"\n"
    if len(validation) < setup.validation_bytes or len(train) <= max(setup.contexts):
        raise SystemExit(f"expected more text than {len(train):,} and {len(validation):,} bytes: install more packages")
    kept = [bytes(train), bytes(validation[: setup.validation_bytes])]
    name = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in kept)).hexdigest()[:16]
    return *(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in kept), name


def plant(window: bytearray, end: int, distance: int, name: int, drawn: random.Random) -> None:
    """Writes a line `distance` bytes before `end`, and the question with its answer right before `end`."""
    line = b"\n# %c%0*d" % (name, DIGITS, drawn.randrange(10**DIGITS))
    window[end - len(line) : end] = line
    window[end - distance : end - distance + len(line) + 1] = line + b"\n"


def plant_many(window: bytearray, drawn: random.Random) -> None:
    """A question at the end of each kilobyte, the last one being the window's end; one line in 100 is overwritten."""
    ends = range(len(window), ASKED_EVERY - 1, -ASKED_EVERY)
    names = itertools.cycle(drawn.sample(range(128, 256), 128))  # none twice in 128 KiB
    for end in ends:
        # Distances are even on a logarithmic scale, from 64 bytes to all that lies before; a place within a kilobyte's
        # last 64 bytes is moved before them, where no question stands.
        distance = int(64 * math.exp(math.log(end / 64) * drawn.random()))
        short = (len(window) - end + distance) % ASKED_EVERY
        plant(window, end, min(distance + max(0, 64 - short), end), next(names), drawn)


def batch(text: Tensor, run: Run, step: int, setup: Setup) -> Tensor:
    """The windows of one step, int64 `(B, context + 1)`: the same places for every attention of a context."""
    drawn = random.Random(1_000_003 * run.seed + step)
    windows = []
    for _ in range(max(1, setup.step_bytes // run.context)):
        start = drawn.randrange(len(text) - run.context - 1)
        window = bytearray(text[start : start + run.context + 1].numpy())
        plant_many(window, drawn)
        windows.append(torch.frombuffer(window, dtype=torch.uint8))
    return torch.stack(windows).to(setup.device).long()


def losses(model: LongNetLM, windows: Tensor) -> Tensor:
    """Nats of each byte, fp32 `(B, context)`; logits of long sequences exist a piece at a time."""
    found = []
    for part, targets in zip(
        model.hidden(windows[:, :-1]).split(16_384, 1), windows[:, 1:].split(16_384, 1), strict=True
    ):
        logits = model.logits(part).float()
        found.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
    return torch.cat(found, 1)


class Masters:
    """AdamW on fp32 copies of a model's weights, which it computes with in bf16."""

    def __init__(self, model: LongNetLM, learning_rate: float) -> None:
        self._weights = list(model.parameters())
        self.copies = [p.detach().float().clone() for p in self._weights]
        self.optimizer = torch.optim.AdamW(
            self.copies, learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=self.copies[0].is_cuda
        )

    def step(self, rate: float) -> None:
        """One step at a learning rate, from the model's gradients, which it takes away."""
        for p, copied in zip(self._weights, self.copies, strict=True):
            copied.grad, p.grad = None if p.grad is None else p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self.copies)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.copies, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self.copies, state["weights"])
            torch._foreach_copy_(self._weights, self.copies)


def rate(step: int, setup: Setup) -> float:
    """Warmed up, constant to the start's end, then linearly down to a tenth: one start serves runs of any length.

    Warmup, stable, decay: Hu et al. 2024, MiniCPM (arXiv 2404.06395), section 4.
    """
    decayed = max(0, step + 1 - setup.start_steps) / setup.steps
    return setup.learning_rate * min((step + 1) / max(1, setup.start_steps // 20), 1 - 0.9 * decayed)


def train(
    run: Run, setup: Setup, text: Tensor, folder: Path, deadline: float
) -> tuple[LongNetLM, list[float], float] | None:
    """The trained model, its seconds per step, its peak memory in GiB; None where the time ran out, with a checkpoint.

    The start is made first if need be.
    """
    start, checkpoint = folder / f"{run.start(setup).name}.pt", folder / f"{run.name}.part.pt"
    is_start = isinstance(run, Start)
    if not (is_start or start.exists()) and train(run.start(setup), setup, text, folder, deadline) is None:
        return None
    model = run.model(setup).train()
    masters = Masters(model, setup.learning_rate)
    first, times = 0, []
    if found := next((path for path in (checkpoint, start) if path.exists()), None):
        state = torch.load(found, map_location=setup.device, weights_only=True)
        masters.load_state_dict(state["masters"])
        first, times = state["step"], state["times"]
        del state

    def save(path: Path, step: int, times: list[float]) -> None:
        state = {"masters": masters.state_dict(), "step": step, "times": times}
        replace_file(path, lambda at: torch.save(state, at))

    on_gpu = setup.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(first, run.steps(setup).stop):
        if time.monotonic() > deadline:
            save(checkpoint, step, times)
            return None
        windows = batch(text, run, step, setup)
        began = time.perf_counter()
        loss = losses(model, windows).mean()
        loss.backward()
        masters.step(rate(step, setup))
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if step % 25 == 0 or step == run.steps(setup)[-1]:
            value = float(loss.detach())
            common.refuse([] if math.isfinite(value) else [f"{run.name}: the loss at step {step} is {value}"])
            print(f"  {run.name} step {step} bits per byte {value / math.log(2):.3f}", flush=True)
    if is_start:  # its own checkpoint stays: another process may be about to read it
        save(start, setup.start_steps, [])
    else:
        checkpoint.unlink(missing_ok=True)
    return model, times, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0


def by_position(bits: Tensor, context: int) -> dict[str, float]:
    """Means of the bytes' bits by their position in windows of a context, the last quarter apart."""
    means = bits[: len(bits) // context * context].view(-1, context).mean(0)
    edges = [0, *(1 << k for k in range(8, context.bit_length() - 1)), 3 * context // 4, context]
    return {f"{a}-{b}": float(means[a:b].mean()) for a, b in itertools.pairwise(edges)}


@torch.inference_mode()
def judge(model: LongNetLM, run: Run, text: Tensor, setup: Setup) -> dict[str, Any]:
    """Bits per byte overall and by position, and retrieval by distance, on validation text."""
    model.eval()
    windows = text[: len(text) // run.context * run.context].view(-1, run.context)
    # Every byte is judged once: the first of a window follows the last one of the window before.
    before = torch.cat((text[:1], windows[:-1, -1]))[:, None]
    windows = torch.cat((before, windows), 1).long()
    count = max(1, setup.step_bytes // run.context)
    found = [losses(model, part.to(setup.device)).flatten().cpu() for part in windows.split(count)]
    bits = torch.cat(found).double() / math.log(2)
    drawn = random.Random(7)
    retrieved = {}
    distance = 128
    while distance <= run.context:
        planted = []
        for _ in range(setup.probes):
            start = drawn.randrange(len(text) - run.context - 1)
            window = bytearray(text[start : start + run.context + 1].numpy())
            plant(window, len(window), distance, drawn.randrange(128, 256), drawn)
            planted.append(torch.frombuffer(window, dtype=torch.uint8))
        right = 0
        for part in torch.stack(planted).long().split(count):
            hidden = model.hidden(part[:, :-1].to(setup.device))[:, -DIGITS:]
            guessed = model.logits(hidden).argmax(-1).cpu()
            right += int((guessed == part[:, -DIGITS:]).sum())
        retrieved[str(distance)] = right / (setup.probes * DIGITS)
        distance *= 4
    positions = {str(context): by_position(bits, context) for context in setup.contexts}
    return {"bits_per_byte": float(bits.mean()), "by_position": positions, "retrieved": retrieved}


def failures(setup: Setup) -> list[str]:
    """The op in the models' precision against the reference in fp64."""
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2000, setup.heads, 64, generator=generator).to(setup.device, dtype) for _ in range(3))
    options: dict[str, Any] = {"segment_lengths": FIXED[0], "dilation_rates": FIXED[1], "is_causal": True}
    got = dilated_attention(q, k, v, **options).double()
    want = dilated_attention(q.double(), k.double(), v.double(), backend="reference", **options)
    error = float((got - want).norm() / want.norm())
    return [f"the op differs from fp64 by {error:.1e}"] if not error < 0.02 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of runs, finished and interrupted")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the chart")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name holds one of these texts")
    parser.add_argument("--seconds", type=float, default=500.0, help="stop training after so long")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each run after its start; 200 by default")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args()
    setup = SMOKE if arguments.smoke else Setup()
    setup = replace(setup, steps=arguments.steps or setup.steps)
    deadline = time.monotonic() + arguments.seconds
    common.refuse(failures(setup))
    common.announce()
    training, validation, name = corpus(setup)
    shared = json.dumps({**asdict(setup), "corpus": name}, sort_keys=True)
    print(f"{len(training):,} bytes to train on, {len(validation):,} for validation, fingerprint {name}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    marker = arguments.folder / "setup.json"
    if marker.exists() and marker.read_text(encoding="utf-8") != shared:
        raise SystemExit(f"expected a folder of runs with these settings and this text, got another's: {marker}")
    replace_text(marker, shared)
    missing = []
    for run in runs(setup, arguments.seeds):
        done = arguments.folder / f"{run.name}.json"
        if done.exists() or not any(text in run.name for text in arguments.only):
            continue
        if time.monotonic() > deadline:
            missing.append(run.name)
            continue
        trained = train(run, setup, training, arguments.folder, deadline)
        if trained is None:
            missing.append(run.name)
            continue
        model, times, peak = trained
        speed = max(run.context, setup.step_bytes) / statistics.median(times)
        row = {"case": run.name, **asdict(run), **judge(model, run, validation, setup), "bytes_per_second": speed}
        row |= {"peak_gib": peak, "start_steps": setup.start_steps, "steps": setup.steps}
        replace_text(done, json.dumps(row, indent=1) + "\n")
        print(f"{run.name}: {row['bits_per_byte']:.3f} bits per byte, {speed:,.0f} bytes/s, {peak:.1f} GiB", flush=True)
        del model, trained  # what the next run holds is measured
    finished = sorted(arguments.folder.glob("*-seed*.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in finished]
    path = common.write(arguments.out, "quality", rows, check=SAID) if rows else None
    if path is not None:
        title = f"{setup.start_steps} + {setup.steps} steps of {setup.step_bytes:,} bytes, text {name}"
        quality_chart.picture(rows, path.with_suffix(".png"), title)
    print(f"finished: {len(rows)}; not yet: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
