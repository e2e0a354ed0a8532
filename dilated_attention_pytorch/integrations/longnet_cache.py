"""What a `LongNetLM` calls a cache, on top of one of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Rotation, rotate
from dilated_attention_pytorch.integrations.rows import Rows
from dilated_attention_pytorch.integrations.static_step import static_step
from dilated_attention_pytorch.models.longnet import LongNetLM
from dilated_attention_pytorch.types import QKV


class HFCache:
    """A cache of `LongNetLM` on top of transformers' own, which may be static, or lack what nobody sees any more."""

    def __init__(self, cache: Cache, model: LongNetLM, num_new: int, rows: Rows) -> None:
        self.row_start, self.length = rows.row_start, int(cache.get_seq_length())
        total, given = self.length + num_new, rows.key_padding_mask
        if given is not None and given.shape[1] != total:
            raise ValueError(f"expected attention_mask of {total} tokens, old and new ones, got {given.shape[1]}")
        self.layers: Any = [_Layer(cache, i, self.length) for i in range(model.config.num_decoder_layers)]

    def options(self, x: Tensor) -> dict[str, Any]:
        """What the layers are called with for new rows x."""
        return {"start": self.length, "row_start": self.row_start, "caches": self.layers}

    # Steps of LongNetLM's own cache that this one does not need: layers are made on demand, batches may be reordered.

    def check(self, *_: int) -> None:
        """Nothing to check, begin or commit."""

    begin = commit = check


class _Layer:
    def __init__(self, cache: Cache, index: int, length: int) -> None:
        self._cache, self._index, self.length = cache, index, length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        total = self.length + key.shape[1]
        held = self._cache.update(key.transpose(1, 2), value.transpose(1, 2), self._index)
        keys, values = (x[:, :, :total].transpose(1, 2) for x in held)  # a static cache has room behind them
        return keys, values, total - keys.shape[1]


class StaticStep(HFCache):
    """One new position of each row of a static cache, in shapes that no position changes."""

    def __init__(self, cache: Cache, model: LongNetLM, _: int, rows: Rows) -> None:
        first: Any = model.decoder.layers[0].self_attn
        # The first layer that appends moves the cache's own count on.
        at = (cache.get_seq_length().clone(), 0 if rows.row_start is None else rows.row_start)
        self._rotary, self._own = first.rotary, (at[0] - at[1]).reshape(-1, 1)
        self.layers = [_StaticLayer(cache, i, at, layer.self_attn) for i, layer in enumerate(model.decoder.layers)]

    def options(self, x: Tensor) -> dict[str, Any]:
        """What the layers are called with for new rows x."""
        own = self._own.expand(x.shape[0], 1)
        return {
            "rotation": None if self._rotary is None else self._rotary.rotation(own, x.dtype),
            "caches": self.layers,
        }


class _StaticLayer:
    def __init__(self, cache: Cache, index: int, at: tuple[Tensor, Tensor | int], attention: Any) -> None:
        self._cache, self._index, self._at, self._attention = cache, index, at, attention.attention

    def attend(self, x: QKV, rotation: Rotation | None, scale: float) -> Tensor:
        """Attention `(B, 1, H, D)` of a new position, whose key and value are kept."""
        q, k, v = x
        if rotation is not None:
            q, k = rotate(q, rotation.q_cos, rotation.q_sin), rotate(k, rotation.k_cos, rotation.k_sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        inner = self._attention
        pattern = DilatedPattern(inner.segment_lengths, inner.dilation_rates, k.shape[1], inner.offsets)
        buffers = self._cache.update(k, v, self._index)
        return static_step(q, buffers, self._at, pattern, inner.segment_shift, scale).transpose(1, 2)
