"""LongNet as models of transformers: `from_pretrained`, `generate`, `Trainer`, PEFT, the Auto classes.

All three hold a `LongNetLM`: as it is, without causality for masked tokens, and with a classifier in place of the
output layer.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from dilated_attention_pytorch.core.validation import check_dense, check_instance, check_int, check_values, quoted
from dilated_attention_pytorch.integrations.longnet_cache import HFCache, StaticStep
from dilated_attention_pytorch.integrations.longnet_config import LongNetHFConfig as LongNetHFConfig
from dilated_attention_pytorch.integrations.rows import Rows
from dilated_attention_pytorch.models.checkpoint import check_head_groups
from dilated_attention_pytorch.models.layers import FeedForward
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.modules import MultiheadDilatedAttention


class Options(TypedDict, total=False):
    """Further arguments of the models' `forward`; any other must be None or False."""

    output_hidden_states: bool | None  # what the first layer gets and what each gives; by default the config's
    return_dict: bool | None  # False for a tuple
    num_items_in_batch: Tensor | int | None  # that the loss is divided by
    # How documents lie in rows, as collators of transformers and TRL say it; position_ids that restart say it too.
    cu_seq_lens_q: Tensor | None  # int32 (documents + 1,), bounds in one row
    cu_seq_lens_k: Tensor | None  # the same
    seq_idx: Tensor | None  # int (B, T), the number of each token's document
    max_length_q: int | None  # not needed, like the next
    max_length_k: int | None


class CausalOptions(Options, total=False):
    """Those of the causal model."""

    use_cache: bool | None  # make a cache and return it; by default the config's, without gradients, if rows allow it


class _LongNetModel(PreTrainedModel):
    """What the models below share; the module inside is a `LongNetLM`."""

    config_class = LongNetHFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Layer",)

    def __init__(self, config: LongNetHFConfig) -> None:
        super().__init__(config)
        self.model = LongNetLM(config.core(), backend=config.backend)  # type: ignore[arg-type]

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
        owners = (MultiheadDilatedAttention, FeedForward, LongNetLM, _LongNetModel)
        module = next((m for m in self.modules() if isinstance(m, owners) and module in m.children()), module)
        if isinstance(module, MultiheadDilatedAttention):
            module.reset_parameters()
        elif isinstance(module, FeedForward):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_normal_(linear.weight, gain=math.sqrt(math.log(2 * self.config.num_hidden_layers)))
                nn.init.zeros_(linear.bias)
        elif isinstance(module, LongNetLM):
            for end in (module.embed_tokens, module.output_projection):
                if end is not None:
                    nn.init.normal_(end.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, LongNetForSequenceClassification):
            nn.init.normal_(module.classifier.weight, std=self.config.hidden_size**-0.5)
            nn.init.zeros_(module.classifier.bias)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; refuses a model made in legacy mode, whose layout no config holds."""
        check_head_groups(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does; the model inside learns the new number of tokens."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = replace(self.model.config, vocab_size=self.config.vocab_size)
        return embedding  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer; None if the embedding serves as one, or if there is none."""
        return self.model.output_projection

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output layer."""
        self.model.output_projection = value

    def _states(self, options: Any) -> list[Tensor] | None:
        """A list for the hidden states if the options or the config ask for them."""
        asked = options.pop("output_hidden_states", None)
        return [] if (self.config.output_hidden_states if asked is None else asked) else None

    def _loss(self, logits: Tensor, labels: Tensor | None, items: Tensor | int | None) -> Tensor | None:
        if labels is None:
            return None
        check_values("labels", labels, logits)
        if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected labels of torch.int64 and shape {tuple(logits.shape[:-1])}, got {got}")
        extra = {} if items is None else {"num_items_in_batch": items}
        return self._checked_loss(labels, logits, vocab_size=self.config.vocab_size, **extra)

    def _checked_loss(self, labels: Tensor, logits: Tensor, **options: Any) -> Tensor:
        """The loss of labels in the logits' range; on a GPU it is not looked at, which would make the host wait."""
        try:
            return self.loss_function(labels=labels, logits=logits, **options)  # type: ignore[no-any-return]
        except IndexError as error:
            given = labels[labels != -100]
            found = f"{int(given.min())} to {int(given.max())}"
            raise ValueError(f"expected labels in [0, {logits.shape[-1]}), or -100, got {found}") from error

    def _hidden(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        rows: Rows,
        *,
        is_causal: bool,
        states: list[Tensor] | None = None,
        cache: HFCache | None = None,
    ) -> Tensor:
        """The last hidden states `(B, T, hidden_size)`; packed rows go through the model as one."""
        packed = rows.cu_seqlens is not None
        x, given = _given(input_ids, inputs_embeds), rows._asdict() if cache is None else {"cache": cache}
        flat: list[Tensor] | None = None if states is None else []
        tokens, embeds = (y.flatten(0, 1) if packed and y is not None else y for y in (input_ids, inputs_embeds))
        hidden = self.model.hidden(tokens, inputs_embeds=embeds, states=flat, is_causal=is_causal, **given)
        if states is not None and flat is not None:
            # As transformers has it, the last ones are those after the final LayerNorm.
            states += [y.unflatten(0, x.shape[:2]) if packed else y for y in (*flat[:-1], hidden)]
        return hidden.unflatten(0, x.shape[:2]) if packed else hidden


class LongNetForCausalLM(_LongNetModel, GenerationMixin):
    """LongNet (arXiv 2307.02486) as a causal language model of transformers; the module inside is a `LongNetLM`.

    `generate` uses transformers' `DynamicCache`, which keeps every key; `LongNetLM.generate` keeps those in sight.
    Batches are padded on the left for `generate`, on either side otherwise.

    Args:
        config: a `LongNetHFConfig`.
    """

    def __init__(self, config: LongNetHFConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Unpack[CausalOptions],
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each position, and the loss of `labels`.

        Args:
            input_ids: int `(B, T)`: with a cache, the tokens that follow those in it.
            attention_mask: `(B, all tokens so far)`, 1 = real. Positions count from a row's first real token.
            position_ids: int `(B, T)`. Where they restart, another document begins, and nothing looks across; beyond
                that `attention_mask` says where a row starts.
            past_key_values: a cache of transformers; only without gradients, and with one sequence per row.
            inputs_embeds: `(B, T, hidden_size)` in place of input_ids, as the embedding of tokens gives them.
            labels: int `(B, T)`, -100 for none; shifted inside.
            logits_to_keep: number of last positions whose logits are computed, or their indices; 0 for all.
            options: `use_cache`, packing and what all models take: `CausalOptions`.

        Returns:
            loss, logits `(B, T, vocab_size)`, past_key_values and hidden_states.

        Raises:
            ValueError: right padding or packing with a cache, an argument that LongNet does not have.
        """
        use_cache = options.pop("use_cache", None)
        check_instance("use_cache", use_cache, bool, type(None))
        check_instance("past_key_values", past_key_values, Cache, type(None))
        cached = past_key_values is not None or bool(use_cache)
        x, states = _given(input_ids, inputs_embeds), self._states(options)
        items = options.pop("num_items_in_batch", None)
        # A static cache that has seen tokens counts them on the device.
        is_step = (
            x.shape[1] == 1 and past_key_values is not None and isinstance(past_key_values.get_seq_length(), Tensor)
        )
        if is_step:
            _check_known(options)
            rows = Rows() if attention_mask is None else Rows(row_start=attention_mask.to(torch.uint8).argmax(1))
        else:
            if attention_mask is not None and past_key_values is not None and past_key_values.is_compileable:
                attention_mask = attention_mask[:, : int(past_key_values.get_seq_length()) + x.shape[1]]
            rows = _rows(x, attention_mask, position_ids, options, cached=cached)
        if use_cache is None and past_key_values is None and self.config.use_cache and not torch.is_grad_enabled():
            cached = rows.suit_a_cache()
        if cached and past_key_values is None:
            past_key_values = DynamicCache()
        cache = None
        if past_key_values is not None:
            cache = (StaticStep if is_step else HFCache)(past_key_values, self.model, x.shape[1], rows)
        hidden = self._hidden(input_ids, inputs_embeds, rows, is_causal=True, states=states, cache=cache)
        logits = self.model.logits(_kept(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=self._loss(logits, labels, items),
            logits=logits,
            past_key_values=None if use_cache is False else past_key_values,
            hidden_states=None if states is None else tuple(states),
        )

    @staticmethod
    def create_masks_for_generate(
        *_: Any, attention_mask: Tensor | None = None, past_key_values: Cache | None = None, **__: Any
    ) -> Tensor | None:
        """`generate` asks for it with a static cache: attention_mask in a shape that no token changes."""
        if attention_mask is None or past_key_values is None:
            return attention_mask
        return nn.functional.pad(attention_mask, (0, past_key_values.get_max_length() - attention_mask.shape[1]))


class LongNetForMaskedLM(_LongNetModel):
    """The encoder of LongNet (arXiv 2307.02486) over tokens, for masked language modelling.

    A `LongNetLM` without causality: its layers, and MAGNETO's gain, are those of the encoder alone.

    Args:
        config: a `LongNetHFConfig`.
    """

    def __init__(self, config: LongNetHFConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Unpack[Options],
    ) -> MaskedLMOutput:
        """Logits of the token at each position, and the loss of `labels`.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in `LongNetForCausalLM.forward`.
            labels: int `(B, T)`, -100 for none.
            options: packing and what all models take: `Options`.

        Returns:
            loss, logits `(B, T, vocab_size)` and hidden_states.
        """
        states, items = self._states(options), options.pop("num_items_in_batch", None)
        rows = _rows(_given(input_ids, inputs_embeds), attention_mask, position_ids, options)
        logits = self.model.logits(self._hidden(input_ids, inputs_embeds, rows, is_causal=False, states=states))
        loss = self._loss(logits, labels, items)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=None if states is None else tuple(states))


class LongNetForSequenceClassification(_LongNetModel):
    """The encoder of `LongNetForMaskedLM` and a linear classifier on the mean over the real tokens.

    Args:
        config: a `LongNetHFConfig`; `num_labels` and `problem_type` are transformers'.
    """

    accepts_loss_kwargs = False  # the loss is the mean over the batch

    def __init__(self, config: LongNetHFConfig) -> None:
        super().__init__(config)
        self.model.output_projection = None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Unpack[Options],
    ) -> SequenceClassifierOutput:
        """Logits of each row's label, and the loss of `labels`.

        Args:
            input_ids, attention_mask, inputs_embeds: as in `LongNetForCausalLM.forward`; a row is one sequence.
            labels: `(B,)`, numbers of classes, or what else `problem_type` asks for.
            options: what all models take, without packing.

        Returns:
            loss, logits `(B, num_labels)` and hidden_states.
        """
        states, x = self._states(options), _given(input_ids, inputs_embeds)
        _check_known(options)
        rows = Rows.padded(attention_mask, (x.shape[0], x.shape[1]))
        hidden = self._hidden(input_ids, inputs_embeds, rows, is_causal=False, states=states)
        real = hidden.new_ones(x.shape[:2]) if attention_mask is None else attention_mask.to(hidden.dtype)
        count = real.sum(1, keepdim=True).clamp(min=1)  # a row of nothing but padding has mean 0
        logits = self.classifier((hidden * real[..., None]).sum(1) / count)
        loss = None
        if labels is not None:
            self._check_labels(labels, logits)
            loss = self._checked_loss(labels, logits, pooled_logits=logits, config=self.config)
        hidden_states = None if states is None else tuple(states)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def _check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """One number per row: a class, or with one output a value; else a share of each label."""
        check_values("labels", labels, logits)
        each, one = tuple(logits.shape), (logits.shape[0],)
        wanted = (one, each) if each[1] == 1 else (each,) if labels.is_floating_point() else (one,)
        if tuple(labels.shape) not in wanted or not (labels.is_floating_point() or labels.dtype == torch.int64):
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected labels of torch.int64 or floating, of shape {wanted[0]}, got {got}")


def register_longnet() -> None:
    """Make the Auto classes know `longnet`; may be called again."""
    AutoConfig.register(LongNetHFConfig.model_type, LongNetHFConfig, exist_ok=True)
    for auto, ours in (
        (AutoModelForCausalLM, LongNetForCausalLM),
        (AutoModelForMaskedLM, LongNetForMaskedLM),
        (AutoModelForSequenceClassification, LongNetForSequenceClassification),
    ):
        auto.register(LongNetHFConfig, ours, exist_ok=True)


def _given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Whichever of the two was given, of at least two dimensions."""
    x = inputs_embeds if input_ids is None else input_ids
    if x is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("expected either input_ids or inputs_embeds, got " + ("neither" if x is None else "both"))
    check_dense("input_ids" if inputs_embeds is None else "inputs_embeds", x)
    if x.dim() < 2:
        raise ValueError(f"expected input_ids of shape (B, T), got {tuple(x.shape)}")
    return x


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The rows of hidden `(B, T, D)` that logits are wanted of: the last so many (0: all), or those of a tensor."""
    if not isinstance(logits_to_keep, Tensor):
        return hidden[:, -check_int("logits_to_keep", logits_to_keep, 0) :]
    check_values("logits_to_keep", logits_to_keep, hidden)
    if logits_to_keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected logits_to_keep of dtype int32 or int64, got {logits_to_keep.dtype}")
    try:
        return hidden[:, logits_to_keep]
    except IndexError as error:  # on a CPU, as with tokens
        found = f"{int(logits_to_keep.min())} to {int(logits_to_keep.max())}"
        raise ValueError(f"expected logits_to_keep in [0, {hidden.shape[1]}), got {found}") from error


def _rows(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, options: Any, *, cached: bool = False
) -> Rows:
    """The rows of x `(B, T, ...)`; takes packing out of the options, in which nothing may be left."""
    bounds, keys, seq_idx = (options.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    for name in ("max_length_q", "max_length_k"):
        options.pop(name, None)
    _check_known(options)
    if bounds is None and keys is not None:
        raise ValueError("expected cu_seq_lens_q with cu_seq_lens_k, got None")
    shape = (x.shape[0], x.shape[1])
    return Rows.of(shape, attention_mask, position_ids, seq_idx=seq_idx, cu_seq_lens=bounds, cached=cached)


def _check_known(options: Any) -> None:
    if wrong := sorted(name for name, value in options.items() if value is not None and value is not False):
        raise ValueError(f"expected arguments of LongNet's forward, got {quoted(wrong)}, which it does not have")
