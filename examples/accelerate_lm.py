"""A LongNet language model trained with Accelerate: `accelerate launch examples/accelerate_lm.py`, or with python.

Needs: pip install '.[examples]'
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from text import VOCABULARY, Excerpts, standard_library

from dilated_attention_pytorch import LongNetLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args()
    torch.manual_seed(0)

    accelerator = Accelerator(cpu=options.cpu)
    model = LongNetLM(
        vocab_size=VOCABULARY, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=256,
        segment_lengths=[options.context // 8, options.context // 2, options.context], dilation_rates=[1, 2, 4],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    excerpts = Excerpts(standard_library(), options.context, 2 * options.steps * accelerator.num_processes)
    loader = torch.utils.data.DataLoader(excerpts, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, (tokens, following) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == len(loader) - 1:
            mean = accelerator.gather(loss.detach()[None]).mean().item()
            accelerator.print(f"step {step} loss {mean:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
