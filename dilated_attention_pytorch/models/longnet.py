"""LongNet (arXiv 2307.02486): encoder-decoder, encoder alone, and the decoder alone as a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dilated_attention_pytorch._deprecated import takes_old_call  # 0.4.0: goes with _old
from dilated_attention_pytorch.core.validation import (
    check_bool,
    check_instance,
    check_int,
    check_looked_up,
    check_multiplicand,
    quoted,
)
from dilated_attention_pytorch.models import decoding
from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.models.config import LongNetConfig, Model
from dilated_attention_pytorch.models.generation import Sampling, check_sampling, sample
from dilated_attention_pytorch.models.layers import LayerStack, RowMask, names_rows
from dilated_attention_pytorch.models.reach import warn_out_of_reach
from dilated_attention_pytorch.models.sharding import ShardedModel


@takes_old_call("_old.calls:LONGNET")  # 0.4.0: goes with _old
class LongNet(Model[LongNetConfig]):
    """Encoder and decoder over one sequence of embeddings.

    Residual pre-LN layers with sub-LN and MAGNETO's gains (arXiv 2210.06423, figure 2): `sqrt(log 3M * log 2N / 3)` in
    the encoder, `sqrt(log 3M)` in the decoder, for N encoder and M decoder layers. The decoder's cross-attention is
    dilated too: position n of the decoder stands beside position n of the encoder.

    Args:
        config: the model's shape; `LongNetConfig()`, the paper's base model, by default.
        backend: of the attention.
        gradient_checkpointing: compute layers again in the backward; may be switched at any time by the attribute.
        device, dtype: of the parameters.
        overrides: fields of `LongNetConfig` by name, in place of the config's.

    Example:
        >>> model = LongNet(d_model=64, nhead=4, num_encoder_layers=2, num_decoder_layers=2,
        ...                 dim_feedforward=128)
        >>> model(torch.randn(1, 100, 64), is_causal=True).shape
        torch.Size([1, 100, 64])
    """

    def _build(self, **factory: Any) -> None:
        n, m = self.config.num_encoder_layers, self.config.num_decoder_layers
        encoder, decoder = math.sqrt(math.log(3 * m) * math.log(2 * n) / 3), math.sqrt(math.log(3 * m))
        self.encoder = LayerStack(self.config, n, encoder, factory, backend=self._backend)
        self.decoder = LayerStack(self.config, m, decoder, factory, backend=self._backend, cross_attention=True)

    @names_rows
    def forward(self, x: Tensor, is_causal: bool = True, **rows: Unpack[RowMask]) -> Tensor:
        """Runs the encoder over x, and the decoder over x and the encoder's output.

        Args:
            x: `(B, N, d_model)`, or `(total, d_model)` with `cu_seqlens`.
            is_causal: hide later positions, in the encoder, the decoder and between them.
            rows: `key_padding_mask`, bool `(B, N)`, True = real; `row_start`, int `(B,)`, first real position of each
                left-padded row; `cu_seqlens`, int `(sequences + 1,)`, bounds of packed sequences.

        Returns:
            Like x.
        """
        options = {"is_causal": is_causal, "gradient_checkpointing": self.gradient_checkpointing, **rows}
        return self.decoder(x, self.encoder(x, **options), **options)  # type: ignore[no-any-return]


class LongNetEncoder(Model[LongNetConfig]):
    """The encoder alone, bidirectional by default, with MAGNETO's gain `sqrt(log 2N)` for N layers.

    The other arguments are those of `LongNet`.

    Args:
        config: the model's shape; its decoder layers are not used.

    Example:
        >>> model = LongNetEncoder(d_model=64, nhead=4, num_encoder_layers=2,
        ...                        dim_feedforward=128)
        >>> model(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    def _build(self, **factory: Any) -> None:
        n = self.config.num_encoder_layers
        self.encoder = LayerStack(self.config, n, math.sqrt(math.log(2 * n)), factory, backend=self._backend)

    @names_rows
    def forward(self, x: Tensor, is_causal: bool = False, **rows: Unpack[RowMask]) -> Tensor:
        """Encodes embeddings; arguments and result as in `LongNet.forward`."""
        again = self.gradient_checkpointing
        return self.encoder(x, is_causal=is_causal, gradient_checkpointing=again, **rows)  # type: ignore[no-any-return]


class LongNetLM(ShardedModel[LongNetConfig]):
    """A causal language model: the decoder alone, with MAGNETO's gain `sqrt(log 2M)` for M layers.

    Embeddings start with deviation `d_model ** -0.5` and are scaled by `sqrt(d_model)`, as in the official code, so
    that the same weights serve as output layer with `tie_weights`. The other arguments are those of `LongNet`.

    After `shard_context` a rank holds one contiguous shard of every sequence. The model then takes this rank's tokens
    and gives their logits: those that one device would give.

    Args:
        config: the model's shape, with `vocab_size` or else a ValueError; its encoder layers are not used.

    Example:
        >>> model = LongNetLM(vocab_size=256, d_model=64, nhead=4, num_decoder_layers=2,
        ...                   dim_feedforward=128)
        >>> tokens = torch.randint(256, (1, 100))
        >>> model(tokens).shape
        torch.Size([1, 100, 256])
        >>> model.generate(tokens, 5, seed=0).shape
        torch.Size([1, 5])
    """

    def _build(self, **factory: Any) -> None:
        m, width, vocab_size = self.config.num_decoder_layers, self.config.d_model, self.config.vocab_size
        if vocab_size is None:
            raise ValueError("expected vocab_size, the number of tokens, got None")
        self.embed_tokens = nn.Embedding(vocab_size, width, **factory)
        self.decoder = LayerStack(self.config, m, math.sqrt(math.log(2 * m)), factory, backend=self._backend)
        # Tied weights have one name, so nothing can tear them apart: not a checkpoint, not a copy, not `to_empty`.
        tied = self.config.tie_weights
        self.output_projection = None if tied else nn.Linear(width, vocab_size, bias=False, **factory)
        for module in (self.embed_tokens, self.output_projection):
            if module is not None:
                nn.init.normal_(module.weight, std=width**-0.5)

    @names_rows
    def forward(
        self,
        tokens: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
        cache: KeyValueCache | None = None,
        seq_len: int | None = None,
        is_causal: bool = True,
        return_hidden: bool = False,
        **rows: Unpack[RowMask],
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: int `(B, N)`, or `(total,)` with `cu_seqlens`; None with `inputs_embeds`.
            inputs_embeds: `(B, N, d_model)`, or `(total, d_model)`, as `embed_tokens` gives them.
            states: a list that takes what the first layer gets and what each layer gives.
            cache: from `make_cache`. The tokens follow those that it has seen, and are added to them.
            seq_len: after `shard_context`, the length of the whole sequence, cut as `torch.chunk` does; without it
                all shards are equally long.
            is_causal: hide later positions; without, the logits may be those of masked tokens.
            return_hidden: give what `logits` takes in place of the logits.
            rows: as in `LongNet.forward`.

        Returns:
            `(B, N, vocab_size)`, or `(total, vocab_size)`.
        """
        check_bool("return_hidden", return_hidden)
        check_instance("states", states, list, type(None))
        options: dict[str, Any] = {"cache": cache, "seq_len": seq_len, "is_causal": is_causal, **rows}
        hidden = self._hidden(tokens, inputs_embeds, states, **options)
        return hidden if return_hidden else self.logits(hidden)

    def hidden(self, tokens: Tensor | None, **options: Any) -> Tensor:
        """The hidden states `(B, N, d_model)` that `logits` takes: logits of long sequences need not all exist at once.

        It is a call of the model, so hooks on it fire, with hidden states as its output.

        Args:
            tokens: as in `forward`.
            options: other arguments of `forward`.
        """
        return self(tokens, return_hidden=True, **options)  # type: ignore[no-any-return]

    def _hidden(
        self,
        tokens: Tensor | None,
        inputs_embeds: Tensor | None,
        states: list[Tensor] | None,
        *,
        cache: KeyValueCache | None,
        seq_len: int | None,
        is_causal: bool,
        **rows: Unpack[RowMask],
    ) -> Tensor:
        given = {name for name, value in rows.items() if value is not None}
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("expected either tokens or inputs_embeds, got " + ("none" if tokens is None else "both"))
        if tokens is None:
            check_multiplicand("inputs_embeds", inputs_embeds, self.decoder.layer_norm)
            rank, width = 2 if "cu_seqlens" in given else 3, self.config.d_model
            if inputs_embeds.dim() != rank or inputs_embeds.shape[-1] != width:  # type: ignore[union-attr]
                got = tuple(inputs_embeds.shape)  # type: ignore[union-attr]
                raise ValueError(f"expected inputs_embeds of {rank} dimensions, the last of {width}, got {got}")
        x: Any = inputs_embeds if tokens is None else self._look_up(tokens, "cu_seqlens" in given)
        start = self._shard_start(x, given, cache, seq_len)
        x = x * math.sqrt(self.config.d_model)
        if self.training and self.config.dropout > 0.0:
            x = nn.functional.dropout(x, self.config.dropout)
        options: dict[str, Any] = {"start": start, "gradient_checkpointing": self.gradient_checkpointing, **rows}
        if cache is not None:
            if given:
                raise ValueError(
                    "expected no key_padding_mask, row_start or cu_seqlens with a cache: pad on the left and give "
                    "row_start to make_cache"
                )
            if not is_causal:
                raise ValueError("expected is_causal=True with a cache, got False: later positions are not there yet")
            if torch.is_grad_enabled():
                raise ValueError("expected torch.no_grad() or torch.inference_mode() around a forward with a cache")
            if x.shape[1] == 0:
                raise ValueError("expected at least one token with a cache, got none")
            if not callable(getattr(cache, "begin", None)):  # transformers' one is wrapped in a class of its own
                raise TypeError(f"expected cache to be what make_cache gives, got {type(cache).__name__}")
            cache.check(x.shape[0], self.config.num_decoder_layers)
            cache.begin(x.shape[1])
            options = cache.options(x)
        out: Tensor = self.decoder(x, is_causal=is_causal, each=None if states is None else states.append, **options)
        if cache is not None:
            cache.commit()
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., vocab_size)` of hidden states `(..., d_model)`."""
        if self.output_projection is None:
            return nn.functional.linear(hidden, self.embed_tokens.weight)
        return self.output_projection(hidden)  # type: ignore[no-any-return]

    def make_cache(self, *, row_start: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `forward`; `row_start`, int `(B,)`, has each left-padded row's first real position."""
        layers, shifts = self.config.num_decoder_layers, self.config.shifts(self.config.num_decoder_layers)
        return KeyValueCache(self.config.segment_lengths, layers, shifts=shifts, row_start=row_start)

    def generate(self, prompt: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Tensor:
        """Continues a prompt and returns the new tokens.

        Args:
            prompt: int `(B, N)`, N >= 1; of different lengths: `left_pad` gives one batch and its `row_start`.
            max_new_tokens: how many tokens to add, at most.
            sampling: `temperature=1.0`, `top_k`, `top_p`, `greedy=False`, `seed` or `generator`, `eos_token`,
                `row_start`, `prefill_chunk`, `graphed`; `models.generation.Sampling` describes them.

        Returns:
            int64 `(B, T)`, T <= max_new_tokens, without the prompt.
        """
        new = list(self.stream(prompt, max_new_tokens, **sampling))
        return torch.stack(new, 1) if new else prompt.new_empty((prompt.shape[0], 0), dtype=torch.int64)

    def stream(self, prompt: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Iterator[Tensor]:
        """`generate` as an iterator over int64 `(B,)`, each token as it comes.

        Arguments are checked at once. The model is in evaluation mode from the first token until the iterator is
        exhausted or closed.
        """
        vocab_size = self.config.vocab_size
        assert vocab_size is not None
        max_new_tokens = check_int("max_new_tokens", max_new_tokens, 0)
        with torch.no_grad():  # a prompt of inference mode is as good as any
            self._check(prompt, packed=False)
        check_sampling(prompt, sampling, vocab_size)
        reasons = decoding.why_not(self, prompt)
        if sampling.get("graphed") and reasons:
            raise ValueError(f"expected graphed=True only where a token can be one replay, got {'; '.join(reasons)}")
        if sampling.get("graphed") is None:
            sampling["graphed"] = not reasons and not decoding.why_not_unasked(self, prompt)
        shifts = self.config.shifts(self.config.num_decoder_layers)
        warn_out_of_reach(self.config.pattern, shifts, prompt.shape[1] + max_new_tokens)
        return sample(self, prompt, max_new_tokens, sampling) if max_new_tokens else iter(())

    def _shard_start(self, x: Tensor, given: set[str], cache: KeyValueCache | None, seq_len: int | None) -> int:
        """The position of the first token: 0 without shards."""
        if self._shards is None:
            if seq_len is not None:
                raise ValueError(f"expected no seq_len without shard_context, got {quoted(seq_len)}: tokens are whole")
            return 0
        if given - {"key_padding_mask"} or cache is not None:
            raise ValueError(
                "expected no row_start, cu_seqlens or cache after shard_context: it takes whole rows of one sequence "
                "each; generate with a model that is not sharded"
            )
        return self._shards.start(x.shape[1], seq_len)

    def _look_up(self, tokens: Tensor, packed: bool) -> Tensor:
        self._check(tokens, packed)
        try:
            return self.embed_tokens(tokens)  # type: ignore[no-any-return]
        except IndexError as error:  # on a CPU; looking at a GPU's tokens would make the host wait
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"expected tokens in [0, {self.config.vocab_size}), got {found}") from error

    def _check(self, tokens: Tensor, packed: bool) -> None:
        check_looked_up("tokens", tokens, self.embed_tokens)
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expected tokens of dtype int32 or int64, got {tokens.dtype}")
        if tokens.dim() != (1 if packed else 2):
            layout = "(total,) with cu_seqlens" if packed else "(B, N)"
            raise ValueError(f"expected tokens of shape {layout}, got {tuple(tokens.shape)}")
