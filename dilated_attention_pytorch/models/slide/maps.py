"""Maps of a slide: how much each tile is attended to, and how much of that is the pattern's doing.

A dilated pattern shows a query some tiles in many branches, some in one and some in none, so probabilities draw the
pattern first. Divided by what a uniform softmax over the same keys gives (every logit 0), they draw what the layer's
logits say: 1 where a tile gets its share, 2 where it gets twice that.

Both are products of a row vector with attention matrices, and the transposed product is the gradient of attention with
respect to its values: dV[m] = sum over n of P[n, m] dO[n]. So any backend computes it, and no matrix is formed.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.precision import accumulator, without_autocast
from dilated_attention_pytorch.core.validation import check_bool, check_index, check_instance, quoted
from dilated_attention_pytorch.functional import dilated_attention
from dilated_attention_pytorch.models.slide.attention import queries_and_keys, query_rows
from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder


class SlideMap(NamedTuple):
    """What one query gives each tile, both `(L,)`, fp32 (fp64), on the encoder's device.

    Attributes:
        probability: the attention.
        ratio: the attention over that of uniform logits; NaN for a tile that the query does not see.
    """

    probability: Tensor
    ratio: Tensor


@torch.no_grad()
def slide_map(
    encoder: SlideEncoder,
    tiles: Tensor,
    coords: Tensor,
    *,
    query: int | Literal["cls"] = "cls",
    layer: int | None = None,
    heads: int | Literal["mean", "max"] = "mean",
    rollout: bool = False,
) -> SlideMap:
    """The attention of the cls token, or of a tile, to each tile of a slide.

    Rollout (Abnar and Zuidema 2020, arXiv 2005.00928, section 3) multiplies the layers' (P + I) / 2. The query's row is
    carried back through them, so memory is that of the hidden states, which wait on the CPU:
    `(layer + 1) * (L + 1) * embed_dim` numbers, 2.2 GB for 60,000 tiles in 12 layers of 768 in fp32.

    Args:
        encoder: in evaluation mode.
        tiles: `(1, L, in_chans)`, one slide.
        coords: `(1, L, 2)`.
        query: a tile's number, or `"cls"`.
        layer: which layer, from 0; the last by default. A rollout goes from it to the first.
        heads: the mean over heads, a head's number, or the largest of each tile (not in a rollout, which is one of
            means or of one head).
        rollout: through the layers in place of one layer alone.

    Raises:
        ValueError: a layer, head or query that is not there; `heads="max"` with a rollout; as `attention_map`.

    Example:
        >>> encoder = SlideEncoder(in_chans=8, embed_dim=16, depth=2, num_heads=4,
        ...                        ffn_dim=16).eval()
        >>> coords = 256 * torch.cartesian_prod(torch.arange(5), torch.arange(6))
        >>> slide_map(encoder, torch.randn(1, 30, 8), coords[None], rollout=True).ratio.shape
        torch.Size([30])
    """
    check_instance("encoder", encoder, SlideEncoder)
    check_bool("rollout", rollout)
    config, largest = encoder.config, isinstance(heads, str) and heads == "max"
    if isinstance(heads, str) and heads not in ("mean", "max"):
        raise ValueError(f"expected heads to be 'mean', 'max' or a head's number, got {quoted(heads)}")
    if not isinstance(heads, str):
        heads = check_index("heads", heads, config.num_heads)
    if largest and rollout:
        raise ValueError("expected heads to be 'mean' or a head's number with rollout=True, got 'max'")
    last = config.depth - 1 if layer is None else layer
    states = encoder.layer_inputs(tiles, coords, last, None if isinstance(heads, str) else heads)
    rows = query_rows(query, len(tiles[0]))
    if len(rows) != 1:
        raise ValueError(f"expected one query, got {len(rows)}")
    inputs = [x.cpu() for x in states] if rollout else list(deque(states, maxlen=1))
    device = encoder.cls_token.device
    asked = torch.zeros(inputs[0].shape[1], 1, dtype=accumulator(inputs[0].dtype), device=device)
    asked[rows] = 1.0
    shares = asked.new_zeros(config.num_heads)  # of each head in the result
    shares[slice(None) if isinstance(heads, str) else heads] = 1.0
    if heads == "mean":
        shares /= config.num_heads
    learned, uniform = asked, asked  # (N, 1), or (N, H) for the largest
    layers: Any = encoder.encoder.layers
    for i, x in zip(range(last, -1, -1), reversed(inputs), strict=False):
        q, k = (one.to(asked.dtype)[None] for one in queries_and_keys(layers[i], x.to(device), config))
        given = (
            _transposed(learned * shares, q, k, config),
            _transposed(uniform * shares, torch.zeros_like(q), k, config),
        )
        if not largest:
            given = (given[0].sum(1, keepdim=True), given[1].sum(1, keepdim=True))
        learned, uniform = ((a + b) / 2 for a, b in zip(given, (learned, uniform), strict=True)) if rollout else given
    ratio = torch.where(uniform > 0, learned / uniform, -1.0).amax(1)[1:]
    return SlideMap(learned.amax(1)[1:], ratio.masked_fill(ratio < 0, float("nan")))


@without_autocast
def _transposed(weights: Tensor, q: Tensor, k: Tensor, config: SlideEncoderConfig) -> Tensor:
    """What each key gets from queries of some weights: weights `(N, H)`, q and k `(1, N, H, D)` to `(N, H)`."""
    pattern = config.layers.pattern
    with torch.enable_grad():
        v = torch.zeros_like(k).requires_grad_()
        out = dilated_attention(
            q, k, v, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
            offsets=pattern.offsets, padding=config.padding,
        )  # fmt: skip
    grad = torch.zeros_like(out)
    grad[0, :, :, 0] = weights  # values of one number would do; a backend takes no narrower ones than q
    return torch.autograd.grad(out, v, grad)[0][0, :, :, 0]
