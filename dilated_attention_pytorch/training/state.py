"""The optimizer, its rate, the scale of the loss, and what the state of a run holds, checked when it is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.models import LongNetConfig, LongNetLM, load_pretrained
from dilated_attention_pytorch.models.weights import check_state
from dilated_attention_pytorch.training import checkpoint
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.distributed import fill


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear up to `learning_rate`, then as `schedule` says, down to `final_rate` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = 1.0  # of the way down
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "warmup-stable-decay":
        left = min(1.0, (config.steps - step) / max(1.0, config.decay_share * config.steps))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * left)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices, not gains and biases; one fused update where torch has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    split = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(split, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class LossScale:
    """A factor of the loss that keeps small gradients from vanishing in fp16; 1, and fixed, in other dtypes.

    As `torch.amp.GradScaler` does: a step whose gradients overflow is left out and halves the factor, 2,000 others
    double it. That class looks at a rank's own gradients; this one at their norm, which all ranks have.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.varies = dtype is torch.float16
        self.state = [65536.0 if self.varies else 1.0, 0]  # the factor, and steps since it changed

    @property
    def factor(self) -> float:
        """The factor of the next step."""
        return self.state[0]

    def update(self, finite: bool) -> bool:
        """Take note of a step's gradients; False if they can only be left out, which no smaller factor would help."""
        factor, steps = self.state
        if finite:
            self.state = [factor, steps + 1] if steps < 1999 or not self.varies else [2 * factor, 0]
        else:
            self.state = [factor / 2, 0]
        return finite or (self.varies and factor > 1.0)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a run has learned, by name: `model.<weight>`, and `optimizer.<weight>.<moment>`, zeros before a step.

    There is no random state to save: every draw is a function of (seed, step, rank).
    """
    found = {f"model.{name}": x for name, x in model.state_dict().items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not optimizer.state[p]:
            moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        found |= {f"optimizer.{name}.{key}": x for key, x in optimizer.state[p].items()}
    return found


def take_weights(model: LongNetLM, folder: Path) -> None:
    """Fill a model, however it is sharded, from a folder of `save_pretrained`; a ValueError says what does not fit."""
    weights = load_pretrained(folder).state_dict()
    check_state(model, weights)
    for name, parameter in model.state_dict().items():
        fill(parameter, weights[name])


def check_about(kept: dict[str, Any], folder: Path, config: TrainConfig, fingerprint: str) -> None:
    """Raise a ValueError where a run's state has another config or corpus; the message names what differs."""
    # What older runs do not name was as it is by default.
    wanted, found = config.to_dict(), {**TrainConfig().to_dict(), **kept["config"]}
    names = [name for name in sorted({*wanted, *found} - config.FREE) if wanted.get(name) != found.get(name)]
    if names:
        differences = ", ".join(f"{name} {quoted(found.get(name))} (now {quoted(wanted.get(name))})" for name in names)
        raise ValueError(
            f"expected the config that the run in {folder} was started with, which has {differences}; "
            f"give that one, another folder, or {checkpoint.RESTART}"
        )
    if kept["fingerprint"] != fingerprint:
        raise ValueError(
            f"expected the corpus that the run in {folder} was started with, fingerprint {kept['fingerprint']}, "
            f"got {fingerprint}: the text has changed; give another folder, or {checkpoint.RESTART}"
        )
    if kept["step"] > config.steps:
        raise ValueError(
            f"expected steps of at least the {kept['step']} that the run in {folder} has done, got {config.steps}"
        )


def trained_model(folder: Path, step: int | None = None) -> tuple[LongNetLM, int]:
    """The model of a run's folder after a saved step, the last one by default, whole and on the CPU; and that step.

    Raises:
        ValueError: no such state, or a damaged one.
        ImportError: safetensors is not installed.
    """
    steps = checkpoint.steps_in(folder)
    if not steps or step not in (None, *steps):
        got = "a run without saved steps" if not steps else f"{step}, where there are {steps}"
        raise ValueError(f"expected step to be one that is saved in {folder}, got {got}")
    step = steps[-1] if step is None else step
    path = checkpoint.path_of(folder, step)
    config = LongNetConfig.from_dict(checkpoint.read_about(path)["model"])
    model = LongNetLM(config, device="meta").to_empty(device="cpu")
    weights = {f"model.{name}": x for name, x in model.state_dict().items()}
    checkpoint.load(path, weights, part="model.")
    return model.eval(), step
