"""The state of a run, in one file that is replaced whole: what exact resume needs, and a check that it fits."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.training.config import TrainConfig

FILE = "state.pt"
_VERSION = 1


def save_state(folder: Path, *, step: int, config: TrainConfig, fingerprint: str, model: Any, optimizer: Any) -> None:
    """Writes `state.pt`; until it is whole the old one stays.

    Model and optimizer share one file so that no interruption can pair one step's weights with another's moments.
    There is no random state to save: every draw is a function of (seed, step, rank).

    Args:
        folder: of the run.
        step: steps done.
        config: of the run.
        fingerprint: of its corpus.
        model: its state dict.
        optimizer: its state dict.
    """
    temporary = folder / f".{FILE}.tmp"
    with temporary.open("wb") as stream:
        content = {"version": _VERSION, "step": step, "config": plain(config), "fingerprint": fingerprint}
        torch.save(content | {"model": model, "optimizer": optimizer}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / FILE)


def load_state(folder: Path, *, config: TrainConfig, fingerprint: str) -> dict[str, Any] | None:
    """The state of the run in `folder`, or None where there is none.

    Args:
        folder: of the run.
        config: what the run is asked to be.
        fingerprint: of the corpus it is asked to read.

    Raises:
        ValueError: the run was made with another config or corpus; the message names what differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["version"] != _VERSION:
        raise ValueError(f"expected a state of version {_VERSION} in {path}, got {state['version']}")
    wanted, kept = plain(config), state["config"]
    names = [name for name in sorted({*wanted, *kept} - config.FREE) if wanted.get(name) != kept.get(name)]
    if names:
        differences = ", ".join(f"{name} {kept.get(name)!r} (now {wanted.get(name)!r})" for name in names)
        raise ValueError(
            f"expected the config that the run in {folder} was started with, which has {differences}; "
            "give that one, another folder, or start over (restart)"
        )
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"expected the corpus that the run in {folder} was started with, fingerprint {state['fingerprint']}, "
            f"got {fingerprint}: the text has changed; give another folder or start over (restart)"
        )
    return state


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as torch.load with weights_only=True and JSON take it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
