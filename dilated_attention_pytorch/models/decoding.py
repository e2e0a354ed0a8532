"""Decoding on a GPU: a token is one replay of a CUDA graph over buffers of fixed size.

`generation` asks `why_not` and takes steps of a `GraphedSteps` where nothing stands in the way, of `EagerSteps`
otherwise; both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.kernels.decode_layout import DecodeLayout
from dilated_attention_pytorch.kernels.triton.support import DTYPES, MAX_HEAD_DIM, why_not_on
from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.types import QKV

# Steps taken before their tokens are looked at for an end.
_AHEAD = 16
# Runs of the step before it is captured: kernels are compiled and loaded, libraries take their workspaces.
_WARM_UP = 2


def why_not(model: nn.Module, tokens: Tensor) -> list[str]:
    """The reasons why decoding steps of a `LongNetLM` cannot be replayed; empty if they can."""
    attentions = [layer.self_attn for layer in model.decoder.layers]  # type: ignore[union-attr]
    first = attentions[0]
    reasons = why_not_on(tokens.device)
    dtype: torch.dtype = model.embed_tokens.weight.dtype  # type: ignore[union-attr, assignment]
    if dtype not in DTYPES:
        reasons.append(f"no kernel takes {str(dtype).removeprefix('torch.')}")
    if first.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {first.head_dim} is above {MAX_HEAD_DIM}")
    if any(attention.attention.head_groups for attention in attentions):
        reasons.append("it has head_groups")
    if any(torch_private.has_hooks(module) for module in model.modules()):
        reasons.append("modules have hooks, which a replay would not call")
    if torch.is_autocast_enabled(tokens.device.type):
        reasons.append("autocast is on")
    return reasons


def steps(model: Any, cache: KeyValueCache, sampler: Any, tokens: Tensor, longest: int, graphed: bool) -> Steps:
    """The steps that follow a prefill.

    Args:
        model: a `LongNetLM`.
        cache: what it has seen.
        sampler: a `generation.Sampler`.
        tokens: int64 `(B,)`, drawn last.
        longest: positions that the sequence may come to.
        graphed: whether they are replays.
    """
    if not graphed:
        return EagerSteps(model, cache, sampler.draw, tokens)
    decoding = DecodingCache(model, cache, longest)
    eager = EagerSteps(model, decoding, sampler.draw, tokens)
    if not tokens.is_cuda:  # Triton's interpreter, which has no graphs
        return eager
    ahead = 1 if sampler.eos_token is None else _AHEAD
    return GraphedSteps(eager, [decoding.positions, sampler.finished], sampler.generator(), ahead)


class DecodingCache:
    """Keys and values of fixed size, for one new position of each row at a time; begins where a `KeyValueCache` stands.

    Args:
        model: the `LongNetLM` that filled the cache.
        cache: what it has seen.
        longest: positions that the sequence may come to.

    Attributes:
        layers: one store per layer.
        positions: int64 `(B,)` on the device, the next position of each row.
    """

    def __init__(self, model: Any, cache: KeyValueCache, longest: int) -> None:
        attentions = [layer.self_attn for layer in model.decoder.layers]
        self._rotary = attentions[0].rotary
        rows = cache.held_rows()
        batch, device = rows[0][0].shape[0], rows[0][0].device
        starts = 0 if cache.row_start is None else cache.row_start.to(device, torch.int64)
        self.positions = torch.full((batch,), cache.length, device=device) - starts
        own = torch.arange(cache.start, cache.length, device=device) - (cache.length - self.positions)[:, None]
        self.layers = []
        for attention, held in zip(attentions, rows, strict=True):
            inner, heads = attention.attention, attention.num_kv_heads
            pattern = DilatedPattern(inner.segment_lengths, inner.dilation_rates, heads, inner.offsets)
            layout = DecodeLayout(pattern, longest, inner.segment_shift)
            keys, values = (x.new_empty(batch, heads, layout.rows, attention.head_dim) for x in held)
            if own.shape[1]:
                layout.write(keys, held[0], own)
                layout.write(values, held[1], own)
            self.layers.append(_LayerBuffers(self, layout, keys, values))

    def check(self, batch: int, num_layers: int) -> None:
        """Raises a ValueError for a cache of another model, or of a batch of other size."""
        if (batch, num_layers) != (len(self.positions), len(self.layers)):
            raise ValueError(
                f"expected {len(self.positions)} rows and {len(self.layers)} layers, as the cache has, got {batch} and "
                f"{num_layers}"
            )

    def begin(self, num_new: int) -> None:
        """One new position of each row follows; every layer then attends once, and `commit` ends the step."""
        if num_new != 1:
            raise ValueError(f"expected one token at a time with a decoding cache, got {num_new}")

    def commit(self) -> None:
        """Moves every row on by one."""
        self.positions += 1

    def options(self, x: Tensor) -> dict[str, Any]:
        """What the layers are called with for rows x `(B, 1, d_model)`."""
        rotation = None if self._rotary is None else self._rotary.rotation(self.positions[:, None], x.dtype)
        return {"rotation": rotation, "caches": self.layers}


class _LayerBuffers:
    """One layer's buffers `(B, H_kv, rows, D)`."""

    def __init__(self, cache: DecodingCache, layout: DecodeLayout, keys: Tensor, values: Tensor) -> None:
        self._cache, self.layout, self.keys, self.values = cache, layout, keys, values

    def attend(self, x: QKV, rotation: Rotation | None, scale: float) -> Tensor:
        """Attention `(B, 1, H, D)` of a new position, whose key and value are kept."""
        from dilated_attention_pytorch.kernels.triton import launch_decode

        return launch_decode.step(x, rotation, self._cache.positions, (self.keys, self.values), self.layout, scale)


class Steps(Protocol):
    """Draws one token for each row after another."""

    ahead: int  # how many steps may be taken before their tokens are looked at

    def take(self, count: int) -> list[Tensor]:
        """The tokens of that many steps, int64 `(B,)` each."""

    def rewind(self, used: int) -> None:
        """Gives back what the last block drew from the generator after its first `used` steps."""


class EagerSteps:
    """Steps through a model's cache of any kind, on any device.

    Args:
        model: a `LongNetLM`.
        cache: holds what comes before `tokens`.
        draw: the next tokens `(B,)` of logits `(B, vocab_size)`.
        tokens: int64 `(B,)`, the last ones.
    """

    ahead = 1

    def __init__(self, model: Any, cache: Any, draw: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
        self._model, self._cache, self._draw = model, cache, draw
        self.tokens = tokens[:, None].clone()

    def step(self) -> None:
        """Replaces the tokens by those that follow them."""
        new = self._draw(self._model.logits(self._model.hidden(self.tokens, cache=self._cache)[:, -1]))
        self.tokens.copy_(new[:, None])

    def take(self, count: int) -> list[Tensor]:
        """The tokens of that many steps, int64 `(B,)` each."""
        found = []
        for _ in range(count):
            self.step()
            found.append(self.tokens[:, 0].clone())
        return found

    def rewind(self, used: int) -> None:
        """Nothing was drawn ahead."""


class GraphedSteps:
    """The same steps as replays of one CUDA graph, which holds the addresses of weights and buffers.

    Args:
        eager: the steps, over a `DecodingCache`.
        state: tensors that a step changes in place; warming up leaves them as they are.
        generator: what the steps draw from; None where they draw nothing.
        ahead: steps before their tokens are looked at.
    """

    def __init__(
        self, eager: EagerSteps, state: Sequence[Tensor], generator: torch.Generator | None, ahead: int
    ) -> None:
        self.ahead, self._eager, self._generator = ahead, eager, generator
        self._offsets: list[int] = []
        state = [eager.tokens, *state]
        before = [x.clone() for x in state]
        self._graph = torch.cuda.CUDAGraph()
        drawn = 0
        if generator is not None:
            self._graph.register_generator_state(generator)
            drawn = generator.get_offset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                # The same step again: it writes the same rows.
                eager.step()
                for x, was in zip(state, before, strict=True):
                    x.copy_(was)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may go on using the device.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            eager.step()
        if generator is not None:
            generator.set_offset(drawn)

    def take(self, count: int) -> list[Tensor]:
        """The tokens of that many steps, int64 `(B,)` each."""
        found, self._offsets = [], []
        for _ in range(count):
            if self._generator is not None:
                self._offsets.append(self._generator.get_offset())
            self._graph.replay()
            found.append(self._eager.tokens[:, 0].clone())
        return found

    def rewind(self, used: int) -> None:
        """Gives back what the last block drew from the generator after its first `used` steps."""
        if self._generator is not None and used < len(self._offsets):
            self._generator.set_offset(self._offsets[used])
