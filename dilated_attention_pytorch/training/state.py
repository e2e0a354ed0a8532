"""The optimizer, a function of the step, and the state of a run for exact resume, checked when it is read."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.core.files import replace_file
from dilated_attention_pytorch.models.weights import check_state
from dilated_attention_pytorch.training.config import TrainConfig

FILE = "state.pt"
_VERSION = 1
_KINDS = {"version": int, "step": int, "config": dict, "fingerprint": str, "model": dict, "optimizer": dict}
_RESTART = "start over (restart=True)"


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear up to `learning_rate`, then half a cosine down to `final_rate` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices, not gains and biases; one fused update where torch has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    split = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(split, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def save_state(folder: Path, *, config: TrainConfig, **content: Any) -> None:
    """Write `state.pt`: the config, `step`, the corpus's `fingerprint`, and the state dicts of `model` and `optimizer`.

    Model and optimizer share one file: no interruption can pair one step's weights with another's moments. There is no
    random state to save: every draw is a function of (seed, step, rank).
    """
    content |= {"version": _VERSION, "config": config.to_dict()}
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
    if not isinstance(state, dict) or any(not _is_a(state.get(name), kind) for name, kind in _KINDS.items()):
        raise _damaged(path, f"a wrong checksum of {damaged}" if damaged else f"not {', '.join(_KINDS)}")
    if state["version"] != _VERSION:
        raise ValueError(f"expected a state of version {_VERSION} in {path}, got {state['version']}")
    # Runs from before there was a shift had none.
    wanted, kept = config.to_dict(), {"segment_shift": 0, **state["config"]}
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
        _check_optimizer(adamw(model, config), state["optimizer"])
        moments = (x for one in state["optimizer"]["state"].values() for x in one.values())
        if any(x.isnan().any() for x in (*state["model"].values(), *moments)):
            raise ValueError("numbers that are NaN, which no run saves")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    return state


def _check_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Hold an optimizer's state dict to the optimizer that is to take it: a fused update checks nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # `step` is a number in fp32, whatever the weights are.
    like = [{"step": torch.empty(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters]
    kinds = {i: {name: _kind(x) for name, x in one.items()} for i, one in enumerate(like)}
    if {i: {name: _kind(x) for name, x in one.items()} for i, one in kept["state"].items()} != kinds:
        raise ValueError("an optimizer whose moments have other shapes or dtypes than the weights")
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in kept["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("an optimizer of other groups of weights")
    for found, wanted in zip(kept["param_groups"], groups, strict=True):
        # Which settings there are is a matter of torch's version; the rate follows from the step.
        if names := [name for name in found.keys() & wanted.keys() - {"lr"} if found[name] != wanted[name]]:
            raise ValueError(f"an optimizer with another {', '.join(sorted(names))}")


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.layout


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as an int


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"expected {path} to hold the state of a run, got {found}: put a copy back, or {_RESTART}")
