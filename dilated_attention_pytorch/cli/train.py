"""`train`: a byte-level LongNet on a folder of text."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dilated_attention_pytorch.cli.options import check_device, console, human_bytes, notes


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was interrupted goes on where it was.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of text to train on. Without it: Python's own standard library.")
    ] = None,
    preset: Annotated[str, typer.Option(help="demo, small or base.")] = "demo",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the preset; repeat for more."),
    ] = None,
    suffix: Annotated[
        list[str] | None, typer.Option(help="Take files with this ending only, such as .md; repeat for more.")
    ] = None,
    context_parallel: Annotated[
        int | None,
        typer.Option(metavar="P", help="Processes that share each sequence, one shard per process; under torchrun."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of files for validation.")] = 0.05,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default CUDA where there is one.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start over, replacing the run in the folder.")] = False,
    sample_bytes: Annotated[int, typer.Option(min=0, help="Length of the sample written at the end.")] = 600,
    prompt: Annotated[str, typer.Option(help="Start of the sample.")] = "def ",
) -> None:
    """Train a byte-level language model; resumes exactly, and runs under torchrun as it is.

    Leaves model.safetensors, config.json, train.json, state.pt, metrics.jsonl, loss.png, pattern.png and sample.txt.
    """
    from dilated_attention_pytorch.core.files import replace_text
    from dilated_attention_pytorch.training import Interrupted, Trainer, build_corpus, write_text
    from dilated_attention_pytorch.training import preset as preset_named
    from dilated_attention_pytorch.training.distributed import join

    # Imported now: matplotlib may be missing, which is better known before the training than after it.
    from dilated_attention_pytorch.viz import loss_figure, pattern_figure, save

    config = preset_named(preset).changed(_pairs(set_ or []))
    if context_parallel is not None:
        config = replace(config, context_parallel=context_parallel)
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected --out to be a folder, got the file {out}")
    with join(None if device is None else check_device(device)) as world:
        config.micro_steps(world.size)  # before anything is read
        build = partial(build_corpus, data, suffixes=suffix or (), val_fraction=val_fraction)
        corpus = world.first(build) or build()  # the others find the first one's
        reporter = None
        if world.is_main:
            from dilated_attention_pytorch.cli.progress import RichReporter

            reporter = RichReporter(console)
            console.print(
                f"corpus: {human_bytes(corpus.train.size)} of training text in {corpus.documents['train']:,} files, "
                f"{human_bytes(corpus.val.size)} of validation text in {corpus.documents['val']:,}"
            )
        trainer = Trainer(config, corpus, out, world=world, tensorboard=tensorboard, restart=restart, reporter=reporter)
        try:
            result = trainer.run()
        except Interrupted as stop:
            if world.is_main:
                notes.print(str(stop))
            raise typer.Exit(128 + stop.signal_number) from None
        if not world.is_main:
            return
        # The whole sequence, and its start at a scale that shows the rates.
        spans = [(0, config.context), (0, min(64, config.context))]
        drawn = pattern_figure(config.model_config().pattern, config.context, spans=spans, is_causal=True)
        save(drawn, out / "pattern.png")
        save(loss_figure(out / "metrics.jsonl"), out / "loss.png")
        text = write_text(result.model, prompt, sample_bytes, temperature=0.7, seed=config.seed)
        replace_text(out / "sample.txt", text + "\n")
        console.rule("sample")
        console.print(text, soft_wrap=True)
        console.rule()
        spent = os.times()
        console.print(
            f"validation: {result.evaluation.bits_per_byte:.3f} bits per byte on "
            f"{result.evaluation.num_bytes:,} bytes of validation files"
        )
        console.print(
            f"CPU time of this process: {spent.user + spent.system:.0f} s; everything is in {out}", soft_wrap=True
        )


def _pairs(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"expected --set NAME=VALUE, got {setting!r}")
        pairs[name.strip()] = value.strip()
    return pairs
