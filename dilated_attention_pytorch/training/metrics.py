"""The record of a run: one JSON object per line, and TensorBoard where asked for."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.core.files import parse_json, replace_text


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


class MetricsLog:
    """Write the record of a run that starts, or goes on, after `step` steps; also as TensorBoard events.

    Lines of later steps are dropped: that work was lost and is done again. Damaged lines, and none at all where there
    should be one per `log_every` steps, are a warning.
    """

    def __init__(self, folder: Path, *, step: int, log_every: int, tensorboard: bool = False) -> None:
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "expected TensorBoard, which is not installed: pip install 'dilated-attention-pytorch[track]'"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        path = folder / "metrics.jsonl"
        lines = _lines(path) if step and path.exists() else []
        if None in lines[:-1] or (not any(lines) and step >= log_every):
            warnings.warn(
                f"expected the record of {step} steps in {path}, got damaged lines or none: its curve has a gap",
                stacklevel=2,
            )
        kept = (line for line in lines if line is not None and line["step"] <= step)
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, and hand it to the system."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        for name, value in line.items():
            if self._board is not None and name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()
