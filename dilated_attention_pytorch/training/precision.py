"""The precision that a run computes in, and the scale of its loss in fp16."""

from __future__ import annotations

import torch

from dilated_attention_pytorch.training.config import Precision


def computed_in(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of autocast; fp32 for none."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


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
