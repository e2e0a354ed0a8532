"""A pretrained model switched to dilated attention and fine-tuned at four times its context.

    python examples/convert_llama.py                       # trains its own small Llama first, on the CPU
    python examples/convert_llama.py --model some/folder   # any causal model of transformers that lies in a folder

The small Llama learns Python's standard library with dense attention. Then its weights stay, its attention becomes
dilated, and it is fine-tuned on longer excerpts. Validation losses, in nats a byte, are printed before and after.

Needs: pip install '.[examples]'
"""

from __future__ import annotations

import argparse

import torch
from text import VOCABULARY, Excerpts, standard_library
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dilated_attention_pytorch.integrations.transformers import use_dilated_attention

FACTOR = 4


def small_llama(width: int, longest: int) -> LlamaForCausalLM:
    """Two layers over bytes, for sequences of up to `longest`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=longest, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: PreTrainedModel, text: Tensor, length: int, tokens_a_step: int, steps: int, seed: int) -> None:
    """AdamW with a linear decay, the same number of tokens a step at every length."""
    batch = max(1, tokens_a_step // length)
    excerpts = Excerpts(text, length, steps * batch, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    for tokens, _ in torch.utils.data.DataLoader(excerpts, batch_size=batch):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


@torch.no_grad()
def validation(model: PreTrainedModel, text: Tensor, length: int, count: int = 4) -> float:
    """Mean loss on excerpts that training has not seen."""
    model.eval()
    excerpts = Excerpts(text, length, count, seed=999)
    losses = [model(tokens[None], labels=tokens[None], use_cache=False).loss for tokens, _ in excerpts]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder that from_pretrained reads; its tokens must be bytes")
    parser.add_argument("--context", type=int, default=512, help="of the dense model")
    parser.add_argument("--steps", type=int, default=150, help="of the dense training")
    parser.add_argument("--fine-tune-steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    short, long = options.context, FACTOR * options.context
    text = standard_library(2_000_000)
    training, unseen = text[: -20 * long], text[-20 * long :]

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = small_llama(options.width, long)
        train(model, training, short, 4 * long, options.steps, seed=0)
        print(f"dense, trained at {short}: {validation(model, unseen, short):.3f} at {short}", flush=True)
    print(f"dense, not fine-tuned: {validation(model, unseen, long):.3f} at {long}", flush=True)

    # Near neighbours in full, farther ones ever more sparsely: about as many keys a token as the dense model had.
    use_dilated_attention(model, [short // 2, long // 2, long], [1, 4, 8])
    before = validation(model, unseen, long)
    print(f"dilated, before fine-tuning: {before:.3f} at {long}", flush=True)
    train(model, training, long, 4 * long, options.fine_tune_steps, seed=1)
    after = validation(model, unseen, long)
    print(f"dilated, after fine-tuning: {after:.3f} at {long}")
    if not after < before:
        raise SystemExit("the loss has not fallen")


if __name__ == "__main__":
    main()
