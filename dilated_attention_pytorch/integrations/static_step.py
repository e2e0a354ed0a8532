"""One query per row over a static cache, in shapes that no position changes: transformers compiles and captures it.

The buffers hold all positions, so a branch's keys are gathered: w / r of them at the same distances for every head and
row, of which each sees those of its own segment, and none where it is no member.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.core.members import ceil_div, keys_behind
from dilated_attention_pytorch.core.pattern import DilatedPattern


def static_step(
    query: Tensor, buffers: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor | int], pattern: DilatedPattern, shift: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of new positions whose keys and values are in the buffers already.

    Args:
        query: `(B, H, 1, D)`.
        buffers: keys `(B, H_kv, K, D)` and values `(B, H_kv, K, D_v)`, those of position n in row n.
        at: the position, int64 of no dimension, and each row's first real one, int64 `(B,)` or 0.
        pattern: of H_kv heads.
        shift: segment shift of the layer.
        scale: the factor on q . k.

    Returns:
        `(B, H, 1, D_v)`, 0 for a head without keys.
    """
    key, value = buffers
    position, first = at
    own = (position - first).expand(query.shape[0])
    heads = torch.arange(pattern.num_heads, device=query.device)
    rows, seen = [], []
    for branch, (length, rate) in enumerate(pattern.branches):
        steps = torch.arange(ceil_div(min(length, key.shape[2]), rate), device=query.device)
        rows.append(position - steps * rate)
        seen.append(keys_behind(own, (length, rate), shift, pattern.offsets_of(branch, heads), steps))
    at_rows = torch.cat(rows).clamp_min(0)  # (S,)
    mask = torch.cat(seen, -1)  # (B, H_kv, S)
    mask = mask.repeat_interleave(query.shape[1] // pattern.num_heads, 1)[:, :, None]
    # A branch that shows a key again counts it again: it is gathered twice.
    found = F.scaled_dot_product_attention(
        query, key.index_select(2, at_rows), value.index_select(2, at_rows), attn_mask=mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return torch.where(mask.any(-1, keepdim=True), found, 0.0)
