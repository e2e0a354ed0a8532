"""The shape of a LongNet, as one frozen value that goes to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Positions
from dilated_attention_pytorch.types import MixingGradient, Offsets, Padding

Activation = Literal["relu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base of all models' configs: to JSON and back."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; absent fields take their defaults.

        Raises:
            ValueError: a key that is no field, by name.
        """
        known = sorted(field.name for field in fields(cls))
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"expected fields of {cls.__name__}, got unknown keys {unknown}; known are {known}")
        return cls(**values)

    def _set(self, **values: Any) -> None:
        """Replaces fields by their checked values: JSON gives lists, a frozen value holds tuples."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


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
        vocab_size: number of tokens; needed by `LongNetLM` alone.
        tie_weights: logits come from the embedding's own weights.

    Raises:
        ValueError: a value out of range; an unknown option.
        TypeError: a value of the wrong type.

    Example:
        >>> config = LongNetConfig(d_model=64, nhead=4, segment_lengths=[128, 512], dilation_rates=[1, 4])
        >>> LongNetConfig.from_dict(config.to_dict()) == config
        True
    """

    d_model: int = 768
    nhead: int = 12
    num_kv_heads: int | None = None
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    dim_feedforward: int = 3072
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation: Activation = "relu"
    layer_norm_eps: float = 1e-5
    positions: Positions | None = "rotary"
    rotary_base: float = 10_000.0
    scale_base: float = 512.0
    offsets: Offsets = "modulo"
    mixing_gradient: MixingGradient = "exact"
    padding: Padding = "none"
    vocab_size: int | None = None
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward"):
            check.check_positive_int(name, getattr(self, name))
        for name in ("num_kv_heads", "vocab_size"):
            if getattr(self, name) is not None:
                check.check_positive_int(name, getattr(self, name))
        if self.d_model % self.nhead:
            raise ValueError(f"expected d_model to be a multiple of nhead, got {self.d_model} and {self.nhead}")
        for name in ("dropout", "attention_dropout"):
            check.check_probability(name, getattr(self, name))
        for name in ("layer_norm_eps", "rotary_base", "scale_base"):
            check_above_zero(name, getattr(self, name))
        options = {"activation": Activation, "mixing_gradient": MixingGradient, "padding": Padding}
        for name, allowed in options.items():
            check.check_choice(name, getattr(self, name), allowed)
        if self.positions is not None:
            check.check_choice("positions", self.positions, Positions)
        check.check_bool("tie_weights", self.tie_weights)
        pattern = self.pattern
        if self.nhead % pattern.num_heads:
            raise ValueError(
                f"expected nhead to be a multiple of num_kv_heads, got {self.nhead} and {self.num_kv_heads}"
            )
        self._set(segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)

    @property
    def pattern(self) -> DilatedPattern:
        """The dilated pattern of every layer."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.num_kv_heads or self.nhead, self.offsets)


def encoder_layers(config: Any, **options: Any) -> LongNetConfig:
    """The layers of a slide encoder or vision transformer, whose config has timm's names, as LongNet names them."""
    return LongNetConfig(
        d_model=config.embed_dim,
        nhead=config.num_heads,
        num_encoder_layers=config.depth,
        dim_feedforward=config.ffn_dim,
        segment_lengths=config.segment_lengths,
        dilation_rates=config.dilation_rates,
        dropout=config.dropout,
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        positions=None,
        offsets=config.offsets,
        **options,
    )


def check_above_zero(name: str, value: object) -> None:
    """Raises unless a value is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected {name} to be a float, got {type(value).__name__} {value!r}")
    if not value > 0:
        raise ValueError(f"expected {name} above 0, got {value}")
