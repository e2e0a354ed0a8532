"""What a program leaves: whether it is whole at any moment, and whether it is that of a run that nothing disturbed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from chaos.programs import SMALL, mapped
from dilated_attention_pytorch.models import load_pretrained
from dilated_attention_pytorch.training.checkpoint import checksum, load, path_of, read_about, steps_in
from dilated_attention_pytorch.training.metrics import read_metrics

_CLOCK = ("tokens_per_s", "memory_bytes")


class Lost(Exception):
    """Something is gone, half, or wrong; the text says what."""


def final(program: str, folder: Path, out: bytes) -> dict[str, Any]:
    """Everything that a finished program leaves and that no clock decides; equal for equal work."""
    found: dict[str, Any] = {}
    if program == "generate":
        return {"text": out} | {
            str(path.relative_to(folder)): _digest(path) for path in (folder / "run").rglob("*") if path.is_file()
        }
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
    (found["step"],) = steps_in(run)
    found["tensors"] = {name: x.tolist() for name, x in tensors_of(run, found["step"]).items()}
    return found


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a state, whole, however many ranks wrote it."""
    path = path_of(run, step)
    kinds = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    found = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()}
    load(path, found)
    return found


def check_final(program: str, folder: Path, out: bytes, wanted: dict[str, Any]) -> None:
    """Raises Lost where a finished program left something else than an undisturbed one."""
    found = final(program, folder, out)
    if wrong := [name for name in sorted({*found, *wanted}) if found.get(name, ...) != wanted.get(name, ...)]:
        raise Lost(f"after the same command again, others than without a disturbance: {', '.join(wrong)}")


def check_curve(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises Lost where losses of another world differ by more than 1e-4 of themselves."""
    for theirs, line in zip(found["curve"], wanted["curve"], strict=True):
        for name in line.keys() & {"loss", "val_loss"}:
            if theirs["step"] != line["step"] or abs(theirs[name] - line[name]) > 1e-4 * line[name]:
                raise Lost(f"in another world {name} {theirs[name]} in step {line['step']}, not {line[name]}")


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
    return _saved(folder / "run", gaps) if program in ("train", "sharded") else 0


def _saved(run: Path, gaps: bool) -> int:
    saved = steps_in(run) if run.exists() else []
    for step in saved:
        about = read_about(path_of(run, step))
        for name, wanted in about["files"].items():
            if checksum(path_of(run, step) / name) != wanted:
                raise Lost(f"a damaged {name} of step {step}")
    if (run / "model.safetensors").exists() and (run / "config.json").exists():
        load_pretrained(run)
    if not saved:
        return 0
    steps = {line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
    if not gaps and (missing := set(range(1, step + 1)) - steps):
        raise Lost(f"lines of steps {sorted(missing)} of {step} saved ones")
    if not 0 < step <= int(str(SMALL["steps"])):
        raise Lost(f"step {step}")
    return step


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
