"""The shape of a model, as one frozen value that goes to JSON and back, and the base of models made from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import nn

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Positions
from dilated_attention_pytorch.core.shift import SegmentShift, check_segment_shift, layer_shifts
from dilated_attention_pytorch.types import BackendName, MixingGradient, Offsets, Padding

Activation = Literal["relu", "gelu"]
Probability = Annotated[float, check.check_probability]
AboveZero = Annotated[float, check.check_above_zero]
Width = Annotated[int, check.check_width]
Depth = Annotated[int, check.check_depth]
Shift = Annotated[SegmentShift, check_segment_shift]
Count = Annotated[int, lambda name, value: check.check_int(name, value, 0, 1 << 24)]


def _checked(name: str, value: Any, annotation: Any) -> Any:
    kind, args = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return check.check_choice(name, value, annotation)
    if kind is Annotated:
        return args[1](name, value)
    if type(None) in args:
        return None if value is None else _checked(name, value, args[0])
    if kind is tuple:
        return check.check_positive_ints(name, value)
    return check.check_bool(name, value) if annotation is bool else check.check_positive_int(name, value)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base of all models' configs: holds each field to its annotation; to JSON and back."""

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self), include_extras=True).items():
            # JSON gives lists, a frozen value holds tuples.
            object.__setattr__(self, name, _checked(name, getattr(self, name), annotation))

    def to_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; absent fields take their defaults, any other key is a ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"expected values to be a mapping, got {check.shown(values)}")
        known = sorted(field.name for field in fields(cls))
        if unknown := sorted(map(str, set(values) - set(known))):
            got = check.listed(map(repr, unknown))
            raise ValueError(f"expected fields of {cls.__name__}, got unknown keys [{got}]; known are {known}")
        return cls(**values)


Config = TypeVar("Config", bound=ModelConfig)


class Model(nn.Module, Generic[Config]):
    """A model made from a config: subclasses are of `Model[<the config's class>]` and make their parts in `_build`."""

    config_class: ClassVar[type[ModelConfig]]

    def __init_subclass__(cls) -> None:
        for base in cls.__dict__.get("__orig_bases__", ()):
            if isinstance(origin := get_origin(base), type) and issubclass(origin, Model):
                (cls.config_class,) = get_args(base)

    def __init__(
        self,
        config: Config | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        kind: Any = self.config_class
        if config is not None and not isinstance(config, kind):
            raise TypeError(f"expected config to be a {kind.__name__}, got {check.shown(config)}")
        check.check_bool("gradient_checkpointing", gradient_checkpointing)
        check.check_factory(device, dtype)
        self.config: Config = replace(config or kind(), **overrides)
        self.gradient_checkpointing = gradient_checkpointing
        self._backend: BackendName = check.check_choice("backend", backend, BackendName)
        self._build(device=device, dtype=dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        # A setting that is given to a built model would be an attribute that nothing reads.
        if name in self.config_class.__dataclass_fields__ and not isinstance(getattr(type(self), name, None), property):
            raise AttributeError(
                f"expected {name} to be given before {type(self).__name__} is built, got {check.quoted(value)} for a "
                f"built one: make it with {name}=..., or from replace(model.config, {name}=...)"
            )
        super().__setattr__(name, value)

    def _build(self, **factory: Any) -> None:  # device and dtype of the parameters
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LongNetConfig(ModelConfig):
    """Everything that decides a LongNet's parameters and what it computes from them.

    Defaults are the paper's base model (arXiv 2307.02486, section 4.1 and appendix A); names are `nn.Transformer`'s.

    Args:
        d_model: width.
        nhead: attention heads, a divisor of d_model.
        num_kv_heads: key/value heads, a divisor of nhead; nhead by default.
        num_encoder_layers: layers of the encoder; `LongNetLM` has none.
        num_decoder_layers: layers of the decoder; `LongNetEncoder` has none.
        dim_feedforward: width inside the feed-forward network.
        segment_lengths: w_i, one per branch.
        dilation_rates: r_i, one per branch.
        dropout: of embeddings and of what each sublayer adds.
        attention_dropout: of attention weights.
        activation: `"relu"` or `"gelu"`.
        layer_norm_eps: epsilon of every LayerNorm.
        positions: `"rotary"`, `"xpos"` (causal models) or None.
        rotary_base: longest rotary wavelength over 2 pi.
        scale_base: xPos's decay length, in positions.
        offsets: `"modulo"` (the paper) or `"blocked"` (published checkpoints).
        mixing_gradient: `"exact"` or `"detached"`.
        padding: `"none"` or `"zero_keys"` (published checkpoints, without causality).
        segment_shift: c, which moves the borders of all segments: one number, one per layer of a stack, or
            `"alternate"`, half of the largest segment in every other layer.
        vocab_size: number of tokens; needed by `LongNetLM` alone.
        tie_weights: logits come from the embedding's own weights.

    Raises:
        ValueError: a value out of range; an unknown option.
        TypeError: a value of the wrong type.

    Example:
        >>> config = LongNetConfig(d_model=64, nhead=4, segment_lengths=[128, 512],
        ...                        dilation_rates=[1, 4])
        >>> LongNetConfig.from_dict(config.to_dict()) == config
        True
    """

    d_model: Width = 768
    nhead: Width = 12
    num_kv_heads: Width | None = None
    num_encoder_layers: Depth = 12
    num_decoder_layers: Depth = 12
    dim_feedforward: Width = 3072
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    activation: Activation = "relu"
    layer_norm_eps: AboveZero = 1e-5
    positions: Positions | None = "rotary"
    rotary_base: AboveZero = 10_000.0
    scale_base: AboveZero = 512.0
    offsets: Offsets = "modulo"
    mixing_gradient: MixingGradient = "exact"
    padding: Padding = "none"
    segment_shift: Shift = 0
    vocab_size: Width | None = None
    tie_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, kv_heads, shift = self.nhead, self.pattern.num_heads, self.segment_shift
        if self.d_model % heads:
            raise ValueError(f"expected d_model to be a multiple of nhead, got {self.d_model} and {heads}")
        if heads % kv_heads:
            raise ValueError(f"expected nhead to be a multiple of num_kv_heads, got {heads} and {kv_heads}")
        if self.padding == "zero_keys" and any(self.shifts(len(shift) if isinstance(shift, tuple) else 2)):
            raise ValueError(f"expected segment_shift=0 with padding='zero_keys', got {shift}")

    def shifts(self, num_layers: int) -> tuple[int, ...]:
        """The segment shift of each layer of a stack; a ValueError where as many are not given."""
        return layer_shifts(self.segment_shift, self.segment_lengths, num_layers)

    @property
    def pattern(self) -> DilatedPattern:
        """The dilated pattern of every layer."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.num_kv_heads or self.nhead, self.offsets)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ModelConfig):
    """The base of configs of slide encoders and vision transformers, which have timm's names."""

    depth: Depth = 12
    num_heads: Width = 16
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    drop_path: Probability = 0.1
    offsets: Offsets = "blocked"
    layer_norm_eps: AboveZero = 1e-5

    @property
    def layers(self) -> LongNetConfig:
        """The same layers as LongNet names them."""
        names = {
            "embed_dim": "d_model",
            "num_heads": "nhead",
            "depth": "num_encoder_layers",
            "ffn_dim": "dim_feedforward",
        }
        named = {names.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        shared = {field.name: named[field.name] for field in fields(LongNetConfig) if field.name in named}
        return LongNetConfig(**shared | {"activation": "gelu", "positions": None})
