"""A language model of about 100M parameters on contexts of 1,048,576 tokens, each sequence spread over all GPUs.

    torchrun --standalone --nproc-per-node 4 benchmarks/million.py           # H100s: NCCL, bf16 autocast, 20 steps
    torchrun --standalone --nproc-per-node 2 benchmarks/million.py --smoke   # CPU, gloo, seconds

The library's own trainer on Python's standard library: FSDP2 and ring attention over all ranks, activations computed
again in the backward, AdamW. Prints loss, tokens per second and rank 0's peak memory per step, then every rank's peak.

Correctness comes first: a small model's gradient, sharded as in the run, is held to fp64 on one device, with twice
one device's own error as the bound. Fails, too, where the loss has not fallen.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.training import TrainConfig, Trainer, build_corpus, distributed, standard_library
from dilated_attention_pytorch.training.distributed import World, join
from dilated_attention_pytorch.training.metrics import peak_memory

MILLION = TrainConfig(
    d_model=768, nhead=12, num_layers=14, dim_feedforward=3072,
    segment_lengths=(2048, 32768, 524288, 1048576), dilation_rates=(1, 2, 8, 16), context=1 << 20, batch_size=1,
    steps=20, learning_rate=1e-3, warmup_steps=4, gradient_checkpointing=True,
    eval_excerpts=1, eval_every=20, log_every=1, checkpoint_every=20,
)  # fmt: skip
SMOKE = replace(
    MILLION, d_model=32, nhead=2, num_layers=2, dim_feedforward=64, segment_lengths=(64, 256, 1024),
    dilation_rates=(1, 2, 4), context=1024, learning_rate=1e-2,
)  # fmt: skip
CHECKED = replace(SMOKE, d_model=128)  # heads of 64, as in the run
SAID = (
    "the gradient of two layers at 1,024 tokens against fp64, within twice one device's own error; the loss has fallen"
)
WARM = 3  # steps that the rate leaves out: kernels are compiled, buffers grow


class Printer:
    """Prints a run on rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        config, numbers = trainer.config, sum(p.numel() for p in trainer.model.parameters())
        if trainer.world.is_main:
            print(f"{numbers / 1e6:.1f}M parameters, {config.context:,} tokens a step, {config.steps} steps")
            print(f"{'step':>4} {'loss':>8} {'grad norm':>9} {'tokens/s':>10} {'peak GiB':>8}", flush=True)

    def __call__(self, step: int, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self.print(line)

    def print(self, line: dict[str, Any]) -> None:
        if "val_bpb" in line:
            print(f"held-out: {line['val_loss']:.4f} nats a byte", flush=True)
            return
        self.losses.append(line["loss"])
        self.rates.append(line["tokens_per_s"])
        memory = (line["memory_bytes"] or 0) / 2**30
        print(
            f"{line['step']:>4} {line['loss']:8.4f} {line['grad_norm']:9.3f} {self.rates[-1]:10,.0f} {memory:8.2f}",
            flush=True,
        )


def peaks(world: World) -> list[float]:
    """Every rank's most memory so far, in GiB."""
    mine = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    mine[world.rank] = (peak_memory(world.device) or 0) / 2**30
    return world.sum(mine).tolist()


def gradient(model: LongNetLM, tokens: Tensor, layout: distributed.RankLayout) -> Tensor:
    """Of the mean loss over all tokens, whole on every rank; computed as a training step does."""
    inputs, labels, whole = layout.shard(tokens)
    dtype = model.embed_tokens.weight.dtype
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda and dtype == torch.float32):
        logits = model(inputs, **whole)
    share = (tokens.shape[1] - 1) / layout.context_size  # the mean over ranks is that over tokens
    (F.cross_entropy(logits[0].to(dtype), labels[0], reduction="sum") / share).backward()
    return torch.cat([distributed.complete(p.grad).flatten() for p in model.parameters() if p.grad is not None])


def check(world: World) -> list[str]:
    """Where the sharded model is off by more than twice one device's own error, in words; the same on every rank."""
    torch.manual_seed(0)
    model = LongNetLM(CHECKED.model_config(), gradient_checkpointing=True).to(world.device)
    tokens = torch.randint(256, (1, CHECKED.context + 1)).to(world.device)
    alone, layout = distributed.RankLayout(0, 1), distributed.arrange(world, world.size)
    exact = gradient(copy.deepcopy(model).double(), tokens, alone)
    bound = 2 * relative_norm(gradient(copy.deepcopy(model), tokens, alone), exact)
    if layout.mesh is not None:
        distributed.shard_model(model, layout.mesh)
    error = relative_norm(gradient(model, tokens, layout), exact)
    red = world.any(not error <= bound)
    return [f"rank {world.rank}: the gradient is off by {error:.1e}, expected {bound:.1e}"] if red else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains on contexts of a million tokens; run under torchrun.")
    parser.add_argument("--smoke", action="store_true", help="a small model on the CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, help="tokens of a sequence, for a smaller machine")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--run", type=Path, help="folder of the run; by default one that is removed at the end")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args()
    if options.smoke:
        torch.set_num_threads(1)
    base = SMOKE if options.smoke else MILLION
    with common.scratch() as scratch, join("cpu" if options.smoke else "cuda") as world:
        common.refuse(check(world))
        config = replace(
            base,
            context_parallel=world.size,
            steps=options.steps,
            warmup_steps=min(base.warmup_steps, options.steps - 1),
            context=options.context or base.context,
            num_layers=options.layers or base.num_layers,
        )
        # Rank 0 builds the corpus, the others find it.
        corpus = world.first(build_corpus) or build_corpus()
        if world.is_main:
            common.announce()
            print(f"{world.size} ranks on {world.device.type}, {len(list(standard_library())):,} files")
        out = options.run or scratch
        trainer = Trainer(config, corpus, out, world=world, restart=True)
        printer = Printer(trainer)
        trainer.run(printer)
        memory = peaks(world)
        if world.is_main:
            warm = printer.rates[WARM:] or printer.rates
            print(f"median of {len(warm)} steps: {statistics.median(warm):,.0f} tokens/s")
            print("peak GiB by rank: " + ", ".join(f"{peak:.2f}" for peak in memory))
            print(f"loss: {printer.losses[0]:.4f} at first, {printer.losses[-1]:.4f} at last")
            if printer.losses[-1] < printer.losses[0]:
                rows = [
                    {"case": f"step {i + 1}", "loss": loss, "tokens_per_s": rate}
                    for i, (loss, rate) in enumerate(zip(printer.losses, printer.rates, strict=True))
                ]
                rows.append({"case": "all", "tokens_per_s": statistics.median(warm), "peak_gib": memory})
                common.write(options.out, "million", rows, check=SAID)
            else:
                print("the loss has not fallen", file=sys.stderr)
        fell = not world.is_main or printer.losses[-1] < printer.losses[0]
        failed = world.any(not fell)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
