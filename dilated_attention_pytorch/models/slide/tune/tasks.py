"""What is learned of slides: a class, or the order in which patients meet an event. Losses and scores."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.models.slide.formats import package


class Task(Protocol):
    """What the loop and the folds ask of a task; S slides, O outputs.

    Attributes:
        strata: names of the groups that every fold should hold.
        num_outputs: O.
        is_separable: whether the loss of a batch is the mean of its slides' own.
    """

    strata: tuple[str, ...]
    num_outputs: int
    is_separable: bool

    def stratum(self, targets: Tensor) -> Tensor:
        """The group of each slide, int64 `(S,)`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, from outputs `(S, O)`."""

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The scores by name; NaN where the slides do not define one."""

    def columns(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """The columns of a table of predictions."""


class Classification:
    """One of several classes, whose names are the strata; targets are int64 `(S,)`."""

    is_separable = True

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.strata, self.num_outputs = classes, len(classes)

    def stratum(self, targets: Tensor) -> Tensor:
        """The class."""
        return targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, targets)

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Macro AUROC, each class against the others, and balanced accuracy, over the classes that are there."""
        area = package("sklearn.metrics").roc_auc_score
        chances, there = outputs.softmax(-1), targets.unique().tolist()
        asked = [1] if self.num_outputs == 2 else there  # of two classes the other one's is the same
        areas = [float(area(targets == c, chances[:, c])) for c in asked if len(there) > 1]
        hits = outputs.argmax(-1) == targets
        recalls = [float(hits[targets == c].double().mean()) for c in there]
        mean = sum(areas) / len(areas) if areas else math.nan
        return {"auroc": mean, "balanced_accuracy": sum(recalls) / len(recalls)}

    def columns(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """The label, the predicted one and the probability of each."""
        names, chances = self.strata, outputs.softmax(-1)
        found: dict[str, Any] = {"label": [names[i] for i in targets.tolist()]}
        found["predicted"] = [names[i] for i in outputs.argmax(-1).tolist()]
        return found | {f"probability_{name}": chances[:, i].numpy() for i, name in enumerate(names)}


def _torchsurv(module: str) -> Any:
    with warnings.catch_warnings():  # its import still uses TorchScript
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return package(f"torchsurv.{module}")


class Survival:
    """A log hazard; targets are fp32 `(S, 2)`: the time, and 1 where the event happened then (0: not until then)."""

    is_separable = False

    def __init__(self) -> None:
        self.strata: tuple[str, ...] = ("censored", "event")
        self.num_outputs = 1

    def stratum(self, targets: Tensor) -> Tensor:
        """Whether the event happened."""
        return targets[:, 1].long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cox's negative partial log likelihood, with Efron's rule for ties; 0 where nothing can be ordered."""
        time, event = targets[:, 0], targets[:, 1].bool()
        if len(time) < 2 or not bool(event.any()):
            return outputs.sum() * 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Ties in `time` detected")
            loss: Tensor = _torchsurv("loss.cox").neg_partial_log_likelihood(outputs[:, 0], event, time)
        return loss

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Harrell's C-index."""
        time, event = targets[:, 0], targets[:, 1].bool()
        if not bool((event & (time < time.max())).any()):  # nobody outlives an event
            return {"c_index": math.nan}
        index = _torchsurv("metrics.cindex").ConcordanceIndex()
        return {"c_index": float(index(outputs[:, 0], event, time))}

    def columns(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Time, event and the log hazard."""
        event = targets[:, 1].to(torch.int64).numpy()
        return {"time": targets[:, 0].numpy(), "event": event, "risk": outputs[:, 0].numpy()}
