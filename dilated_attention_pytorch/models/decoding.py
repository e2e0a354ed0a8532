"""Decoding on a GPU: a token is one replay of a CUDA graph over buffers of fixed size.

Where `why_not` has no reasons, generation takes steps of a `GraphedSteps`, of `EagerSteps` otherwise; both give the
same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
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
_CAPTURING = threading.Lock()


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


def why_not_unasked(model: nn.Module, tokens: Tensor) -> list[str]:
    """The reasons why steps that can be replayed are not, unless that is asked for."""
    reasons = [] if tokens.is_cuda else [f"the device is {tokens.device.type}, not cuda"]
    known = ("torch.nn.modules.", "dilated_attention_pytorch.")
    if others := {type(m).__name__ for m in model.modules() if not type(m).__module__.startswith(known)}:
        reasons.append(f"nobody knows whether a graph can hold what {', '.join(sorted(others))} does")
    return reasons


def steps(model: Any, cache: KeyValueCache | DecodingCache, sampler: Any, tokens: Tensor) -> Steps:
    """The steps that follow a prompt: replays where there are buffers of fixed size, on a GPU.

    Args:
        model: a `LongNetLM`.
        cache: what it has seen.
        sampler: a `generation.Sampler`.
        tokens: int64 `(B,)`, drawn last.
    """
    eager = EagerSteps(model, cache, sampler.draw, tokens)
    if isinstance(cache, KeyValueCache) or not tokens.is_cuda:  # Triton's interpreter has no graphs
        return eager
    ahead = 1 if sampler.eos_token is None else _AHEAD
    return GraphedSteps(eager, [cache.positions, sampler.finished], sampler.generator(), ahead)


class DecodingCache:
    """Keys and values of fixed size, for one new position of each row at a time.

    Args:
        model: a `LongNetLM`.
        positions: int64 `(B,)`, how many each row has seen; on the device, where they are counted on.
        longest: positions that a row may come to.

    Attributes:
        layers: one store per layer; made when the first rows come.
    """

    def __init__(self, model: Any, positions: Tensor, longest: int) -> None:
        self._attentions = [layer.self_attn for layer in model.decoder.layers]
        self.positions, self._longest = positions.clone(), longest
        self.layers: list[_LayerBuffers] = []

    def take(self, cache: KeyValueCache, rows: slice = slice(None)) -> None:
        """Copies what some rows have seen: those of a `KeyValueCache` at the same positions."""
        held = cache.held_rows()
        if not self.layers:
            self.layers = [self._make(x, *y) for x, y in zip(self._attentions, held, strict=True)]
        following = self.positions[rows, None]
        own = torch.arange(cache.start - cache.length, 0, device=following.device) + following
        for layer, new in zip(self.layers, held, strict=True):
            for buffer, x in zip((layer.keys, layer.values), new, strict=True):
                layer.layout.write(buffer[rows], x, own)

    def _make(self, attention: Any, *held: Tensor) -> _LayerBuffers:
        inner, heads = attention.attention, attention.num_kv_heads
        pattern = DilatedPattern(inner.segment_lengths, inner.dilation_rates, heads, inner.offsets)
        layout = DecodeLayout(pattern, self._longest, inner.segment_shift)
        shape = (len(self.positions), heads, layout.rows, attention.head_dim)
        return _LayerBuffers(self.positions, layout, *(x.new_empty(shape) for x in held))

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
        return {"rotation": self.rotation(x.dtype), "caches": self.layers}

    def rotation(self, dtype: torch.dtype) -> Rotation | None:
        """Of the next positions, `(B, 1, 1, D / 2)`."""
        rotary = self._attentions[0].rotary
        found: Rotation | None = None if rotary is None else rotary.rotation(self.positions[:, None], dtype)
        return found


class _LayerBuffers:
    """One layer's buffers `(B, H_kv, rows, D)`; positions are those of the cache."""

    def __init__(self, positions: Tensor, layout: DecodeLayout, keys: Tensor, values: Tensor) -> None:
        self._positions, self.layout, self.keys, self.values = positions, layout, keys, values

    def attend(self, x: QKV, rotation: Rotation | None, scale: float) -> Tensor:
        """Attention `(B, 1, H, D)` of a new position, whose key and value are kept."""
        from dilated_attention_pytorch.kernels.triton import launch_decode

        return launch_decode.step(x, rotation, self._positions, (self.keys, self.values), self.layout, scale)


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
        self._logits: Callable[[Tensor], Tensor] = partial(_next_logits, model, cache)
        self._draw = draw
        self.tokens = tokens[:, None].clone()
        if isinstance(cache, DecodingCache):
            from dilated_attention_pytorch.models import decode_step

            if decode_step.suits(model, len(tokens)):
                self._logits = decode_step.DecodeStep(model, cache)

    def step(self) -> None:
        """Replaces the tokens by those that follow them."""
        self.tokens.copy_(self._draw(self._logits(self.tokens))[:, None])

    def take(self, count: int) -> list[Tensor]:
        """The tokens of that many steps, int64 `(B,)` each."""
        found = []
        for _ in range(count):
            self.step()
            found.append(self.tokens[:, 0].clone())
        return found

    def rewind(self, used: int) -> None:
        """Nothing was drawn ahead."""


def _next_logits(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits `(B, vocab_size)` of what follows tokens `(B, 1)`, through the model's modules."""
    logits: Tensor = model.logits(model.hidden(tokens, cache=cache)[:, -1])
    return logits


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
        # Other threads may go on using the device, but a process has one capture at a time.
        with _CAPTURING, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
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
