"""`train`: a LongNet language model on text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from typer import Exit, Option

from dilated_attention_pytorch.cli.generate import printable
from dilated_attention_pytorch.cli.options import check_device, console, human_bytes, notes, pairs

if TYPE_CHECKING:
    from dilated_attention_pytorch.training import Corpus, Trainer

_CONFIG = "YAML or JSON of settings, such as the train.json of a run; options and --set come on top."
_DATA = "Text: a file, a folder, hf:NAME. Without it: Python's own standard library."
_SET = "Change a field of the config, or data.NAME; repeat for more."
_FIELD = "Field with the text, of jsonl, parquet and datasets: text."
_SUFFIX = "Take files with this ending only, such as .md; repeat for more."
_TOKENIZER = "A tokenizer.json, or a folder with one; bytes by default."
_CONTEXT_PARALLEL = "Processes that share each sequence, one shard per process; under torchrun."
_FRACTION = "Share of documents for validation, 0.05; of each one, where there are few."
_INIT = "Folder of a model to begin with, in place of random weights."
# Arguments of build_corpus as settings, and their types.
_SOURCE: dict[str, Any] = {"data.folder": str, "data.field": str, "data.tokenizer": str, "data.val_fraction": float}
_SOURCE["data.suffixes"] = tuple[str, ...]


def train(
    out: Annotated[Path, Option(help="Folder of the run; one that was interrupted goes on where it was.")],
    config: Annotated[Path | None, Option(help=_CONFIG)] = None,
    data: Annotated[str | None, Option(help=_DATA)] = None,
    preset: Annotated[str | None, Option(help="demo, small or base; demo by default.")] = None,
    set_: Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help=_SET)] = None,
    field: Annotated[str | None, Option(help=_FIELD)] = None,
    suffix: Annotated[list[str] | None, Option(help=_SUFFIX)] = None,
    tokenizer: Annotated[str | None, Option(help=_TOKENIZER)] = None,
    context_parallel: Annotated[int | None, Option(metavar="P", help=_CONTEXT_PARALLEL)] = None,
    val_fraction: Annotated[float | None, Option(help=_FRACTION)] = None,
    init_from: Annotated[Path | None, Option(help=_INIT)] = None,
    device: Annotated[str | None, Option(help="cpu, cuda or cuda:1; by default CUDA where there is one.")] = None,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    wandb: Annotated[str | None, Option(metavar="PROJECT", help="Also write to Weights & Biases.")] = None,
    restart: Annotated[bool, Option("--restart", help="Start over, replacing the run in the folder.")] = False,
    sample_bytes: Annotated[int, Option(min=0, help="Length of the sample written at the end, in tokens.")] = 600,
    prompt: Annotated[str, Option(help="Start of the sample.")] = "def ",
) -> None:
    """Train a language model; resumes exactly, and runs under torchrun as it is.

    Leaves model.safetensors, config.json, train.json, a state, metrics.jsonl, loss.png, pattern.png and sample.txt.
    """
    from dilated_attention_pytorch.core.files import replace_text
    from dilated_attention_pytorch.training import Interrupted, Trainer, build_corpus, read_settings, text_stream
    from dilated_attention_pytorch.training import preset as preset_named
    from dilated_attention_pytorch.training.config import read_values
    from dilated_attention_pytorch.training.distributed import join
    from dilated_attention_pytorch.training.tokenizer import utf8

    # Imported now: matplotlib may be missing, which is better known before the training than after it.
    from dilated_attention_pytorch.viz import loss_figure, pattern_figure, save

    given = {} if config is None else read_settings(config)
    wanted, named = given.pop("corpus", None), given.pop("preset", None)
    options = {"folder": data, "field": field, "suffixes": suffix, "tokenizer": tokenizer, "val_fraction": val_fraction}
    said = {f"data.{name}": value for name, value in options.items() if value is not None} | pairs(set_ or [])
    if any(name.startswith("data.") for name in said):
        wanted = None  # a file names the corpus of its own data, not of others that are asked for
    given |= {} if context_parallel is None else {"context_parallel": context_parallel}
    given |= said
    of_data = {name: given.pop(name) for name in list(given) if name.startswith("data.")}
    source = read_values(of_data, _SOURCE, "a setting of the data")
    source = {name.removeprefix("data."): value for name, value in source.items()}
    settings = preset_named(preset or named or "demo").changed(given)
    utf8(prompt)  # the sample comes last
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected --out to be a folder, got the file {out}")
    with join(None if device is None else check_device(device)) as world:
        settings.micro_steps(world.size)  # before anything is read
        corpus = world.first(partial(_build, source)) or build_corpus(**source)  # the others find the first one's
        if wanted not in (None, corpus.fingerprint):
            raise ValueError(f"expected the corpus of {config}, fingerprint {wanted}, got {corpus.fingerprint}")
        if "vocab_size" not in given:
            settings = replace(settings, vocab_size=corpus.vocab_size)
        boards: Any = {"tensorboard": tensorboard, "wandb": wandb}
        trainer = Trainer(settings, corpus, out, world=world, init_from=init_from, restart=restart, **boards)
        done = trainer.step == settings.steps
        try:
            with _bar(trainer) as bar:
                result = trainer.run(partial(_report, bar))
        except Interrupted as stop:
            if world.is_main:
                notes.print(str(stop))
            raise Exit(128 + stop.signal_number) from None
        if not world.is_main:
            return
        # The whole sequence, and its start at a scale that shows the rates.
        spans = [(0, settings.context), (0, min(64, settings.context))]
        drawn = pattern_figure(settings.model_config().pattern, settings.context, spans=spans, is_causal=True)
        save(drawn, out / "pattern.png")
        save(loss_figure(out / "metrics.jsonl"), out / "loss.png")
        if done and (out / "sample.txt").exists():
            console.print("nothing was left to train; sample.txt stays as it is")
        elif (known := corpus.tokenizer) is not None:
            more = text_stream(result.model, known, prompt, sample_bytes, temperature=0.7, seed=settings.seed)
            text = printable(prompt + "".join(more))
            replace_text(out / "sample.txt", text + "\n")
            console.rule("sample")
            console.print(text, soft_wrap=True)
            console.rule()
        _, bits, count, _ = result.evaluation
        unit = "token" if corpus.tokenizer is None else "byte"
        console.print(f"validation: {bits:.3f} bits per {unit} on {count:,} {unit}s of validation files")
        spent = time.process_time()
        console.print(f"CPU time of this process: {spent:.0f} s; everything is in {out}", soft_wrap=True)


def _build(source: dict[str, Any]) -> Corpus:
    """The corpus, with a bar while text is tokenised, and what it is."""
    from dilated_attention_pytorch.training import build_corpus

    with Progress("tokenising", BarColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn(), console=console,
                  transient=True, disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("")
        corpus = build_corpus(**source, progress=lambda done, total: bar.update(task, completed=done, total=total))
    sizes = {split: x.size * corpus.bytes_per_token for split, x in (("train", corpus.train), ("val", corpus.val))}
    console.print(
        f"corpus: {human_bytes(sizes['train'])} of training text in {corpus.documents['train']:,} files, "
        f"{human_bytes(sizes['val'])} of validation text in {corpus.documents['val']:,}",
        soft_wrap=True,
    )
    for kind, files in corpus.left_out.items():
        console.print(f"left out: {corpus.documents[kind]:,} {kind} ({', '.join(files)} ..)", soft_wrap=True)
    return corpus


@contextmanager
def _bar(trainer: Trainer) -> Iterator[Progress]:
    """What is trained, and a bar of its steps, on a terminal; one that is gone ends no run."""
    config, step, shown = trainer.config, trainer.step, trainer.world.is_main
    bar = Progress(
        "training", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn(),
        "{task.fields[last]}", console=console, disable=not (shown and console.is_terminal),
    )  # fmt: skip
    bar.add_task("training", total=config.steps, completed=step, last="")
    branches = ", ".join(f"{w}/{r}" for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True))
    unit = "bytes" if config.vocab_size == 256 else "tokens"
    size = f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters, {config.num_layers} layers"
    size += f", context {config.context:,} {unit}, branches (segment/rate) {branches}"
    with suppress(OSError):
        if shown:
            console.print(size + f"\ngoing on after step {step:,} of {config.steps:,}" * bool(step), soft_wrap=True)
        bar.start()
    try:
        yield bar
    finally:
        with suppress(OSError):
            bar.stop()


def _report(bar: Progress, step: int, lines: list[dict[str, Any]]) -> None:
    """A step on the terminal, by the bar and a line per evaluation; without a terminal, by the lines alone."""
    task, last = bar.tasks[0], ""
    for line in lines:
        if "val_bpb" in line:
            console.print(f"step {step:>6,}: {line['val_bpb']:.3f} bits per byte on validation files")
        else:  # beside the bar
            last = f"{line['bpb']:.2f} bits/byte, {line['tokens_per_s']:,.0f} tokens/s"
            last += f", MFU {line['mfu']:.0%}" if "mfu" in line else ""
    bar.update(task.id, completed=step, last=last or task.fields["last"])
