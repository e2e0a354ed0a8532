"""Attention maps of a slide encoder: the tiles that a tile, or the cls token, attends to."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

from dilated_attention_pytorch.core.probabilities import attention_probabilities
from dilated_attention_pytorch.core.validation import check_int, check_values, quoted
from dilated_attention_pytorch.models.layers import Layer
from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig


class AttentionMap(NamedTuple):
    """The attention of Q queries of one slide, probabilities in fp32 (fp64); a row of all three sums to 1.

    Attributes:
        tiles: `(Q, L)`, on each tile.
        cls: `(Q,)`, on the cls token.
        nothing: `(Q,)`, on the keys of zeros that `padding="zero_keys"` adds; 0 otherwise.
    """

    tiles: Tensor
    cls: Tensor
    nothing: Tensor


def queries_and_keys(layer: Layer, x: Tensor, config: SlideEncoderConfig) -> tuple[Tensor, Tensor]:
    """The queries and keys that a layer makes of its input `(1, N, embed_dim)`, each `(N, H, D)`."""
    h, attention = layer.self_attn_layer_norm(x)[0], layer.self_attn
    q, k = (proj(h).unflatten(-1, (config.num_heads, -1)) for proj in (attention.q_proj, attention.k_proj))
    return q, k


def layer_attention(
    layer: Layer, x: Tensor, config: SlideEncoderConfig, head: int | None, queries: list[int]
) -> AttentionMap:
    """The attention of some rows of x `(1, 1 + L, embed_dim)` in the layer that takes it, cls token first.
    Without a head it is the mean over heads."""
    q, k = queries_and_keys(layer, x, config)
    scale, pattern = float(q.shape[-1]) ** -0.5, config.layers.pattern
    options: dict[str, Any] = {"queries": queries, "scale": scale, "padding": config.padding}
    heads = range(config.num_heads) if head is None else [head]
    each = (attention_probabilities(q[:, one], k[:, one], pattern, head=one, **options) for one in heads)
    # Added in place, one after the other: each is as large as queries x tiles.
    total, nothing = reduce(lambda so_far, more: (so_far[0].add_(more[0]), so_far[1].add_(more[1])), each)
    total, nothing = total.div_(len(heads)), nothing.div_(len(heads))
    return AttentionMap(total[:, 1:], total[:, 0], nothing)


def query_rows(query: Any, num_tiles: int) -> list[int]:
    """The rows of tile numbers, or of `"cls"`: the cls token comes before the tiles."""
    if isinstance(query, str):
        if query == "cls":
            return [0]
        raise ValueError(f"expected query to be tile numbers or 'cls', got {quoted(query)}")
    if isinstance(query, Tensor):
        check_values("query", query)
    if hasattr(query, "tolist"):  # an array or tensor
        query = query.tolist()
    numbers = [check_int("query", one, 0) for one in (query if isinstance(query, list | tuple) else [query])]
    outside = [one for one in numbers if one >= num_tiles]
    if outside or not numbers:
        raise ValueError(f"expected query tiles in [0, {num_tiles}), got {quoted(outside) if outside else 'none'}")
    return [1 + one for one in numbers]
