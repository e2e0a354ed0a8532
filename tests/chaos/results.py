"""What a program leaves: whether it is whole at any moment, and whether it is that of a run that nothing disturbed."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch

from chaos.programs import SMALL, mapped
from dilated_attention_pytorch.models import load_pretrained
from dilated_attention_pytorch.training.metrics import read_metrics

_CLOCK = ("tokens_per_s", "memory_bytes")


class Lost(Exception):
    """Something is gone, half, or wrong; the text says what."""


def final(program: str, folder: Path, out: bytes) -> dict[str, Any]:
    """Everything that a finished program leaves and that no clock decides; equal for equal work."""
    found: dict[str, Any] = {}
    if program == "generate":
        return {"text": out} | {path.name: _digest(path) for path in sorted((folder / "run").iterdir())}
    if program == "stream":
        return {path.name: _digest(path) for path in sorted(folder.iterdir())}
    if program == "embed":
        return {path.name: torch.load(path, weights_only=True).tolist() for path in sorted(folder.iterdir())}
    run = folder / "run"
    for path in sorted(run.iterdir()):
        found[path.name] = _digest(path) if path.suffix in (".safetensors", ".txt", ".json") else None
    found["curve"] = [
        {name: value for name, value in line.items() if name not in _CLOCK}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    state = torch.load(run / "state.pt", weights_only=True)
    found["step"] = state["step"]
    found["moments"] = [one["exp_avg"].tolist() for one in state["optimizer"]["state"].values()]
    return found


def check_final(program: str, folder: Path, out: bytes, wanted: dict[str, Any]) -> None:
    """Raises Lost where a finished program left something else than an undisturbed one."""
    found = final(program, folder, out)
    if wrong := [name for name in sorted({*found, *wanted}) if found.get(name, ...) != wanted.get(name, ...)]:
        raise Lost(f"after the same command again, others than without a disturbance: {', '.join(wrong)}")


def check_between(program: str, folder: Path, out: bytes, wanted: dict[str, Any], *, gaps: bool = False) -> int:
    """Raises Lost where a program that was ended left half a file under a name of its own; the step that is saved."""
    if program == "generate" and not wanted["text"].startswith(out):
        raise Lost("text that is not the beginning of the text")
    if program == "embed":
        for path in folder.iterdir():
            if not path.name.startswith(".") and torch.load(path, weights_only=True).tolist() != wanted[path.name]:
                raise Lost(f"another {path.name}")
    if program == "stream" and all((folder / name).exists() for name in ("out", "lse")):
        whole = not mapped(folder / "out")[0, 0].isnan().any()
        if whole and (_digest(folder / "out"), _digest(folder / "lse")) != (wanted["out"], wanted["lse"]):
            raise Lost("rows that pass for whole and are not")
    return _saved(folder / "run", gaps) if program == "train" else 0


def _saved(run: Path, gaps: bool) -> int:
    if not (run / "state.pt").exists():
        return 0
    with zipfile.ZipFile(run / "state.pt") as archive:
        if archive.testzip():
            raise Lost("a damaged state.pt")
    step: int = torch.load(run / "state.pt", weights_only=True)["step"]
    load_pretrained(run)
    steps = {line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
    if not gaps and (missing := set(range(1, step + 1)) - steps):
        raise Lost(f"lines of steps {sorted(missing)} of {step} saved ones")
    if not 0 < step <= int(str(SMALL["steps"])):
        raise Lost(f"step {step}")
    return step


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
