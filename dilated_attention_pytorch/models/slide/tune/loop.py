"""The training of one fold: exact to resume, since all chance of an epoch follows from the seed and its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core.files import replace_file
from dilated_attention_pytorch.models import weights
from dilated_attention_pytorch.models.slide.tune.config import TuneConfig
from dilated_attention_pytorch.models.slide.tune.folds import Fold
from dilated_attention_pytorch.models.slide.tune.model import parameter_groups, trained_state
from dilated_attention_pytorch.models.slide.tune.tasks import Task

STATE, BEST = "state.pt", "best.safetensors"
# Reads slides: which of those asked for each piece has, and what the model takes of them.
Inputs = Callable[[Sequence[int]], Iterator[tuple[slice, tuple[Tensor, ...]]]]


def save_tensors(path: Path, state: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a `.safetensors` file, whole or not at all."""
    save, plain = weights.safetensors().save_file, {name: x.cpu().contiguous() for name, x in state.items()}
    replace_file(path, lambda temporary: save(plain, temporary, metadata=about))


class FoldTrainer:
    """Trains a model on one fold in a folder, from the folder's last epoch on.

    The state is written after each epoch, and the weights of the best epoch when there is one. A run that is killed at
    any point and started again computes the same: the epoch that was interrupted is done once more.

    Args:
        model: takes what `inputs` gives; frozen where it is not to be trained.
        inputs: reads slides by number.
        task: gives the loss.
        targets: of all slides.
        fold: the numbers of its slides.
        config: the settings.
        folder: of the fold; there.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, task: Task, targets: Tensor, fold: Fold, config: TuneConfig,
        folder: Path,
    ) -> None:  # fmt: skip
        self.model, self.inputs, self.task, self.fold, self.config = model, inputs, task, fold, config
        self.folder, self.device = folder, next(model.parameters()).device
        self.targets = targets.to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0)
        self.epoch, self.best_epoch, self.best_loss = 0, 0, math.inf

    def run(self, said: Callable[[int, float], None] = lambda epoch, loss: None) -> Tensor:
        """Train to the end and give the outputs `(S, O)` of the test part by the best epoch's weights, on the CPU.

        Args:
            said: is told the number of each finished epoch and its validation loss.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._restore()
        assert self.config.epochs is not None
        writer: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.epoch + 1)
        while self.epoch < self.config.epochs and self.epoch - self.best_epoch < self.config.patience:
            train = self._train()
            outputs, targets = self.predict(self.fold.val), self.targets[self.fold.val].cpu()
            val = self._finite(self.task.loss(outputs, targets))
            self.epoch += 1
            if val < self.best_loss:
                self.best_loss, self.best_epoch = val, self.epoch
                save_tensors(self.folder / BEST, trained_state(self.model))
            self._save()
            rate = self.config.rate(self.epoch)
            for name, x in {"train/loss": train, "val/loss": val, "learning_rate": rate}.items():
                writer.add_scalar(name, x, self.epoch)
            for name, x in self.task.scores(outputs, targets).items():
                writer.add_scalar(f"val/{name}", x, self.epoch)
            said(self.epoch, val)
        writer.close()
        self.model.load_state_dict(weights.read_safetensors(self.folder / BEST), strict=False)
        return self.predict(self.fold.test)

    @torch.no_grad()
    def predict(self, chosen: Sequence[int]) -> Tensor:
        """The outputs of some slides `(S, O)`, on the CPU."""
        self.model.eval()
        return torch.cat([self._forward(x).cpu() for _, x in self.inputs(chosen)])

    def _train(self) -> float:
        """One epoch; the mean loss of its steps."""
        self.model.train()
        chance = torch.Generator().manual_seed(self.config.seed * 100_003 + self.epoch)
        drawn = torch.randperm(len(self.fold.train), generator=chance, device="cpu")
        order = [self.fold.train[i] for i in drawn.tolist()]
        batches = torch.arange(len(order), device="cpu").split(self.config.batch_size)
        losses = []
        for i, batch in enumerate(batches):
            rate = self.config.rate(self.epoch + (i + 1) / len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            seeds = torch.randint(2**62, (len(batch),), generator=chance, device="cpu").tolist()
            losses.append(self._finite(self._gradients([order[j] for j in batch.tolist()], seeds)))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sum(losses) / len(losses)

    def _gradients(self, chosen: list[int], seeds: list[int]) -> Tensor:
        """Add up the gradients of a batch, holding the activations of one piece at a time; the batch's loss."""
        targets, total = self.targets[chosen], torch.zeros((), device=self.device)
        if self.task.is_separable:
            for rows, x in self.inputs(chosen):
                share = len(targets[rows]) / len(chosen)
                loss = self.task.loss(self._forward(x, seeds[rows.start]), targets[rows]) * share
                loss.backward()
                total += loss.detach()
            return total
        # The loss needs all outputs at once. They are computed twice, with the same dropout: first for the loss and its
        # gradient to each output, then piece by piece for the weights.
        with torch.no_grad():
            outputs = torch.cat([self._forward(x, seeds[rows.start]) for rows, x in self.inputs(chosen)])
        loss = self.task.loss(outputs.requires_grad_(), targets)
        loss.backward()
        assert outputs.grad is not None
        for rows, x in self.inputs(chosen):
            self._forward(x, seeds[rows.start]).backward(outputs.grad[rows])
        return loss.detach()

    def _forward(self, x: tuple[Tensor, ...], seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)  # of dropout
        dtype, kind = self.config.dtype, self.device.type
        with nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype):
            return self.model(*x)  # type: ignore[no-any-return]

    def _finite(self, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise FloatingPointError(f"expected a finite loss in epoch {self.epoch + 1}, got {value}: take a lower "
                                     "learning_rate")  # fmt: skip
        return value

    def _save(self) -> None:
        kept = {"epoch": self.epoch, "best_epoch": self.best_epoch, "best_loss": self.best_loss}
        state = kept | {"model": trained_state(self.model), "optimizer": self.optimizer.state_dict()}
        replace_file(self.folder / STATE, lambda path: torch.save(state, path))

    def _restore(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_epoch, self.best_loss = state["epoch"], state["best_epoch"], state["best_loss"]
