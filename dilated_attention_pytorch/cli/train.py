"""`train`: a byte-level LongNet on a folder of text."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from typer import Exit, Option

from dilated_attention_pytorch.cli.options import check_device, console, human_bytes, notes
from dilated_attention_pytorch.core.validation import quoted

if TYPE_CHECKING:
    from dilated_attention_pytorch.training import TrainConfig

_DATA = "Folder of text to train on. Without it: Python's own standard library."
_SET = "Change a field of the preset; repeat for more."
_SUFFIX = "Take files with this ending only, such as .md; repeat for more."
_CONTEXT_PARALLEL = "Processes that share each sequence, one shard per process; under torchrun."


def train(
    out: Annotated[Path, Option(help="Folder of the run; one that was interrupted goes on where it was.")],
    data: Annotated[Path | None, Option(help=_DATA)] = None,
    preset: Annotated[str, Option(help="demo, small or base.")] = "demo",
    set_: Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help=_SET)] = None,
    suffix: Annotated[list[str] | None, Option(help=_SUFFIX)] = None,
    context_parallel: Annotated[int | None, Option(metavar="P", help=_CONTEXT_PARALLEL)] = None,
    val_fraction: Annotated[float, Option(help="Share of files for validation.")] = 0.05,
    device: Annotated[str | None, Option(help="cpu, cuda or cuda:1; by default CUDA where there is one.")] = None,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    restart: Annotated[bool, Option("--restart", help="Start over, replacing the run in the folder.")] = False,
    sample_bytes: Annotated[int, Option(min=0, help="Length of the sample written at the end.")] = 600,
    prompt: Annotated[str, Option(help="Start of the sample.")] = "def ",
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
            reporter = _RichReporter()
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
            raise Exit(128 + stop.signal_number) from None
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
        _, bits, count = result.evaluation
        console.print(f"validation: {bits:.3f} bits per byte on {count:,} bytes of validation files")
        spent = time.process_time()
        console.print(f"CPU time of this process: {spent:.0f} s; everything is in {out}", soft_wrap=True)


def _pairs(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"expected --set NAME=VALUE, got {quoted(setting)}")
    return {name.strip(): value.strip() for name, _, value in (setting.partition("=") for setting in settings)}


class _RichReporter:
    """A `Reporter` on the terminal, by a bar and a line per evaluation; without a terminal, by the lines alone."""

    def __init__(self) -> None:
        self._task = TaskID(0)
        self._progress = Progress(
            "training", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn(),
            "{task.fields[last]}", console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def start(self, step: int, config: TrainConfig, num_parameters: int) -> None:
        branches = ", ".join(f"{w}/{r}" for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True))
        size = f"{num_parameters:,} parameters, {config.num_layers} layers, context {config.context:,} bytes"
        console.print(f"{size}, branches (segment/rate) {branches}", soft_wrap=True)
        if step:
            console.print(f"going on after step {step:,} of {config.steps:,}")
        self._task = self._progress.add_task("training", total=config.steps, completed=step, last="")
        self._progress.start()

    def metrics(self, line: dict[str, Any]) -> None:
        if "val_bpb" in line:
            console.print(f"step {line['step']:>6,}: {line['val_bpb']:.3f} bits per byte on validation files")
        else:  # beside the bar
            last = f"{line['bpb']:.2f} bits/byte, {line['tokens_per_s']:,.0f} bytes/s"
            self._progress.update(self._task, last=last)

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def stop(self) -> None:
        self._progress.stop()
