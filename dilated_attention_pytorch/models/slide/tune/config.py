"""The settings of tuning, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dilated_attention_pytorch.core import validation as check

Mode = Literal["probe", "lora", "full"]
# Epochs and highest learning rate. The last is the official script's: 0.002 * 32 / 256.
DEFAULTS: dict[str, tuple[int, float]] = {"probe": (100, 5e-3), "lora": (20, 1e-3), "full": (20, 2.5e-4)}


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything that decides the numbers of a run beside encoder and data.

    Args:
        mode: `"probe"`, a linear head on embeddings; `"lora"`, low-rank changes of attention and feed-forward network
            beside it; `"full"`, all weights, with a learning rate per layer.
        folds: how many, where the labels give none.
        epochs: most passes over the training part; by default 100 of a probe and 20 otherwise.
        batch_size: slides per step. Survival orders the slides of a batch, so it needs several.
        learning_rate: the highest; by default 5e-3, 1e-3 and 2.5e-4 by mode.
        min_learning_rate: where the half cosine ends.
        warmup_epochs: of linear rise before it.
        weight_decay: of matrices.
        layer_decay: factor of the learning rate from a layer to the one below it, with `mode="full"`.
        patience: epochs without a lower validation loss after which a fold ends.
        rank: of the changes, with `mode="lora"`.
        alpha: their scale is alpha / rank; by default 2 * rank.
        layer: hidden state to take for the slide's embedding, 0 to the encoder's depth; by default the last output.
        dtype: of the computation: fp32, or bf16 under autocast.
        bootstraps: samples for the intervals.
        seed: of folds, batches, dropout and bootstrap; below 2**32.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong type.
    """

    mode: Mode = "probe"
    folds: int = 5
    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    min_learning_rate: float = 1e-6
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    layer_decay: float = 0.95
    patience: int = 10
    rank: int = 8
    alpha: float | None = None
    layer: int | None = None
    dtype: torch.dtype = torch.float32
    bootstraps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check.check_choice("mode", self.mode, Mode)
        epochs, rate = DEFAULTS[self.mode]
        filled: dict[str, Any] = {"epochs": epochs, "learning_rate": rate, "alpha": 2.0 * self.rank}
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least in (("folds", 2), ("epochs", 1), ("batch_size", 1), ("patience", 1), ("rank", 1),
                            ("bootstraps", 1)):  # fmt: skip
            check.check_int(name, getattr(self, name), least)
        check.check_int("seed", self.seed, 0, 1 << 32)  # as scikit-learn's
        for name in ("learning_rate", "min_learning_rate", "layer_decay", "alpha"):
            check.check_above_zero(name, getattr(self, name))
        for name in ("warmup_epochs", "weight_decay"):
            if check.check_float(name, getattr(self, name)) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if self.layer is not None:
            check.check_int("layer", self.layer, 0)
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected dtype to be fp32 or bf16, got {self.dtype}")

    def rate(self, epoch: float) -> float:
        """The learning rate after some epochs: up linearly, then down along half a cosine."""
        assert self.epochs is not None and self.learning_rate is not None
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        fall = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.min_learning_rate + max(0.0, self.learning_rate - self.min_learning_rate) * fall
