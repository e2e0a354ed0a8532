"""The training loop: exact to resume, the same on one process and many."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from dilated_attention_pytorch.core.files import lock, remove_leftovers, replace_text
from dilated_attention_pytorch.models import LongNetLM, save_pretrained
from dilated_attention_pytorch.models.reach import warn_out_of_reach
from dilated_attention_pytorch.training import distributed, state
from dilated_attention_pytorch.training.checkpoint import Checkpoints
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.corpus import Corpus
from dilated_attention_pytorch.training.evaluate import Evaluation, evaluate, predict
from dilated_attention_pytorch.training.excerpts import check_length, training_excerpts, validation_excerpts
from dilated_attention_pytorch.training.metrics import check_boards, flops_per_sequence, peak_flops, peak_memory, record
from dilated_attention_pytorch.training.state import LossScale, adamw, learning_rate
from dilated_attention_pytorch.training.tokenizer import FILE

Report = Callable[[int, list[dict[str, Any]]], object]


class Interrupted(Exception):
    """A signal ended the run early; everything up to `step` is saved."""

    def __init__(self, step: int, signal_number: int) -> None:
        self.step, self.signal_number = step, signal_number
        super().__init__(f"interrupted after step {step}, which is saved; the same command goes on from there")


class Result(NamedTuple):
    """The results of a finished run, beside its files."""

    model: LongNetLM  # whole on rank 0; on another rank its share, where parameters are sharded
    evaluation: Evaluation  # the last one


class Trainer:
    """Train a `LongNetLM` in a folder, from the folder's last state on.

    The folder gets `step-N/` (for resume), `train.json` (the settings), `metrics.jsonl` (the record), and at the end
    `model.safetensors` and `config.json` (for use).

    Args:
        config: of the run.
        corpus: text to train on.
        folder: of the run.
        world: from `distributed.join`.
        tensorboard: also write TensorBoard events.
        wandb: a project of Weights & Biases to write to as well.
        init_from: a folder of `save_pretrained` with the first weights; they may come from another context or pattern.
        restart: start over, whatever the folder holds.

    Raises:
        ValueError: the folder's run is damaged or has another config or corpus; a batch that the ranks cannot share
            evenly; a number of ranks that `context_parallel` does not divide; a vocabulary that is not the corpus's;
            too little text for the context.
        ImportError: TensorBoard or Weights & Biases are wanted and not installed.

    Example:
        >>> with join() as world:
        ...     result = Trainer(preset("demo"), build_corpus(), Path("runs/demo"),
        ...                      world=world).run()
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: Path,
        *,
        world: distributed.World,
        tensorboard: bool = False,
        wandb: str | None = None,
        init_from: Path | None = None,
        restart: bool = False,
    ) -> None:
        self.config, self.corpus, self.folder, self.world = config, corpus, folder, world
        self._boards: Any = {"tensorboard": tensorboard, "wandb": wandb}
        check_boards(**self._boards)
        exact = corpus.end_token is not None  # what draws a token has to find its text
        if corpus.vocab_size > config.vocab_size or (exact and corpus.vocab_size < config.vocab_size):
            least = "" if exact else "at least "
            raise ValueError(f"expected vocab_size of {least}the corpus's {corpus.vocab_size}, got {config.vocab_size}")
        if config.packed and corpus.end_token is None:
            raise ValueError("expected a corpus whose documents end with a token with packed=True, got none known")
        self.micro_steps = config.micro_steps(world.size)
        self.layout = distributed.arrange(world, config.context_parallel, sharded=config.shard_parameters)
        check_length(corpus.train, config.context)
        self.held_out = validation_excerpts(corpus.val, context=config.context, limit=config.eval_excerpts)
        if config.cpu_threads and world.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads)
        dtype = config.dtype(world.device)
        half = None if dtype is torch.float32 else dtype
        shape = config.model_config()
        warn_out_of_reach(shape.pattern, shape.shifts(config.num_layers), config.context)
        self.model = LongNetLM(shape, gradient_checkpointing=config.gradient_checkpointing, device="meta")
        self.step, self._signal, self._restart = 0, 0, restart
        self._write: Callable[[dict[str, Any]], object] = lambda line: None  # of the record; on rank 0, see `_open`
        self.scale = LossScale(dtype)
        self.checkpoints = Checkpoints(folder, world, keep=config.keep_last)
        kept = None if restart else self.checkpoints.newest()
        if kept is not None:
            state.check_about(kept, folder, config, corpus.fingerprint)
        if self.layout.mesh is not None:
            distributed.shard_model(self.model, self.layout.mesh, half=half, compiled=config.compile)
        self.model.to_empty(device=world.device)
        self.optimizer = adamw(self.model, config)
        if kept is None and init_from is not None:
            state.take_weights(self.model, init_from)
        elif kept is None:
            distributed.first_weights(self.model, config.seed)
        else:
            self.step = kept["step"]
            self.scale.state = kept.get("loss_scale", self.scale.state)
            self.checkpoints.best = kept.get("best")
            self.checkpoints.load(self.step, state.tensors(self.model, self.optimizer))
        self.runner: nn.Module = self._runner()
        self._autocast = partial(torch.autocast, world.device.type, dtype=dtype, enabled=half is not None)
        how: Any = {"batch_size": config.micro_batch_size, "autocast": self._autocast, "layout": self.layout}
        how |= {"end_token": corpus.end_token, "bytes_per_token": corpus.bytes_per_token, "packed": config.packed}
        peak = peak_flops(world.device) if half is not None else None
        self._mfu = flops_per_sequence(config) / config.context / world.size / peak if peak else None  # by tokens/s
        self._evaluate: Callable[[], Evaluation] = partial(evaluate, self.model, self.held_out, world, **how)

    def run(self, report: Report = lambda step, lines: None) -> Result:
        """Train to the last step, save, and return the model.

        Args:
            report: called on rank 0 after each step, with its number and its lines of the record: none, one or two.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP came. The step in hand was finished and saved; a second signal ends
                at once.
            FloatingPointError: a gradient that is not finite; the last state that was saved stays.
            ValueError: another process trains in the folder.
        """
        with contextlib.ExitStack() as held:
            self.world.first(partial(self._open, held))
            held.callback(self.checkpoints.close)
            with contextlib.ExitStack() as caught:
                self._catch_signals(caught)
                evaluation = self._loop(report)
            return Result(self.world.first(self._export) or self.model, evaluation)

    def _open(self, held: contextlib.ExitStack) -> None:
        """Lock the folder, write the settings and open the record, until `held` closes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(self.folder))
        remove_leftovers(self.folder)
        self.checkpoints.sweep(everything=self._restart)  # now: nothing may go on from the old run
        self._restart = False
        more = {"data": self.corpus.made_from, "corpus": self.corpus.fingerprint}
        replace_text(self.folder / "train.json", json.dumps(self.config.to_dict() | more, indent=1) + "\n")
        if (self.corpus.folder / FILE).is_file():
            shutil.copyfile(self.corpus.folder / FILE, self.folder / FILE)
        log_every = self.config.log_every
        self._write = held.enter_context(record(self.folder, step=self.step, log_every=log_every, **self._boards))

    def _loop(self, report: Report) -> Evaluation:
        config, states, evaluation = self.config, self.checkpoints, None
        seen, since = self.step, time.perf_counter()
        while self.step < config.steps:
            rate = learning_rate(config, self.step)
            loss, grad_norm = self._train_step(rate)
            self.step += 1
            lines: list[dict[str, Any]] = []
            better = False
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                mean_loss = float(self.world.sum(loss)) / self.world.size
                now = time.perf_counter()
                tokens = (self.step - seen) * config.batch_size * config.context
                speed, bits = tokens / (now - since), mean_loss / math.log(2) / self.corpus.bytes_per_token
                line: dict[str, Any] = {"step": self.step, "loss": mean_loss, "bpb": bits, "lr": rate}
                line |= {"grad_norm": float(grad_norm) if grad_norm.isfinite() else None}
                line |= {"tokens_per_s": round(speed, 1), "memory_bytes": peak_memory(self.world.device)}
                lines.append(line if self._mfu is None else line | {"mfu": round(speed * self._mfu, 4)})
                seen, since = self.step, now
            if last or self.step % config.eval_every == 0:
                paused = time.perf_counter()
                evaluation = self._evaluate()
                line = {"step": self.step, "val_loss": evaluation.loss, "val_bpb": evaluation.bits_per_byte}
                lines.append(line | {"val_loss_by_position": evaluation.by_position})
                since += time.perf_counter() - paused
                better = config.keep_best and (states.best is None or evaluation.loss < states.best[0])
                if better:
                    states.best = evaluation.loss, self.step
            for line in lines:
                self._write(line)
            # A terminal that is gone, after SIGHUP or behind a closed pipe, ends no run.
            with contextlib.suppress(OSError):
                if self.world.is_main:
                    report(self.step, lines)
            # Ranks agree on a signal: none is left waiting for another.
            stop = self.world.any(bool(self._signal))
            if stop or last or better or self.step % config.checkpoint_every == 0:
                self.save()
            if stop and not last:
                states.wait()
                raise Interrupted(self.step, self._signal or signal.SIGINT)
        states.wait()
        return evaluation or self._evaluate()  # nothing was left to train

    def _train_step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; this rank's mean loss and the gradient's norm."""
        config, world, layout = self.config, self.world, self.layout
        # Dropout is a function of step and rank: there is no random state to save.
        torch.manual_seed(((config.seed * 1_000_003 + self.step) * 4099 + layout.seed) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = config.batch_size // layout.data_size
        batch = training_excerpts(
            self.corpus.train, context=config.context, seed=config.seed, step=self.step, batch_size=config.batch_size,
            first=layout.data_rank * share, count=share,
        ).to(world.device)  # fmt: skip
        total = torch.zeros((), device=world.device)
        for i, tokens in enumerate(batch.split(config.micro_batch_size)):
            with distributed.gradients(self.runner, last=i + 1 == self.micro_steps):
                with self._autocast():
                    inputs, targets, whole = layout.shard(tokens)
                    logits = predict(self.runner, inputs, self.corpus.end_token if config.packed else None, **whole)
                    loss = self._loss(logits.flatten(0, 1).float(), targets.flatten()) / self.micro_steps
                (loss * self.scale.factor).backward()
            total += loss.detach()
        if self.scale.factor != 1.0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale.factor)
        grad_norm = distributed.complete(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        finite = math.isfinite(grad_norm)  # the same on all ranks, so all of them stop, or leave the step out
        if not self.scale.update(finite):
            raise FloatingPointError(
                f"expected a finite gradient in step {self.step + 1}, got a norm of {float(grad_norm)}: the run ends, "
                "and its folder keeps the last state that was saved; start over with a lower learning_rate"
            )
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over tokens; of a shard, scaled so that the mean over ranks is the mean over tokens."""
        if self.layout.context_size == 1:
            return F.cross_entropy(logits, targets)
        # Shards may be unequal; a mean of their means would weigh tokens differently.
        share = self.config.micro_batch_size * self.config.context / self.layout.context_size
        return F.cross_entropy(logits, targets, reduction="sum") / share

    def save(self) -> None:
        """Begin to write the state after the present step; it counts once `checkpoints.wait` has returned."""
        about: dict[str, Any] = {"config": self.config.to_dict(), "model": self.config.model_config().to_dict()}
        about |= {"fingerprint": self.corpus.fingerprint, "loss_scale": self.scale.state, "best": self.checkpoints.best}
        self.checkpoints.save(self.step, state.tensors(self.model, self.optimizer), about)

    def _export(self) -> LongNetLM:
        """Leave the trained model beside the states, whole; in the main process, which has memory for it on its CPU."""
        model, _ = state.trained_model(self.folder)
        save_pretrained(model, self.folder)
        return model.to(self.world.device)

    def _runner(self) -> nn.Module:
        """The model as the training step calls it, with the model's own parameters."""
        if self.layout.mesh is not None:
            return self.model  # its layers are compiled, each for itself
        runner = cast("nn.Module", torch.compile(self.model)) if self.config.compile else self.model
        if self.world.size == 1:
            return runner
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(runner, device_ids=devices)

    def _catch_signals(self, held: contextlib.ExitStack) -> None:
        """Until `held` closes, the first SIGINT, SIGTERM or SIGHUP asks for a stop after the step; the second acts as
        ever."""
        previous: dict[int, Any] = {}

        def handle(number: int, frame: Any) -> None:
            if self._signal:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            self._signal = number

        wanted = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP; under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        with contextlib.suppress(ValueError):  # not the main thread, which alone receives signals
            for number in wanted:
                previous[number] = signal.signal(number, handle)
                held.callback(signal.signal, number, previous[number])
