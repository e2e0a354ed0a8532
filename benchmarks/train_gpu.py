"""Training against its plan: tokens per second, MFU, memory, what a save costs, and what building 1B parameters takes.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_gpu.py           # two GPUs, a few minutes
    torchrun --standalone --nproc-per-node 2 benchmarks/train_gpu.py --smoke   # CPU, gloo, seconds

The library's own trainer: 350M parameters on contexts of 131,072 tokens, one sequence over all ranks, FSDP2. Printed
are the measured peak of every rank beside that of `dilated-attention plan --model`; the steps while a state is written
beside the others; and the time and memory in which a model of a billion parameters is built, each rank its own share.

Correctness comes first, as in benchmarks/million.py; and the state that was written behind the steps is read again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from million import SMOKE, check, peaks

from dilated_attention_pytorch.cli.model_cost import ModelCost
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.training import Corpus, TrainConfig, Trainer, build_corpus, distributed, state
from dilated_attention_pytorch.training.distributed import World, join
from dilated_attention_pytorch.training.metrics import peak_flops, peak_memory

TRAINED = TrainConfig(
    d_model=1024, nhead=16, num_layers=28, dim_feedforward=4096, segment_lengths=(2048, 16384, 131072),
    dilation_rates=(1, 4, 16), context=1 << 17, batch_size=1, steps=16, learning_rate=3e-4, warmup_steps=4,
    gradient_checkpointing=True, eval_excerpts=1, eval_every=16, log_every=1, checkpoint_every=8, precision="bf16",
)  # fmt: skip
BUILT = replace(TRAINED, d_model=2048, num_layers=20, dim_feedforward=8192)  # 1.0B parameters
SAID = "the gradient of two layers against fp64, as benchmarks/million.py; the last state, read again, is the model's"
WARM = 3


class Clock:
    """Keeps the time of each step, and what the trainer logs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends, self.losses = device, list[float](), list[float]()

    def __call__(self, step: int, lines: list[dict[str, Any]]) -> None:
        self.ends.append(self.now())
        self.losses += [line["loss"] for line in lines if "loss" in line]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train(config: TrainConfig, corpus: Corpus, folder: Path, world: World) -> dict[str, Any]:
    """A run with two states on disk: its speed, memory beside the plan, and what a state cost the steps."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    clock = Clock(world.device)
    trainer = Trainer(config, corpus, folder, world=world, restart=True)
    held, written, begin = list[float](), list[tuple[float, float]](), trainer.checkpoints.save

    def save(*arguments: Any) -> None:
        start = time.perf_counter()
        begin(*arguments)
        held.append(time.perf_counter() - start)
        flying = trainer.checkpoints._flying
        assert flying is not None
        flying.add_done_callback(lambda _: written.append((start, time.perf_counter())))

    trainer.checkpoints.save = save  # type: ignore[method-assign]
    clock.ends.append(clock.now())
    trainer.run(clock)
    memory, cost = peaks(world), ModelCost(config, world.size)
    tensors = state.tensors(trainer.model, trainer.optimizer)
    kept = {name: distributed.complete(x).clone() for name, x in tensors.items() if name.startswith("model.")}
    trainer.checkpoints = type(trainer.checkpoints)(folder, world)
    trainer.checkpoints.load(config.steps, tensors)
    same = all(torch.equal(distributed.complete(x), kept[name]) for name, x in tensors.items() if name in kept)
    common.refuse([] if same else ["the state that was read is not the model's"])
    if not world.is_main:
        return {}
    steps = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][WARM:]
    starts = clock.ends[WARM:-1]
    first, last = written[0]
    beside = [t for start, t in zip(starts, steps, strict=True) if start < last and start + t > first]
    alone = [t for start, t in zip(starts, steps, strict=True) if start > last or start + t < first]
    second = statistics.median(alone or steps)  # the first save pins host memory
    peak = peak_flops(world.device)
    return {
        "case": f"{cost.parameters / 1e6:.0f}M parameters, {config.context} tokens, {world.size} ranks",
        "tokens_per_s": config.batch_size * config.context / second,
        "mfu": cost.flops / second / world.size / peak if peak else None,
        "peak_gib": memory, "planned_gib": cost.peak() / 2**30, "step_s": second,
        "step_beside_a_save_s": statistics.median(beside or steps), "saves_held_the_steps_s": held,
        "save_took_s": last - first, "losses": [clock.losses[0], clock.losses[-1]],
    }  # fmt: skip


def build(config: TrainConfig, world: World) -> dict[str, Any]:
    """A model made on the meta device, sharded, and filled with its first weights."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    host, start = peak_memory(torch.device("cpu")) or 0, time.perf_counter()
    model = LongNetLM(config.model_config(), device="meta")
    layout = distributed.arrange(world, 1, sharded=True)
    if layout.mesh is not None:
        distributed.shard_model(model, layout.mesh, half=torch.bfloat16)
    model.to_empty(device=world.device)
    meta = time.perf_counter() - start
    distributed.first_weights(model, config.seed)
    seconds, memory = time.perf_counter() - start, peaks(world)
    host = (peak_memory(torch.device("cpu")) or 0) - host
    count = sum(p.numel() for p in model.parameters())
    return {
        "case": f"build {count / 1e9:.2f}B parameters", "seconds": seconds, "without_weights_s": meta,
        "peak_gib": memory, "share_gib": 4 * count / world.size / 2**30, "host_gib_more": host / 2**30,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small models on the CPU")
    parser.add_argument("--context", type=int, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, help="of the trained model")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args()
    trained, built = TRAINED, BUILT
    if options.smoke:
        torch.set_num_threads(1)
        trained = replace(SMOKE, steps=16, eval_every=16, checkpoint_every=8)
        built = replace(trained, num_layers=4)
    changes = {"context": options.context, "num_layers": options.layers}
    trained = replace(trained, **{name: value for name, value in changes.items() if value})
    with common.scratch() as scratch, join("cpu" if options.smoke else "cuda") as world:
        common.refuse(check(world))
        trained = replace(trained, context_parallel=world.size)
        corpus = world.first(build_corpus) or build_corpus()  # rank 0 builds it, the others find it
        rows = [build(built, world), train(trained, corpus, scratch / "run", world)]
        if world.is_main:
            common.announce()
            for row in rows:
                for name, value in row.items():
                    shown = f"{value:,.4g}" if isinstance(value, float) else value
                    print(f"{name:>24}  {shown}", flush=True)
            common.write(options.out, "train_gpu", rows, check=SAID)


if __name__ == "__main__":
    main()
