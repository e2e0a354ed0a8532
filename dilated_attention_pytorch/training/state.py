"""The state of a run for exact resume, in one file that is replaced whole, and the checks when it is read."""

from __future__ import annotations

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.core.files import replace_file
from dilated_attention_pytorch.models.weights import check_state
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.optimizer import adamw

FILE = "state.pt"
_VERSION = 1
_KINDS = {"version": int, "step": int, "config": dict, "fingerprint": str, "model": dict, "optimizer": dict}
_RESTART = "start over (restart=True)"


def save_state(folder: Path, *, step: int, config: TrainConfig, fingerprint: str, model: Any, optimizer: Any) -> None:
    """Write `state.pt`: the steps done, the config, the corpus's fingerprint and the state dicts.

    Model and optimizer share one file: no interruption can pair one step's weights with another's moments. There is no
    random state to save: every draw is a function of (seed, step, rank).
    """
    content = {"version": _VERSION, "step": step, "config": plain(config), "fingerprint": fingerprint}
    content |= {"model": model, "optimizer": optimizer}
    replace_file(folder / FILE, lambda path: torch.save(content, path))


def load_state(folder: Path, *, config: TrainConfig, fingerprint: str, model: nn.Module) -> dict[str, Any] | None:
    """The state of the run in `folder`, or None where there is none; `model`, not yet sharded, says names and shapes.

    Raises:
        ValueError: a damaged file, or a run with another config or corpus; the message names what differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not compare them
            damaged = archive.testzip()
        state: Any = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a file can raise anything; torch's own text is advice to run what the file holds
        raise _damaged(path, type(error).__name__) from error
    if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in _KINDS.items()):
        raise _damaged(path, f"a wrong checksum of {damaged}" if damaged else f"not {', '.join(_KINDS)}")
    if state["version"] != _VERSION:
        raise ValueError(f"expected a state of version {_VERSION} in {path}, got {state['version']}")
    wanted, kept = plain(config), state["config"]
    names = [name for name in sorted({*wanted, *kept} - config.FREE) if wanted.get(name) != kept.get(name)]
    if names:
        differences = ", ".join(f"{name} {kept.get(name)!r} (now {wanted.get(name)!r})" for name in names)
        raise ValueError(
            f"expected the config that the run in {folder} was started with, which has {differences}; "
            f"give that one, another folder, or {_RESTART}"
        )
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"expected the corpus that the run in {folder} was started with, fingerprint {state['fingerprint']}, "
            f"got {fingerprint}: the text has changed; give another folder, or {_RESTART}"
        )
    if not 0 <= state["step"] <= config.steps:
        raise _damaged(path, f"step {state['step']} of {config.steps}")
    try:
        check_state(model, state["model"])
        parameters = [p for group in adamw(model, config).param_groups for p in group["params"]]
        shapes = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for i, p in enumerate(parameters)}
        moments = state["optimizer"]["state"]
        # A fused update reads moments by the parameter's size, whatever theirs is.
        if {i: {name: x.shape for name, x in one.items()} for i, one in moments.items()} != shapes:
            raise ValueError("an optimizer whose moments have other shapes than the weights")
    except (ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, str(error)) from error
    return state


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"expected {path} to hold the state of a run, got {found}: put a copy back, or {_RESTART}")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as torch.load with weights_only=True and JSON take it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
