"""`LongNetLM` as a transformers model: `from_pretrained`, `generate`, `Trainer`, the Auto classes."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dilated_attention_pytorch.models.checkpoint import check_head_groups
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.layers import FeedForward
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.modules import MultiheadDilatedAttention


class LongNetHFConfig(PreTrainedConfig):
    """The shape of a `LongNetForCausalLM`, model type `longnet`.

    Fields are those of `LongNetConfig` that a language model has, with its names and defaults; transformers' own names
    (`hidden_size`, `num_attention_heads`, ...) lead to them. `backend` names the kernels of the attention.

    Raises:
        ValueError: a value that `LongNetConfig` refuses.

    Example:
        >>> config = LongNetHFConfig(vocab_size=256, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=128)
        >>> config.hidden_size
        64
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers reads it as it is)
        "hidden_size": "d_model",
        "num_attention_heads": "nhead",
        "num_key_value_heads": "num_kv_heads",
        "num_hidden_layers": "num_decoder_layers",
        "intermediate_size": "dim_feedforward",
    }

    vocab_size: int = 256
    d_model: int = 768
    nhead: int = 12
    num_kv_heads: int | None = None
    num_decoder_layers: int = 12
    dim_feedforward: int = 3072
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
    backend: str = "auto"
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # One tensor under one name serves both ends (LongNetLM): transformers has nothing to tie.
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        self.core()

    def core(self) -> LongNetConfig:
        """The library's own config, which checks every value."""
        names = LongNetConfig.__dataclass_fields__.keys() - {"num_encoder_layers", "padding"}
        return LongNetConfig(**{name: getattr(self, name) for name in names})


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """LongNet (arXiv 2307.02486) as a causal language model of transformers; the module inside is a `LongNetLM`.

    `generate` uses transformers' `DynamicCache`, which keeps every key; `LongNetLM.generate` keeps those in sight.
    Batches are padded on the left for `generate`, on either side otherwise.

    Args:
        config: a `LongNetHFConfig`.
    """

    config_class = LongNetHFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Layer",)

    def __init__(self, config: LongNetHFConfig) -> None:
        super().__init__(config)
        self.model = LongNetLM(config.core(), backend=config.backend)  # type: ignore[arg-type]
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False  # the attention is LongNet's own

    def _init_weights(self, module: nn.Module) -> None:
        """MAGNETO's start, as in `LongNetLM`; transformers calls it for weights that a checkpoint lacks."""
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
            return
        # transformers asks for the layers that hold weights; the modules around them know how those start. It keeps
        # loaded weights itself, within torch's own init functions.
        owners = (MultiheadDilatedAttention, FeedForward, LongNetLM)
        module = next((m for m in self.modules() if isinstance(m, owners) and module in m.children()), module)
        if isinstance(module, MultiheadDilatedAttention):
            module.reset_parameters()
        elif isinstance(module, FeedForward):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_normal_(linear.weight, gain=math.sqrt(math.log(2 * self.config.num_decoder_layers)))
                nn.init.zeros_(linear.bias)
        elif isinstance(module, LongNetLM):
            for end in (module.embed_tokens, module.output_projection):
                if end is not None:
                    nn.init.normal_(end.weight, std=self.config.d_model**-0.5)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; refuses a model made in legacy mode, whose layout no config holds."""
        check_head_groups(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer; None if the embedding serves as one."""
        return self.model.output_projection

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output layer."""
        self.model.output_projection = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the token after each position, and the loss of `labels`.

        Args:
            input_ids: int `(B, T)`: with a cache, the tokens that follow those in it.
            attention_mask: `(B, all tokens so far)`, 1 = real. Positions count from a row's first real token.
            past_key_values: a `DynamicCache`; only without gradients.
            labels: int `(B, T)`, -100 for none; shifted inside.
            use_cache: make a cache and return it; by default the config's, without gradients and right padding.
            logits_to_keep: number of last positions whose logits are computed; 0 for all.
            position_ids: ignored, though `generate` passes them: `attention_mask` says where a row starts.
            return_dict: False for a tuple.
            kwargs: `num_items_in_batch` for the loss; others must be None or False.

        Returns:
            loss, logits `(B, T, vocab_size)` and past_key_values.

        Raises:
            ValueError: a static cache, right padding with a cache, an argument that LongNet does not have.
        """
        items = kwargs.pop("num_items_in_batch", None)
        if wrong := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise ValueError(f"expected arguments of LongNetForCausalLM.forward, got {wrong}, which it does not have")
        padding = _Padding.of(attention_mask)
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled() and padding.is_left()
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is None:
            hidden = self.model.hidden(input_ids, key_padding_mask=padding.mask, row_start=padding.row_start)
        else:
            cache = _Cache(past_key_values, self.config.num_decoder_layers, input_ids, padding)
            hidden = self.model.hidden(input_ids, cache=cache)  # type: ignore[arg-type]
        logits = self.model.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            extra = {} if items is None else {"num_items_in_batch": items}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)
        return out if return_dict is not False else out.to_tuple()


class _Padding(NamedTuple):
    """The padding of a batch; both None if no row is padded."""

    mask: Tensor | None = None  # (B, tokens) bool, True = real
    row_start: Tensor | None = None  # (B,)

    @classmethod
    def of(cls, attention_mask: Tensor | None) -> _Padding:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"expected attention_mask of shape (B, tokens), got {tuple(attention_mask.shape)}")
        if attention_mask is None or bool(attention_mask.all()):
            return cls()
        return cls(attention_mask.bool(), attention_mask.int().argmax(1))

    def is_left(self) -> bool:
        """True if only positions before a row's first token are hidden."""
        if self.mask is None or self.row_start is None:
            return True
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        return torch.equal(positions >= self.row_start[:, None], self.mask)


class _Cache:
    """A cache of `LongNetLM` on top of transformers' own: all keys stay, so beams can be reordered."""

    def __init__(self, cache: DynamicCache, num_layers: int, tokens: Tensor, padding: _Padding) -> None:
        self.row_start, self.length = padding.row_start, int(cache.get_seq_length())
        total, given = self.length + tokens.shape[1], padding.mask
        if getattr(cache, "is_compileable", False):
            raise ValueError(f"expected a DynamicCache, which grows, got a {type(cache).__name__}")
        if given is not None and given.shape[1] != total:
            raise ValueError(f"expected attention_mask of {total} tokens, old and new ones, got {given.shape[1]}")
        if not padding.is_left():
            raise ValueError("expected padding on the left alone with a cache, got an attention_mask with 0 after 1")
        self.layers = [_Layer(cache, i, self.length) for i in range(num_layers)]

    # Steps of LongNetLM's own cache that this one does not need: layers are made on demand, batches may be reordered.

    def check(self, *_: int) -> None: ...

    begin = commit = check


class _Layer:
    def __init__(self, cache: DynamicCache, index: int, length: int) -> None:
        self._cache, self._index, self.length = cache, index, length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        keys, values = self._cache.update(key.transpose(1, 2), value.transpose(1, 2), self._index)
        return keys.transpose(1, 2), values.transpose(1, 2), 0
