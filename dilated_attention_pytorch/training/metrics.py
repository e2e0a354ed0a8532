"""The record of a run: one JSON object a line, and TensorBoard where asked for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; a last line that an interruption cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has held: on the CUDA device, else in RAM; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MetricsLog:
    """Writes the record of a run that starts, or goes on, after `step` steps.

    Args:
        folder: of the run.
        step: lines of later steps are dropped: they belong to work that was lost and is done again.
        tensorboard: also write TensorBoard events, into `folder/tensorboard`.

    Raises:
        ImportError: TensorBoard asked for and not installed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        self._board: Any = _board(folder / "tensorboard", step) if tensorboard else None
        self.path = folder / FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if self.path.exists() else []
        if step == 0:
            kept = []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; it is on its way to the disk when this returns."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Closes the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "expected TensorBoard, which is not installed: pip install 'dilated-attention-pytorch[track]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
