"""A switched Llama that all ranks share: sequences by ring attention, parameters by FSDP2.

    python examples/context_parallel_llama.py                                       # one process
    torchrun --standalone --nproc-per-node 2 examples/context_parallel_llama.py     # the same losses, to rounding

Every rank holds a shard of each sequence and of each weight. `ShardingCollator` cuts what any data collator makes, with
positions and labels of the whole sequence; the switched layers attend over all ranks. With Trainer or Accelerate, leave
the loader unprepared: all ranks of the group have to read the same examples.

Needs: pip install '.[examples]'
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from text import VOCABULARY, Excerpts, standard_library
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from dilated_attention_pytorch.integrations.transformers import ShardingCollator, use_dilated_attention
from dilated_attention_pytorch.training.distributed import World, join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    options = parser.parse_args()
    with join(options.device) as world:
        model = shared(options.width, options.context, world)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train(model, optimizer, options.context, options.steps, world)


def shared(width: int, context: int, world: World) -> LlamaForCausalLM:
    """A small Llama with dilated attention; a checkpoint's takes `from_pretrained` in place of the config."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, bos_token_id=None,
        eos_token_id=None, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)  # every rank draws the same weights, of which it keeps its shard
    model = LlamaForCausalLM(config)
    group = dist.group.WORLD if world.size > 1 else None
    use_dilated_attention(model, [context // 8, context], [1, 4], process_group=group)
    model.to(world.device)
    if world.size > 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, context: int, steps: int, world: World
) -> list[float]:
    """The loss of each step: the mean over the tokens of whole sequences."""
    # Any collator that makes whole rows; this one makes labels of the tokens themselves.
    collate = rows
    if world.size > 1:
        collate = ShardingCollator(dist.group.WORLD, rows)
    excerpts = Excerpts(standard_library(), context, 2 * steps)  # on every rank the same ones, in the same order
    losses = []
    for step, batch in enumerate(torch.utils.data.DataLoader(excerpts, batch_size=2, collate_fn=collate)):
        batch = {name: x.to(world.device) for name, x in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(world.sum(loss.detach().clone())) / world.size)
        if world.is_main and (step % 10 == 0 or step == steps - 1):
            print(f"step {step} loss {losses[-1]:.4f} gradient {float(norm):.4f}", flush=True)
    return losses


def rows(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What `DataCollatorForLanguageModeling(tokenizer, mlm=False)` makes of texts."""
    tokens = torch.stack([tokens for tokens, _ in examples])
    return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main()
