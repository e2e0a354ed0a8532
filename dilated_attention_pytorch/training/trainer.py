"""The training loop: exact to resume, alike on one process and many."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from dilated_attention_pytorch.core.files import remove_leftovers
from dilated_attention_pytorch.models import LongNetLM, save_pretrained
from dilated_attention_pytorch.training import parallel
from dilated_attention_pytorch.training import state as state_file
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.corpus import Corpus
from dilated_attention_pytorch.training.data import held_out_excerpts, training_excerpts
from dilated_attention_pytorch.training.distributed import World
from dilated_attention_pytorch.training.evaluate import Evaluation, evaluate
from dilated_attention_pytorch.training.metrics import MetricsLog, peak_memory
from dilated_attention_pytorch.training.optimizer import adamw, learning_rate


class Interrupted(Exception):
    """A signal ended the run early; everything up to `step` is saved."""

    def __init__(self, step: int, signal_number: int) -> None:
        self.step, self.signal_number = step, signal_number
        super().__init__(f"interrupted after step {step}, which is saved; the same command goes on from there")


class Result(NamedTuple):
    """What a finished run leaves beside its files.

    Attributes:
        model: with `context_parallel`, rank 0 has a whole one; the others have their shard of it.
        evaluation: the last one.
    """

    model: LongNetLM
    evaluation: Evaluation


class Reporter(Protocol):
    """Who is told how a run goes; only rank 0's is."""

    def start(self, step: int, config: TrainConfig, num_parameters: int) -> None:
        """The run starts, or goes on, after `step` steps."""

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of the record."""

    def step(self, step: int) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The run is over, well or not."""


class Trainer:
    """Trains a byte-level `LongNetLM` in a folder, from wherever the folder's last state ends.

    The folder gets `state.pt` (for resume), `model.safetensors` and `config.json` (for use), `train.json` (what was
    asked for) and `metrics.jsonl` (what happened).

    Args:
        config: of the run.
        corpus: what it reads.
        folder: what it writes.
        world: from `distributed.join`.
        tensorboard: also write TensorBoard events.
        restart: start over, whatever the folder holds.
        reporter: who is told how it goes.

    Raises:
        ValueError: the folder's run has another config or corpus; a batch that the ranks cannot share evenly; a number
            of ranks that is no multiple of `context_parallel`.

    Example:
        >>> with join() as world:
        ...     result = Trainer(preset("demo"), build_corpus(), Path("runs/demo"), world=world).run()
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: Path,
        *,
        world: World,
        tensorboard: bool = False,
        restart: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self.config, self.corpus, self.folder, self.world = config, corpus, folder, world
        self.tensorboard = tensorboard
        self.reporter = reporter if world.is_main else None
        self.micro_steps = config.micro_steps(world.size)
        self.layout = parallel.arrange(world, config.context_parallel)
        self.held_out = held_out_excerpts(corpus.val, context=config.context, limit=config.eval_excerpts)
        if config.cpu_threads and world.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads)
        torch.manual_seed(config.seed)
        # Made on the CPU, so that the start does not depend on the device.
        model = LongNetLM(config.model_config(), gradient_checkpointing=config.gradient_checkpointing)
        self.model = model.to(world.device)
        self.step = 0
        self._restart = restart
        kept = None
        if not restart:
            kept = state_file.load_state(folder, config=config, fingerprint=corpus.fingerprint, model=self.model)
        if kept is not None:
            self.step = kept["step"]
            self.model.load_state_dict(kept["model"])
        if self.layout.mesh is not None:
            parallel.shard_model(self.model, self.layout.mesh)
        self.optimizer = adamw(self.model, config)
        if kept is not None:
            self.optimizer.load_state_dict(parallel.spread(kept["optimizer"], self.optimizer))
        self.runner: nn.Module = self._runner()
        self._signal = 0

    def run(self) -> Result:
        """Trains to the last step, saves, and returns the model.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP came. The step in hand was finished and saved; a second signal ends
                at once.
            FloatingPointError: a gradient that is not finite; the last state that was saved stays.
            ValueError: another process trains in the folder.
        """
        with contextlib.ExitStack() as held:
            log = self.world.first(partial(self._open, held))
            held.callback(self._tell, "stop")
            self._tell("start", self.step, self.config, sum(p.numel() for p in self.model.parameters()))
            with self._signals():
                evaluation = self._loop(log)
            return Result(self._whole_model(), evaluation)

    def _open(self, held: contextlib.ExitStack) -> MetricsLog:
        """The folder, held for this run, with what was asked for and the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(state_file.lock(self.folder))
        remove_leftovers(self.folder)
        if self._restart:  # now, not with the first save: nothing may go on from the old run
            (self.folder / state_file.FILE).unlink(missing_ok=True)
            self._restart = False
        settings = json.dumps(state_file.plain(self.config) | {"corpus": self.corpus.fingerprint}, indent=1)
        state_file.replace_text(self.folder / "train.json", settings + "\n")
        return held.enter_context(
            contextlib.closing(MetricsLog(self.folder, step=self.step, tensorboard=self.tensorboard))
        )

    def _tell(self, event: str, *values: Any) -> None:
        """Tell the reporter. A terminal that is gone, after SIGHUP or behind a closed pipe, ends no run."""
        if self.reporter is not None:
            with contextlib.suppress(OSError):
                getattr(self.reporter, event)(*values)

    def _loop(self, log: MetricsLog | None) -> Evaluation:
        config, evaluation = self.config, None
        seen, since = self.step, time.perf_counter()
        while self.step < config.steps:
            rate = learning_rate(config, self.step)
            loss, grad_norm = self._train_step(rate)
            self.step += 1
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                mean_loss = float(self.world.sum(loss)) / self.world.size
                now = time.perf_counter()
                tokens = (self.step - seen) * config.batch_size * config.context
                line = {"step": self.step, "loss": mean_loss, "bpb": mean_loss / math.log(2), "lr": rate}
                line |= {"grad_norm": float(grad_norm), "tokens_per_s": round(tokens / (now - since), 1)}
                self._record(log, line | {"memory_bytes": peak_memory(self.world.device)})
                seen, since = self.step, now
            if last or self.step % config.eval_every == 0:
                paused = time.perf_counter()
                evaluation = self._evaluate(log)
                since += time.perf_counter() - paused
            self._tell("step", self.step)
            # Ranks agree on a signal, so that none is left waiting for another.
            stop = self.world.any(bool(self._signal))
            if stop or last or self.step % config.checkpoint_every == 0:
                self.save()
            if stop and not last:
                raise Interrupted(self.step, self._signal or signal.SIGINT)
        if evaluation is None:  # nothing was left to train; the model may have been lost since
            self.save()
            evaluation = self._evaluate(None)
        return evaluation

    def _train_step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; this rank's mean loss and the gradient's norm."""
        config, world, layout = self.config, self.world, self.layout
        # Dropout's draws are a function of the step and the rank too: there is no random state to save. The first rank
        # of those that share a sequence draws what a rank with all of it would.
        torch.manual_seed(((config.seed * 1_000_003 + self.step) * 4099 + self.layout.seed) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = config.batch_size // layout.data_size
        batch = training_excerpts(
            self.corpus.train, context=config.context, seed=config.seed, step=self.step, batch_size=config.batch_size,
            first=layout.data_rank * share, count=share,
        ).to(world.device)  # fmt: skip
        total = torch.zeros((), device=world.device)
        for i, tokens in enumerate(batch.split(config.micro_batch_size)):
            # Gradients cross the wire once a step, with the last forward's.
            with parallel.gradients(self.runner, last=i + 1 == self.micro_steps):
                with self._autocast():
                    inputs, targets, whole = layout.shard(tokens)
                    logits = self.runner(inputs, **whole)
                    loss = self._loss(logits.flatten(0, 1).float(), targets.flatten()) / self.micro_steps
                loss.backward()
            total += loss.detach()
        grad_norm = parallel.complete(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        if not math.isfinite(grad_norm):  # of all ranks together, so all of them stop
            raise FloatingPointError(
                f"expected a finite gradient in step {self.step + 1}, got a norm of {float(grad_norm)}: the run ends, "
                "and its folder keeps the last state that was saved; a lower learning_rate or grad_clip may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over tokens; of a shard, scaled so that the mean over ranks is the mean over tokens."""
        if self.layout.mesh is None:
            return F.cross_entropy(logits, targets)
        # Shards may be unequal, so a mean of their means would weigh tokens differently.
        share = self.config.micro_batch_size * self.config.context / self.layout.context_size
        return F.cross_entropy(logits, targets, reduction="sum") / share

    def save(self) -> None:
        """Leave the present step on disk: the model for use, and the state; whole, however they are sharded."""
        weights = parallel.whole(self.model.state_dict(), keep=self.world.is_main)
        optimizer = parallel.whole(self.optimizer.state_dict(), keep=self.world.is_main)

        def write() -> None:
            save_pretrained(self.model if self.layout.mesh is None else self._unsharded(weights), self.folder)
            # Last, so that beside a state of the last step there is always its model.
            state_file.save_state(
                self.folder, step=self.step, config=self.config, fingerprint=self.corpus.fingerprint,
                model=weights, optimizer=optimizer,
            )  # fmt: skip

        self.world.first(write)

    def _whole_model(self) -> LongNetLM:
        """The model itself, or on rank 0 a whole copy of a sharded one."""
        if self.layout.mesh is None:
            return self.model
        weights = parallel.whole(self.model.state_dict(), keep=self.world.is_main)
        self.world.wait()  # no process leaves while another still gathers
        return self._unsharded(weights).to(self.world.device) if self.world.is_main else self.model

    def _unsharded(self, weights: dict[str, torch.Tensor]) -> LongNetLM:
        model = LongNetLM(self.config.model_config(), device="meta")
        model.load_state_dict(weights, assign=True)
        return model

    def _evaluate(self, log: MetricsLog | None) -> Evaluation:
        result = evaluate(
            self.model, self.held_out, self.world, batch_size=self.config.micro_batch_size, autocast=self._autocast,
            layout=self.layout,
        )  # fmt: skip
        self._record(log, {"step": self.step, "val_loss": result.loss, "val_bpb": result.bits_per_byte})
        return result

    def _record(self, log: MetricsLog | None, line: dict[str, Any]) -> None:
        if log is not None:
            log.write(line)
            self._tell("metrics", line)

    def _autocast(self) -> torch.autocast:
        precision, kind = self.config.precision, self.world.device.type
        enabled = precision == "bf16" or (precision == "auto" and kind == "cuda")
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled)

    def _runner(self) -> nn.Module:
        """The model as the training step calls it. Its parameters are the model's own."""
        runner: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.world.size == 1 or self.layout.mesh is not None:
            return runner  # type: ignore[no-any-return]
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(runner, device_ids=devices)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, the first SIGINT, SIGTERM or SIGHUP asks for a stop after the step; the second acts as ever."""
        previous: dict[int, Any] = {}

        def handle(number: int, frame: Any) -> None:
            if self._signal:
                signal.signal(number, previous[number])
                os.kill(os.getpid(), number)
            self._signal = number

        wanted = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP; under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        with contextlib.suppress(ValueError):  # not the main thread, which alone receives signals
            for number in wanted:
                previous[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for caught, handler in previous.items():
                signal.signal(caught, handler)
