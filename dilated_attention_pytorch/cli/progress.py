"""A training run on the terminal: a bar, and a line for each evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from dilated_attention_pytorch.training import TrainConfig


class RichReporter:
    """Tell a terminal how a run goes; without a terminal, the evaluations alone.

    Args:
        console: of the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task = TaskID(0)
        self._progress = Progress(
            "training", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn(),
            "{task.fields[last]}", console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def start(self, step: int, config: TrainConfig, num_parameters: int) -> None:
        """Show the bar."""
        branches = ", ".join(f"{w}/{r}" for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True))
        self._console.print(
            f"{num_parameters:,} parameters, {config.num_layers} layers, context {config.context:,} bytes, "
            f"branches (segment/rate) {branches}",
            soft_wrap=True,
        )
        if step:
            self._console.print(f"going on after step {step:,} of {config.steps:,}")
        self._task = self._progress.add_task("training", total=config.steps, completed=step, last="")
        self._progress.start()

    def metrics(self, line: dict[str, Any]) -> None:
        """Show the latest loss beside the bar; print an evaluation."""
        if "val_bpb" in line:
            self._console.print(f"step {line['step']:>6,}: {line['val_bpb']:.3f} bits per byte on validation files")
        else:
            last = f"{line['bpb']:.2f} bits/byte, {line['tokens_per_s']:,.0f} bytes/s"
            self._progress.update(self._task, last=last)

    def step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()
