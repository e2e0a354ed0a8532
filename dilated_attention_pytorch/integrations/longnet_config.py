"""The config of LongNet's models among those of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dilated_attention_pytorch.models.config import LongNetConfig

_NOT_HERE = {"num_encoder_layers", "padding"}  # of LongNetConfig's fields


class LongNetHFConfig(PreTrainedConfig):
    """The shape of the LongNet models below, model type `longnet`.

    Fields have transformers' names, which other libraries read (PEFT), and `LongNetConfig`'s lead to them: `d_model` is
    `hidden_size`, `nhead` is `num_attention_heads`, `num_kv_heads` is `num_key_value_heads`, `num_decoder_layers` is
    `num_hidden_layers` and `dim_feedforward` is `intermediate_size`. The others, and all defaults, are
    `LongNetConfig`'s. `backend` names the kernels of the attention.

    Raises:
        ValueError: a value that `LongNetConfig` refuses; `tie_word_embeddings`, which is called `tie_weights` here.

    Example:
        >>> config = LongNetHFConfig(vocab_size=256, d_model=64, nhead=4, num_decoder_layers=2,
        ...                          dim_feedforward=128)
        >>> config.hidden_size
        64
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds to it, so no tuple)
    attribute_map = {  # noqa: RUF012 (transformers reads it as it is)
        "d_model": "hidden_size",
        "nhead": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "num_decoder_layers": "num_hidden_layers",
        "dim_feedforward": "intermediate_size",
    }

    vocab_size: int = 256
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    segment_lengths: list[int] | tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation: str = "relu"
    layer_norm_eps: float = 1e-5
    positions: str | None = "rotary"
    rotary_base: float = 10_000.0
    scale_base: float = 512.0
    offsets: str = "modulo"
    mixing_gradient: str = "exact"
    segment_shift: int | list[int] | tuple[int, ...] | str = 0
    tie_weights: bool = False
    tie_word_embeddings: bool = False
    backend: str = "auto"
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # One tensor under one name serves both ends (LongNetLM): transformers has nothing to tie.
        if self.tie_word_embeddings:
            raise ValueError(
                "expected tie_weights=True for an output layer with the embedding's weights, got "
                "tie_word_embeddings=True"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # As they were checked: other kinds of int would not be saved, nor computed with.
        for name, value in self.core().to_dict().items():
            if name not in _NOT_HERE:
                setattr(self, name, value)

    def core(self) -> LongNetConfig:
        """The library's own config, which checks every value."""
        names = LongNetConfig.__dataclass_fields__.keys() - _NOT_HERE
        return LongNetConfig(**{name: getattr(self, name) for name in names})
