"""AdamW with warm-up and a cosine, as a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import nn

from dilated_attention_pytorch.training.config import TrainConfig


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
