"""The shape of a LongNet, as one frozen value that goes to JSON and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        if not isinstance(values, Mapping):
            raise TypeError(f"expected values to be a mapping, got {check.shown(values)}")
        known = sorted(field.name for field in fields(cls))
        if unknown := sorted(map(str, set(values) - set(known))):
            raise ValueError(f"expected fields of {cls.__name__}, got unknown keys {unknown}; known are {known}")
        return cls(**values)

    def _keep(self, check: Callable[[str, Any], Any], *names: str) -> None:
        """Replaces fields by what a check makes of them: plain numbers, as JSON has them."""
        self._set(**{name: check(name, getattr(self, name)) for name in names})

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
        self._keep(check.check_width, "d_model", "nhead", "dim_feedforward")
        self._keep(check.check_depth, "num_encoder_layers", "num_decoder_layers")
        self._keep(check.check_width, *(x for x in ("num_kv_heads", "vocab_size") if getattr(self, x) is not None))
        if self.d_model % self.nhead:
            raise ValueError(f"expected d_model to be a multiple of nhead, got {self.d_model} and {self.nhead}")
        self._keep(check.check_probability, "dropout", "attention_dropout")
        self._keep(check.check_above_zero, "layer_norm_eps", "rotary_base", "scale_base")
        options = {"activation": Activation, "mixing_gradient": MixingGradient, "padding": Padding}
        if self.positions is not None:
            options["positions"] = Positions
        self._set(**{name: check.check_choice(name, getattr(self, name), options[name]) for name in options})
        check.check_bool("tie_weights", self.tie_weights)
        pattern = self.pattern
        if self.nhead % pattern.num_heads:
            raise ValueError(
                f"expected nhead to be a multiple of num_kv_heads, got {self.nhead} and {self.num_kv_heads}"
            )
        self._set(
            segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates, offsets=pattern.offsets
        )

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
