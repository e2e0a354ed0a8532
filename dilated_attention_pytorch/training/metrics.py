"""The record of a run: one JSON object per line, TensorBoard and Weights & Biases where asked for; what it measures."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.core.files import parse_json, replace_text
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.sources import needed


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a record. Damaged ones are left out, as a last one that an interruption cut short."""
    return [line for line in _lines(path) if line is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """The lines of a record, None for a damaged one."""
    lines: list[dict[str, Any] | None] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        values = None
        with contextlib.suppress(ValueError):
            values = parse_json(line)
        lines.append(values if isinstance(values, dict) and isinstance(values.get("step"), int) else None)
    return lines


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of this process: on the CUDA device, else in RAM; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# FLOP/s of dense bf16 by the maker's data sheets (from torchtitan's tools/utils.py); the first name that fits counts.
_PEAKS = {
    "A100": 312e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GB200": 2500e12,
    "B200": 2250e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a device can do in bf16 or fp16 at most, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in _PEAKS.items() if known in name), None)


def flops_per_sequence(config: TrainConfig) -> int:
    """FLOPs of a forward and a backward of one sequence of `context` tokens, counted on a model without memory.

    As `torch.utils.flop_counter` counts: all products of matrices, five in attention's backward. Activations that are
    computed again do not count; documents count as if they were not packed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = LongNetLM(config.model_config(), device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, config.context, dtype=torch.int64, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def check_boards(*, tensorboard: bool, wandb: str | None) -> None:
    """Raises an ImportError for a package that is wanted and not installed."""
    if tensorboard:
        needed("torch.utils.tensorboard", "TensorBoard", "'dilated-attention-pytorch[track]'")
    if wandb is not None:
        needed("wandb", "Weights & Biases", "wandb")


@contextlib.contextmanager
def record(
    folder: Path, *, step: int, log_every: int, tensorboard: bool = False, wandb: str | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the record of a run that starts, or goes on, after `step` steps: a function that adds a line.

    Lines of later steps are dropped: that work was lost and is done again. Damaged lines, and none at all where there
    should be one per `log_every` steps, are a warning.

    Args:
        folder: of the run.
        step: steps that are done.
        log_every: steps between lines.
        tensorboard: write TensorBoard events too.
        wandb: a project of Weights & Biases to write to as well; each start is a run there, in a group with the others.
    """
    boards: list[Callable[[dict[str, float], int], object]] = []  # told the numbers of a step
    with contextlib.ExitStack() as held:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = held.enter_context(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))
            boards.append(lambda numbers, at: [board.add_scalar(name, x, at) for name, x in numbers.items()])
        if wandb is not None:
            settings = parse_json((folder / "train.json").read_text(encoding="utf-8"))
            run = needed("wandb", "Weights & Biases", "wandb").init(
                project=wandb, group=folder.name, dir=str(folder), config=settings
            )
            held.callback(run.finish)
            boards.append(lambda numbers, at: run.log(numbers, step=at))
        path = folder / "metrics.jsonl"
        lines = _lines(path) if step and path.exists() else []
        if None in lines[:-1] or (not any(lines) and step >= log_every):
            warnings.warn(
                f"expected the record of {step} steps in {path}, got damaged lines or none: its curve has a gap",
                stacklevel=2,
            )
        kept = (line for line in lines if line is not None and line["step"] <= step)
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        stream = held.enter_context(path.open("a", encoding="utf-8"))

        def write(line: dict[str, Any]) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()  # to the system
            numbers = {name: x for name, x in line.items() if name != "step" and isinstance(x, int | float)}
            for tell in boards:
                tell(numbers, line["step"])

        yield write
