"""`generate`: text from a trained run, as it is written."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dilated_attention_pytorch.cli.options import check_device, notes


def generate(
    run: Annotated[Path, Argument(help="Folder of a run: model.safetensors and config.json.")],
    prompt: Annotated[str, Option(help="Start of the text.")] = "def ",
    max_bytes: Annotated[int, Option("--bytes", min=1, help="The most bytes to add; tokens, of a tokenizer.")] = 500,
    temperature: Annotated[float, Option(help="Divides the logits; 0 takes the likeliest byte.")] = 0.7,
    top_k: Annotated[int | None, Option(help="Sample from the k likeliest bytes.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from the fewest bytes of this probability.")] = None,
    seed: Annotated[int | None, Option(help="Of the samples; without it each text is another one.")] = None,
    device: Annotated[str, Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Continue a prompt with a trained model."""
    from dilated_attention_pytorch.models import LongNetLM, load_pretrained
    from dilated_attention_pytorch.models.generation import Sampling
    from dilated_attention_pytorch.training import text_stream
    from dilated_attention_pytorch.training.tokenizer import FILE, load_tokenizer

    if temperature == 0 and not (top_k is None and top_p is None):
        raise ValueError("expected no --top-k and no --top-p with --temperature 0, which takes the likeliest byte")
    model = load_pretrained(run, device=check_device(device))
    tokenizer = load_tokenizer(run if (run / FILE).is_file() else "bytes")
    unit = "bytes" if tokenizer.digest == "bytes" else "tokens"
    if not isinstance(model, LongNetLM) or model.config.vocab_size != tokenizer.vocab_size:
        vocabulary = getattr(model.config, "vocab_size", None)
        raise ValueError(
            f"expected a language model of {tokenizer.vocab_size} {unit} in {run}, got a {type(model).__name__}"
            + ("" if vocabulary is None else f" of {vocabulary} tokens")
        )
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if temperature == 0:
        sampling = Sampling(greedy=True, seed=seed)
    pieces = text_stream(model, tokenizer, prompt, max_bytes, **sampling)  # refuses here, before anything is written
    shown = printable if sys.stdout.isatty() else str
    sys.stdout.write(shown(prompt))
    times = [time.perf_counter()]
    for piece in pieces:
        times.append(time.perf_counter())
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        notes.print(f"first byte after {times[1] - times[0]:.2f} s, then {rate:,.0f} bytes/s")


def printable(text: str) -> str:
    """The text with escapes in place of what would steer a terminal: all control characters but newline and tab."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
