"""Attention maps of a slide encoder: what a tile, or the cls token, looks at."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.probabilities import attention_probabilities

if TYPE_CHECKING:
    from dilated_attention_pytorch.models.slide.encoder import SlideEncoder


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


@torch.no_grad()
def attention_map(
    encoder: SlideEncoder, tiles: Tensor, coords: Tensor, *, layer: int, head: int | None, query: Any
) -> AttentionMap:
    """See `SlideEncoder.attention_map`."""
    config = encoder.config
    if any(getattr(module, "head_groups", False) for module in encoder.modules()):
        raise ValueError(
            "expected an encoder with head_groups=False, got one made in legacy mode, whose heads have one branch each"
        )
    if encoder.training:
        raise ValueError("expected a model in evaluation mode, got one in training: call eval() first")
    if not 0 <= check.check_int("layer", layer, 0) < config.depth:
        raise ValueError(f"expected layer in [0, {config.depth}), got {layer}")
    if head is not None and not 0 <= check.check_int("head", head, 0) < config.num_heads:
        raise ValueError(f"expected head in [0, {config.num_heads}), got {head}")
    if isinstance(tiles, Tensor) and tiles.dim() == 3 and tiles.shape[0] != 1:
        raise ValueError(f"expected one slide, tiles of shape (1, L, {config.in_chans}), got {tuple(tiles.shape)}")
    x, _ = encoder.embed(tiles, coords)  # checks both
    positions = _positions(query, tiles.shape[1])
    states = itertools.chain([x], encoder.encoder.states(x, is_causal=False))
    x = deque(itertools.islice(states, layer + 1), maxlen=1).pop()  # what goes into the layer asked for
    found: Any = encoder.encoder.layers[layer]
    attention = found.self_attn
    heads = range(config.num_heads) if head is None else [head]
    h = found.self_attn_layer_norm(x)[0]
    q, k = (proj(h).unflatten(-1, (config.num_heads, -1)) for proj in (attention.q_proj, attention.k_proj))
    total: Tensor | None = None
    nothing: Tensor | None = None
    for one in heads:
        p, zero = attention_probabilities(
            q[:, one],
            k[:, one],
            config.layers.pattern,
            head=one,
            queries=positions,
            scale=float(q.shape[-1]) ** -0.5,
            padding=config.padding,
        )
        total, nothing = (p, zero) if total is None or nothing is None else (total.add_(p), nothing.add_(zero))
    assert total is not None and nothing is not None
    total, nothing = total.div_(len(heads)), nothing.div_(len(heads))
    return AttentionMap(total[:, 1:], total[:, 0], nothing)


def _positions(query: Any, num_tiles: int) -> list[int]:
    """Rows of the sequence, in which the cls token comes before the tiles."""
    if isinstance(query, str):
        if query == "cls":
            return [0]
        raise ValueError(f"expected query to be tile numbers or 'cls', got {query!r}")
    if hasattr(query, "tolist"):  # an array or tensor
        query = query.tolist()
    numbers = [check.check_int("query", one, 0) for one in (query if isinstance(query, list | tuple) else [query])]
    outside = [one for one in numbers if one >= num_tiles]
    if outside or not numbers:
        raise ValueError(f"expected query tiles in [0, {num_tiles}), got {outside or 'none'}")
    return [1 + one for one in numbers]
