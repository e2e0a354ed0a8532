"""What decides a training run, as one frozen value, and presets of it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.models import LongNetConfig

Precision = Literal["auto", "fp32", "bf16"]
VOCAB_SIZE = 256  # bytes; a zero byte ends each document


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the numbers of a run; where it reads, writes and computes is said elsewhere.

    Args:
        d_model: width.
        nhead: attention heads.
        num_layers: layers of the decoder.
        dim_feedforward: width inside the feed-forward network.
        segment_lengths: w_i, one a branch.
        dilation_rates: r_i, one a branch.
        offsets: `"modulo"` or `"blocked"`.
        dropout: of embeddings and sublayers.
        attention_dropout: of attention weights.
        tie_weights: logits come from the embedding's own weights.
        context: bytes that a prediction can look back on.
        batch_size: sequences of `context` bytes a step, over all ranks and micro-steps.
        micro_batch_size: sequences a forward; `batch_size / (ranks * micro_batch_size)` forwards accumulate.
        steps: optimizer steps.
        learning_rate: its peak.
        final_rate: share of the peak that the cosine ends on.
        warmup_steps: linear warm-up.
        weight_decay: of matrices; gains and biases have none.
        beta1: of AdamW.
        beta2: of AdamW.
        grad_clip: the gradient's largest norm.
        precision: `"fp32"`, `"bf16"` (autocast), or `"auto"`: bf16 on CUDA, fp32 on a CPU.
        gradient_checkpointing: compute activations again in the backward instead of keeping them.
        compile: torch.compile the model.
        context_parallel: how many processes share a sequence, each with a shard of it. Parameters, gradients and
            optimizer states are then sharded over all processes (FSDP2).
        cpu_threads: of a run on a CPU, 0 for torch's choice; sums, and so the last bits of a run, depend on it.
        seed: of the start, the order of the data and dropout.
        eval_excerpts: held-out sequences that an evaluation reads, spread over the split; 0 for all of it.
        eval_every: steps between evaluations; the last step always has one.
        log_every: steps between lines of the record.
        checkpoint_every: steps between states on disk; interruptions and the end always leave one.

    Raises:
        ValueError: a value out of range, or that does not fit another one.
        TypeError: a value of the wrong type.
    """

    # What may differ when a run is resumed: it changes what is written or who computes it, not what is computed.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"log_every", "eval_every", "eval_excerpts", "checkpoint_every", "context_parallel"}
    )

    d_model: int = 512
    nhead: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384)
    dilation_rates: tuple[int, ...] = (1, 2, 8)
    offsets: Literal["modulo", "blocked"] = "modulo"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_weights: bool = True
    context: int = 16384
    batch_size: int = 16
    micro_batch_size: int = 1
    steps: int = 10_000
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    warmup_steps: int = 500
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    context_parallel: int = 1
    cpu_threads: int = 0
    seed: int = 0
    eval_excerpts: int = 64
    eval_every: int = 500
    log_every: int = 10
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        at_least_one = ("context", "batch_size", "micro_batch_size", "steps", "context_parallel")
        for name in (*at_least_one, "eval_every", "log_every", "checkpoint_every"):
            check.check_positive_int(name, getattr(self, name))
        for name in ("warmup_steps", "cpu_threads", "seed", "eval_excerpts"):
            check.check_int(name, getattr(self, name), 0)
        for name in ("learning_rate", "final_rate", "weight_decay", "beta1", "beta2", "grad_clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"expected {name} to be a float, got {type(value).__name__} {value!r}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"expected final_rate in [0, 1], got {self.final_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"expected weight_decay of at least 0, got {self.weight_decay}")
        check.check_choice("precision", self.precision, Precision)
        for name in ("gradient_checkpointing", "compile"):
            check.check_bool(name, getattr(self, name))
        if self.warmup_steps >= self.steps:
            raise ValueError(f"expected warmup_steps below steps, got {self.warmup_steps} and {self.steps}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                "expected batch_size to be a multiple of micro_batch_size, "
                f"got {self.batch_size} and {self.micro_batch_size}"
            )
        if self.context < self.context_parallel:
            raise ValueError(
                f"expected context of at least context_parallel, got {self.context} and {self.context_parallel}"
            )
        if self.compile and self.context_parallel > 1:
            raise ValueError(f"expected compile=False with context_parallel={self.context_parallel}, got True")
        model = self.model_config()
        object.__setattr__(self, "segment_lengths", model.segment_lengths)
        object.__setattr__(self, "dilation_rates", model.dilation_rates)

    def model_config(self) -> LongNetConfig:
        """The model's share of the config."""
        return LongNetConfig(
            d_model=self.d_model,
            nhead=self.nhead,
            num_decoder_layers=check.check_positive_int("num_layers", self.num_layers),
            dim_feedforward=self.dim_feedforward,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            offsets=self.offsets,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation="gelu",
            vocab_size=VOCAB_SIZE,
            tie_weights=self.tie_weights,
        )

    def micro_steps(self, world_size: int) -> int:
        """How many forwards a rank accumulates in a step.

        Args:
            world_size: number of processes; `context_parallel` of them share each sequence.

        Raises:
            ValueError: processes that do not make whole groups; a batch that cannot be dealt out evenly.
        """
        if world_size % self.context_parallel:
            raise ValueError(
                f"expected a number of processes that is a multiple of context_parallel {self.context_parallel}, got "
                f"{world_size}; torchrun --nproc-per-node sets it"
            )
        readers = world_size // self.context_parallel
        share = readers * self.micro_batch_size
        if self.batch_size % share:
            who = "ranks" if self.context_parallel == 1 else f"groups of {self.context_parallel} ranks"
            raise ValueError(
                f"expected batch_size to be a multiple of {share} ({readers} {who} of micro_batch_size "
                f"{self.micro_batch_size}), got {self.batch_size}"
            )
        return self.batch_size // share

    def changed(self, values: Mapping[str, str]) -> TrainConfig:
        """The config with some fields read from text, as `--set name=value` gives them.

        Raises:
            ValueError: an unknown name, or text that is no value of the field's type.
        """
        kinds = typing.get_type_hints(type(self))
        known = {field.name for field in fields(self)}
        parsed: dict[str, Any] = {}
        for name, text in values.items():
            if name not in known:
                raise ValueError(f"expected a field of the training config, got {name!r}; known are {sorted(known)}")
            parsed[name] = _parse(name, text, kinds[name])
        return replace(self, **parsed)


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(","))
        return text
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "an int", float: "a float"}.get(kind, "ints with commas between them")
        raise ValueError(f"expected {expected} for {name}, got {text!r}") from None


PRESETS: Mapping[str, TrainConfig] = {
    # Five minutes of CPU time. At this budget more steps beat more parameters, and most of what a byte depends on is
    # near: docs/training.md has the trials behind these numbers. One thread: two would halve the time on an idle
    # machine, but where others compute too they wait for one another busily, and burn several times the CPU time.
    "demo": TrainConfig(
        d_model=128, nhead=2, num_layers=2, dim_feedforward=512,
        segment_lengths=(128, 1024, 4096), dilation_rates=(1, 4, 16), context=4096, batch_size=1,
        steps=540, learning_rate=4e-3, final_rate=0.0, warmup_steps=100, beta1=0.8, cpu_threads=1,
        eval_excerpts=32, eval_every=135, log_every=1, checkpoint_every=135,
    ),
    # An hour or so of one recent GPU.
    "small": TrainConfig(),
    # Twelve layers of 768, for several GPUs.
    "base": TrainConfig(
        d_model=768, nhead=12, num_layers=12, dim_feedforward=3072,
        segment_lengths=(2048, 4096, 8192, 16384, 32768), dilation_rates=(1, 2, 4, 6, 12), context=32768, batch_size=32,
        steps=50_000, learning_rate=6e-4, warmup_steps=2000, gradient_checkpointing=True,
        eval_every=1000, checkpoint_every=1000,
    ),
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"expected preset to be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
