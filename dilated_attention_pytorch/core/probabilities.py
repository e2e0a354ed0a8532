"""The attention probabilities of a few queries: the multiset softmax (docs/spec.md, 3) written out query by query.

A query's probability of a key is summed over the branches that show it; nothing is formed for any other query. With
`padding="zero_keys"` (docs/spec.md, 5) part of a query's probability goes to keys that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.core import zero_keys
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.precision import accumulator, without_autocast
from dilated_attention_pytorch.types import Padding


@without_autocast
def attention_probabilities(
    q: Tensor,
    k: Tensor,
    pattern: DilatedPattern,
    *,
    head: int,
    queries: Sequence[int],
    scale: float,
    padding: Padding = "none",
) -> tuple[Tensor, Tensor]:
    """What some queries of one head give each key, over a whole sequence without mask and without causality.

    Args:
        q: `(N, D)`, the head's queries.
        k: `(N, D)`, its keys.
        pattern: the branches.
        head: which head of the pattern q and k are.
        queries: positions.
        scale: factor on q . k.
        padding: as in `dilated_attention`.

    Returns:
        `(len(queries), N)` and `(len(queries),)`, fp32 (fp64): the probability of each key, and of zero keys. A row of
        both sums to 1, or to 0 for a query that sees nothing.
    """
    dtype = accumulator(q.dtype)
    n = k.shape[0]
    found = torch.zeros(len(queries), n, dtype=dtype, device=k.device)
    nothing = torch.zeros(len(queries), dtype=dtype, device=k.device)
    for row, query in enumerate(queries):
        views = _views(pattern, head, query, n, padding)
        logits = []
        for source, keys, _ in views:
            at = slice(keys.start, keys.stop, keys.step)
            row_of_q = q[source].to(dtype) if source >= 0 else q.new_zeros(q.shape[1], dtype=dtype)
            logits.append(k[at].to(dtype) @ row_of_q * scale)
        pads = sum(view[2] for view in views)
        everything = torch.cat([*logits, q.new_zeros(min(pads, 1), dtype=dtype)]) if views else q.new_zeros(0)
        if everything.numel() == 0:
            continue
        top = everything.max()
        weights = [(s - top).exp() for s in logits]
        zero_weight = pads * (-top).exp()
        total = sum((w.sum() for w in weights), zero_weight)
        for (_, keys, _), w in zip(views, weights, strict=True):
            found[row, slice(keys.start, keys.stop, keys.step)] += w / total
        nothing[row] = zero_weight / total
    return found, nothing


def _views(pattern: DilatedPattern, head: int, query: int, n: int, padding: Padding) -> list[tuple[int, range, int]]:
    """For each branch that the query belongs to: the row of q it reads (-1 for zeros), its keys, and its zero keys."""
    if padding == "none":
        return [(query, keys, 0) for keys in pattern.keys_of(query, head, n)]
    found = (zero_keys.keys_of(pattern, branch, query, head, n) for branch in range(len(pattern.branches)))
    return [view for view in found if view is not None]
