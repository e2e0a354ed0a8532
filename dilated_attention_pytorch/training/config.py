"""The settings of a training run, as one frozen value, and presets of it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.shift import SegmentShift
from dilated_attention_pytorch.models.config import LongNetConfig, ModelConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant", "warmup-stable-decay"]
VOCAB_SIZE = 256  # bytes; a zero byte ends each document

_FROM_ZERO = {"warmup_steps", "cpu_threads", "seed", "eval_excerpts"}  # the other ints begin at one


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shift(text: str) -> SegmentShift:
    return text if text == "alternate" else _ints(text) if "," in text else int(text)  # type: ignore[return-value]


# Names of the fields' types in messages, and how their values are read from text.
_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("an int", int),
    float: ("a float", float),
    tuple[int, ...]: ("ints with commas between them", _ints),
    tuple[str, ...]: ("words with commas between them", lambda text: tuple(text.split(","))),
    SegmentShift: ("an int, ints with commas between them or alternate", _shift),
}
_MODEL_FIELDS = LongNetConfig.__dataclass_fields__.keys()


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """Everything that decides the numbers of a run; folders and devices are arguments of `Trainer`.

    Args:
        num_layers: layers of the decoder.
        d_model, nhead, dim_feedforward, segment_lengths, dilation_rates, offsets, segment_shift: as in `LongNetConfig`.
        dropout, attention_dropout, tie_weights: as in `LongNetConfig`.
        vocab_size: tokens there are; 256 bytes by default.
        context: tokens that a prediction can look back on.
        packed: attention stays within each document of a sequence, by `cu_seqlens`; without, it goes across.
        batch_size: sequences of `context` tokens per step, over all ranks and micro-steps.
        micro_batch_size: sequences per forward; `batch_size / (ranks * micro_batch_size)` forwards accumulate.
        steps: optimizer steps; a run that is done goes on with more of them.
        learning_rate: peak of the schedule.
        schedule: after the warm-up half a cosine, a constant rate, or a constant one and then a linear decay.
        final_rate: share of the peak at the end of a decay.
        decay_share: share of the steps in the linear decay.
        warmup_steps: linear warm-up.
        weight_decay: of matrices; none for gains and biases.
        beta1, beta2: of AdamW.
        grad_clip: largest norm of the gradient.
        precision: `"fp32"`, `"bf16"` or `"fp16"` (autocast; in fp16 the loss is scaled), or `"auto"`: bf16 on CUDA,
            fp32 on a CPU.
        gradient_checkpointing: recompute activations in the backward.
        compile: torch.compile the model, or each of its layers where parameters are sharded.
        shard_parameters: shard parameters, gradients and optimizer states over all processes (FSDP2), in place of DDP.
        context_parallel: number of processes that share a sequence, one shard per process; parameters are then sharded
            too.
        cpu_threads: of a run on a CPU, 0 for torch's choice; the last bits of a run depend on it.
        seed: of the first weights, the order of the data and dropout.
        eval_excerpts: validation sequences per evaluation, spread over the split; 0 for all of it.
        eval_every: steps between evaluations; one more follows the last step.
        log_every: steps between lines of the record.
        checkpoint_every: steps between states on disk; an interruption and the end leave one too.
        keep_last: states that stay on disk.
        keep_best: save the step of the best evaluation too, and keep it.

    Raises:
        ValueError: a value out of range, or two that do not fit together.
        TypeError: a value of the wrong type.
    """

    # Fields that may change when a run is resumed: who computes, and what is written.
    FREE: ClassVar = {
        "log_every", "eval_every", "eval_excerpts", "checkpoint_every", "context_parallel", "shard_parameters", "steps",
        "keep_last", "keep_best",
    }  # fmt: skip

    d_model: int = 512
    nhead: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384)
    dilation_rates: tuple[int, ...] = (1, 2, 8)
    offsets: Literal["modulo", "blocked"] = "modulo"
    segment_shift: SegmentShift = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_weights: bool = True
    vocab_size: int = VOCAB_SIZE
    context: int = 16384
    packed: bool = False
    batch_size: int = 16
    micro_batch_size: int = 1
    steps: int = 10_000
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    final_rate: float = 0.1
    decay_share: float = 0.2
    warmup_steps: int = 500
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    shard_parameters: bool = False
    context_parallel: int = 1
    cpu_threads: int = 0
    seed: int = 0
    eval_excerpts: int = 64
    eval_every: int = 500
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 1
    keep_best: bool = False

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if kind is int:
                check.check_int(name, getattr(self, name), 0 if name in _FROM_ZERO else 1)
            elif kind is bool:
                check.check_bool(name, getattr(self, name))
        for name in ("learning_rate", "grad_clip"):
            check.check_above_zero(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            check.check_probability(name, getattr(self, name))
        for name in ("final_rate", "decay_share"):
            if not 0 <= check.check_float(name, getattr(self, name)) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")
        if check.check_float("weight_decay", self.weight_decay) < 0:
            raise ValueError(f"expected weight_decay of at least 0, got {self.weight_decay}")
        check.check_choice("precision", self.precision, Precision)
        check.check_choice("schedule", self.schedule, Schedule)
        if self.warmup_steps >= self.steps:
            raise ValueError(f"expected warmup_steps below steps, got {self.warmup_steps} and {self.steps}")
        batch, micro, context, shards = self.batch_size, self.micro_batch_size, self.context, self.context_parallel
        if batch % micro:
            raise ValueError(f"expected batch_size to be a multiple of micro_batch_size, got {batch} and {micro}")
        if context < shards:
            raise ValueError(f"expected context of at least context_parallel, got {context} and {shards}")
        if self.packed and (shards > 1 or self.compile):
            other = "compile=False" if self.compile else "context_parallel=1"
            raise ValueError(f"expected {other} with packed=True: documents have other lengths in each step")
        pattern = self.model_config().pattern
        object.__setattr__(self, "segment_lengths", pattern.segment_lengths)
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)
        object.__setattr__(self, "segment_shift", self.model_config().segment_shift)
        self.model_config().shifts(self.num_layers)

    def model_config(self) -> LongNetConfig:
        """The model's share of the config."""
        shared = {name: getattr(self, name) for name in self.__dataclass_fields__.keys() & _MODEL_FIELDS}
        return LongNetConfig(**shared, num_decoder_layers=self.num_layers, activation="gelu")

    def dtype(self, device: torch.device) -> torch.dtype:
        """What autocast computes in on a device; fp32 for no autocast."""
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        return {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    def micro_steps(self, world_size: int) -> int:
        """The number of forwards that a rank accumulates per step.

        Args:
            world_size: number of processes; `context_parallel` of them share each sequence.

        Raises:
            ValueError: processes that do not make whole groups, or a batch that they cannot share evenly.
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

    def changed(self, values: Mapping[str, Any]) -> TrainConfig:
        """The config with some fields changed, by values or by text as `--set name=value` gives them.

        Raises:
            ValueError: an unknown name, or text that does not name a value of the field's type.
        """
        hints = typing.get_type_hints(type(self))
        kinds = {field.name: hints[field.name] for field in fields(self)}
        return replace(self, **read_values(values, kinds, "a field of the training config"))


def read_values(values: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values by name, of the types in `kinds`: text is read, and what is no text stays. An error is as of `changed`."""
    found = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"expected {what}, got {check.quoted(name)}; known are {sorted(kinds)}")
        expected, read = _READERS.get(kinds[name], ("text", str))
        try:
            found[name] = read(value) if isinstance(value, str) else value
        except (ValueError, KeyError):
            raise ValueError(f"expected {expected} for {name}, got {check.quoted(value)}") from None
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Names and values of a YAML or JSON file, such as a run's `train.json`; of a mapping in it by `outer.inner`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of settings at {path}, found none")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML; 1e-05 is text to it, and read as such
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"expected YAML or JSON in {path}, got: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected names and values in {path}, got {check.shown(values)}")
    inner = {f"{name}.{key}": x for name, one in values.items() if isinstance(one, dict) for key, x in one.items()}
    return {str(name): x for name, x in values.items() if not isinstance(x, dict)} | inner


PRESETS: Mapping[str, TrainConfig] = {
    # Five minutes of CPU time: more steps beat more parameters there, and most of what a byte depends on is near
    # (docs/training.md has the trials). One thread: beside other work, two wait for each other in busy loops.
    "demo": TrainConfig(
        d_model=128, nhead=2, num_layers=2, dim_feedforward=512,
        segment_lengths=(128, 1024, 4096), dilation_rates=(1, 4, 16), context=4096, batch_size=1,
        steps=540, learning_rate=4e-3, final_rate=0.0, warmup_steps=100, beta1=0.8, cpu_threads=1,
        eval_excerpts=32, eval_every=135, log_every=1, checkpoint_every=135,
    ),
    # About an hour of one recent GPU.
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
    """A preset by name; an unknown one is a ValueError."""
    if name not in PRESETS:
        raise ValueError(f"expected preset to be one of {sorted(PRESETS)}, got {check.quoted(name)}")
    return PRESETS[name]
