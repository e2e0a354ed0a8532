"""A LongNet language model sharded with FSDP2 (`fully_shard`): parameters, gradients and optimizer over all ranks.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_lm.py

Takes NCCL and GPUs where there are enough of them, gloo and the CPU otherwise. Sequences stay whole here; for one
sequence over many ranks see `LongNetLM.shard_context` and `dilated-attention train --context-parallel`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.nn.functional as F
from text import VOCABULARY, Excerpts, standard_library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dilated_attention_pytorch import LongNetLM
from dilated_attention_pytorch.training.distributed import World, join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    # At the end it waits for all ranks and lets go of the process group, DTensor's caches included: the threads of a
    # gloo group that outlives Python abort the process.
    with join("cuda" if cuda else "cpu") as world:
        train(options, world)


def train(options: argparse.Namespace, world: World) -> None:
    device, rank = world.device, world.rank
    mesh = init_device_mesh(device.type, (world.size,))
    torch.manual_seed(0)  # every rank draws the same weights, of which it keeps its shard
    model = LongNetLM(
        vocab_size=VOCABULARY, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=256,
        segment_lengths=[options.context // 8, options.context // 2, options.context], dilation_rates=[1, 2, 4],
        device=device,
    )  # fmt: skip
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh)  # gathered when it runs, let go again after
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held = sum(p.to_local().numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{world.size} ranks on {device.type}, {held} of {total} parameters on this one")

    excerpts = Excerpts(standard_library(), options.context, 2 * options.steps, seed=rank)
    for step, (tokens, following) in enumerate(torch.utils.data.DataLoader(excerpts, batch_size=2)):
        loss = F.cross_entropy(model(tokens.to(device)).flatten(0, 1), following.to(device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        world.sum(mean)
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step} loss {mean.item() / world.size:.3f}", flush=True)


if __name__ == "__main__":
    main()
