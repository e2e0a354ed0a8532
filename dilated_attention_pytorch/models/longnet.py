"""LongNet (arXiv 2307.02486): encoder-decoder, encoder alone, and the decoder alone as a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from dilated_attention_pytorch._deprecated import takes_old_call  # 0.4.0: goes with _old
from dilated_attention_pytorch.core.validation import check_bool
from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.generation import Sampling, generate, stream
from dilated_attention_pytorch.models.layers import LayerStack
from dilated_attention_pytorch.models.sharding import ContextShards, ring_config, shard_layers
from dilated_attention_pytorch.types import BackendName

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def _configured(config: LongNetConfig | None, overrides: dict[str, Any]) -> LongNetConfig:
    if config is not None and not isinstance(config, LongNetConfig):
        raise TypeError(f"expected config to be a LongNetConfig, got {type(config).__name__} {config!r}")
    return replace(config or LongNetConfig(), **overrides)


@takes_old_call("_old.calls:LONGNET")  # 0.4.0: goes with _old
class LongNet(nn.Module):
    """Encoder and decoder over one sequence of embeddings.

    Residual pre-LN layers with sub-LN and MAGNETO's gains (arXiv 2210.06423, figure 2): `sqrt(log 3M * log 2N / 3)` in
    the encoder, `sqrt(log 3M)` in the decoder, for N encoder and M decoder layers. The decoder's cross-attention is
    dilated too: position n of the decoder stands beside position n of the encoder.

    Args:
        config: the model's shape; `LongNetConfig()`, the paper's base model, by default.
        backend: of the attention.
        gradient_checkpointing: compute layers again in the backward; may be switched at any time by the attribute.
        device: of the parameters.
        dtype: of the parameters.
        overrides: fields of `LongNetConfig` by name, in place of the config's.

    Example:
        >>> model = LongNet(d_model=64, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=128)
        >>> model(torch.randn(1, 100, 64), is_causal=True).shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        config: LongNetConfig | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = _configured(config, overrides)
        n, m = config.num_encoder_layers, config.num_decoder_layers
        gamma = math.sqrt(math.log(3 * m) * math.log(2 * n) / 3)
        self.encoder = LayerStack(config, n, gamma, backend=backend, device=device, dtype=dtype)
        gamma = math.sqrt(math.log(3 * m))
        self.decoder = LayerStack(
            config, m, gamma, cross_attention=True, backend=backend, device=device, dtype=dtype
        )  # fmt: skip
        check_bool("gradient_checkpointing", gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(
        self,
        x: Tensor,
        is_causal: bool = True,
        *,
        key_padding_mask: Tensor | None = None,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Runs the encoder over x and the decoder over x and what the encoder made of it.

        Args:
            x: `(B, N, d_model)`, or `(total, d_model)` with `cu_seqlens`.
            is_causal: hide later positions, in the encoder, the decoder and between them.
            key_padding_mask: bool `(B, N)`, True = real.
            row_start: int `(B,)`, first real position of each left-padded row.
            cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.

        Returns:
            Like x.
        """
        rows = {"key_padding_mask": key_padding_mask, "row_start": row_start, "cu_seqlens": cu_seqlens}
        again = self.gradient_checkpointing
        memory = self.encoder(x, is_causal=is_causal, gradient_checkpointing=again, **rows)
        out: Tensor = self.decoder(x, memory, is_causal=is_causal, gradient_checkpointing=again, **rows)
        return out


class LongNetEncoder(nn.Module):
    """The encoder alone, bidirectional by default, with MAGNETO's gain `sqrt(log 2N)` for N layers.

    Args:
        config: the model's shape; its decoder layers are not used.
        backend: of the attention.
        gradient_checkpointing: compute layers again in the backward; may be switched at any time by the attribute.
        device: of the parameters.
        dtype: of the parameters.
        overrides: fields of `LongNetConfig` by name, in place of the config's.

    Example:
        >>> model = LongNetEncoder(d_model=64, nhead=4, num_encoder_layers=2, dim_feedforward=128)
        >>> model(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        config: LongNetConfig | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = _configured(config, overrides)
        n = config.num_encoder_layers
        self.encoder = LayerStack(config, n, math.sqrt(math.log(2 * n)), backend=backend, device=device, dtype=dtype)
        check_bool("gradient_checkpointing", gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(
        self,
        x: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Encodes embeddings; arguments and result as in `LongNet.forward`."""
        out: Tensor = self.encoder(
            x,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            row_start=row_start,
            cu_seqlens=cu_seqlens,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return out


class LongNetLM(nn.Module):
    """A causal language model: the decoder alone, with MAGNETO's gain `sqrt(log 2M)` for M layers.

    Embeddings start with deviation `d_model ** -0.5` and are scaled by `sqrt(d_model)`, as in the official code, so
    that the same weights serve as output layer with `tie_weights`.

    Args:
        config: the model's shape, with `vocab_size`; its encoder layers are not used.
        backend: of the attention.
        gradient_checkpointing: compute layers again in the backward; may be switched at any time by the attribute.
        device: of the parameters.
        dtype: of the parameters.
        overrides: fields of `LongNetConfig` by name, in place of the config's.

    Raises:
        ValueError: no vocab_size.

    Example:
        >>> model = LongNetLM(vocab_size=256, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=128)
        >>> tokens = torch.randint(256, (1, 100))
        >>> model(tokens).shape
        torch.Size([1, 100, 256])
        >>> model.generate(tokens, 5, seed=0).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        config: LongNetConfig | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = _configured(config, overrides)
        if config.vocab_size is None:
            raise ValueError("expected vocab_size, the number of tokens, got None")
        m, width = config.num_decoder_layers, config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, width, device=device, dtype=dtype)
        self.decoder = LayerStack(config, m, math.sqrt(math.log(2 * m)), backend=backend, device=device, dtype=dtype)
        # Tied weights have one name, so nothing can tear them apart: not a checkpoint, not a copy, not `to_empty`.
        self.output_projection = (
            None if config.tie_weights else nn.Linear(width, config.vocab_size, bias=False, device=device, dtype=dtype)
        )
        for module in (self.embed_tokens, self.output_projection):
            if module is not None:
                nn.init.normal_(module.weight, std=width**-0.5)
        check_bool("gradient_checkpointing", gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing
        self._backend = backend
        self._shards: ContextShards | None = None

    def shard_context(self, group: ProcessGroup | DeviceMesh, *, mesh_dim: str | None = None, **ring: Any) -> None:
        """From now on each rank of a group holds one contiguous shard of every sequence, in rank order.

        All attention becomes ring attention with the model's own settings; parameters and their names stay. The model
        then takes this rank's tokens and gives their logits: those that one device would give. The gradients of the
        parameters are this shard's share, to be summed over the group.

        Args:
            group: a ProcessGroup; or a DeviceMesh, of one dimension or with `mesh_dim`.
            mesh_dim: name of the mesh's dimension over which sequences are sharded.
            ring: further fields of `RingAttentionConfig`, such as `mode` and `timeout`.

        Raises:
            ValueError: a setting that ring attention does not have: `mixing_gradient="detached"`.
        """
        config = ring_config(self.config, **{"backend": self._backend, **ring})
        self._shards = shard_layers(self.decoder.layers, config, group, mesh_dim)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
        seq_len: int | None = None,
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: int `(B, N)`, or `(total,)` with `cu_seqlens`.
            key_padding_mask: bool `(B, N)`, True = real.
            row_start: int `(B,)`, first real position of each left-padded row.
            cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.
            cache: from `make_cache`. The tokens are those that follow what it has seen; it takes them in.
            seq_len: after `shard_context`, the length of the whole sequence, cut as `torch.chunk` does; without it
                all shards are equally long.

        Returns:
            `(B, N, vocab_size)`, or `(total, vocab_size)`.
        """
        hidden = self.hidden(
            tokens,
            key_padding_mask=key_padding_mask,
            row_start=row_start,
            cu_seqlens=cu_seqlens,
            cache=cache,
            seq_len=seq_len,
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
        seq_len: int | None = None,
    ) -> Tensor:
        """What `logits` takes, `(B, N, d_model)`: for long sequences, whose logits need not all exist at once.

        Arguments are those of `forward`.
        """
        self._check(tokens, cu_seqlens is not None)
        start = self._shard_start(tokens, row_start, cu_seqlens, cache, seq_len)
        try:
            x = self.embed_tokens(tokens) * math.sqrt(self.config.d_model)
        except IndexError as error:  # on a CPU; looking at a GPU's tokens would make the host wait
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"expected tokens in [0, {self.config.vocab_size}), got {found}") from error
        if self.training and self.config.dropout > 0.0:
            x = nn.functional.dropout(x, self.config.dropout)
        if cache is None:
            out: Tensor = self.decoder(
                x,
                is_causal=True,
                key_padding_mask=key_padding_mask,
                row_start=row_start,
                cu_seqlens=cu_seqlens,
                start=start,
                gradient_checkpointing=self.gradient_checkpointing,
            )
            return out
        if key_padding_mask is not None or row_start is not None or cu_seqlens is not None:
            raise ValueError(
                "expected no key_padding_mask, row_start or cu_seqlens with a cache: pad on the left and give "
                "row_start to make_cache"
            )
        if torch.is_grad_enabled():
            raise ValueError("expected torch.no_grad() or torch.inference_mode() around a forward with a cache")
        if tokens.shape[1] == 0:
            raise ValueError("expected at least one token with a cache, got none")
        cache.check(tokens.shape[0], self.config.num_decoder_layers)
        cache.begin(tokens.shape[1])
        out = self.decoder(x, is_causal=True, row_start=cache.row_start, start=cache.length, caches=cache.layers)
        cache.commit()
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., vocab_size)` of hidden states `(..., d_model)`."""
        projection = self.embed_tokens if self.output_projection is None else self.output_projection
        return nn.functional.linear(hidden, projection.weight)

    def make_cache(self, *, row_start: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `forward`.

        Args:
            row_start: int `(B,)`, first real position of each row of a left-padded batch.
        """
        return KeyValueCache(self.config.segment_lengths, self.config.num_decoder_layers, row_start=row_start)

    def generate(self, prompt: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Tensor:
        """Continues a prompt and returns the new tokens.

        Args:
            prompt: int `(B, N)`, N >= 1; of different lengths: `left_pad` gives one batch and its `row_start`.
            max_new_tokens: how many tokens to add, at most.
            sampling: `temperature=1.0`, `top_k`, `top_p`, `greedy=False`, `seed` or `generator`, `eos_token`,
                `row_start`; what each does is said in `models.generation.Sampling`.

        Returns:
            int64 `(B, T)`, T <= max_new_tokens, without the prompt.
        """
        return generate(self, prompt, max_new_tokens, **sampling)

    def stream(self, prompt: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Iterator[Tensor]:
        """`generate` as an iterator over int64 `(B,)`, each token as it comes."""
        return stream(self, prompt, max_new_tokens, **sampling)

    def _shard_start(
        self,
        tokens: Tensor,
        row_start: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
        seq_len: int | None,
    ) -> int:
        """The position of the first token: 0 without shards."""
        if self._shards is None:
            if seq_len is not None:
                raise ValueError(f"expected no seq_len without shard_context, got {seq_len}: tokens are whole")
            return 0
        if row_start is not None or cu_seqlens is not None or cache is not None:
            raise ValueError(
                "expected no row_start, cu_seqlens or cache after shard_context: it takes whole rows of one sequence "
                "each; generate with a model that is not sharded"
            )
        return self._shards.start(tokens.shape[1], seq_len)

    def _check(self, tokens: Tensor, packed: bool) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"expected tokens to be a Tensor, got {type(tokens).__name__}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expected tokens of dtype int32 or int64, got {tokens.dtype}")
        if tokens.dim() != (1 if packed else 2):
            layout = "(total,) with cu_seqlens" if packed else "(B, N)"
            raise ValueError(f"expected tokens of shape {layout}, got {tuple(tokens.shape)}")
