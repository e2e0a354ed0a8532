"""A running merge of partial attention (docs/spec.md, 4), in fp32 whatever the partials are in."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core.merge import merge_into, rows_last
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.types import AttentionOutput


class LSEAccumulator:
    """Merges partials of the same queries over other keys, all of them or some rows at a time.

    Half-precision accumulators lose digits with every merge, so `out` is kept in fp32 (fp64 for fp64 partials). Empty
    partials (`out` 0, `lse` -inf) change nothing. Not watched by autograd.

    Args:
        first: the first partial; `out` `(B, N, H, D)`, `lse` `(B, H, N)`. Its tensors may be written to.
        num_kv_heads: key/value heads, which `add_rows` counts in; H by default.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch.ring_attention import LSEAccumulator
        >>> first = AttentionOutput(torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2))
        >>> merged = LSEAccumulator(first)
        >>> merged.add(AttentionOutput(torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)))
        >>> merged.result(torch.float32).out[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    def __init__(self, first: AttentionOutput, num_kv_heads: int | None = None) -> None:
        dtype = accumulator(first.out.dtype)
        # (B, N, H, D) and (B, H, N)
        self._out = first.out.to(dtype)
        self._lse = first.lse.to(dtype)
        heads = first.out.shape[2] if num_kv_heads is None else num_kv_heads
        # (B, N, H_kv, G, D): query heads of one key head side by side, as rows are gathered.
        self._out_rows = self._out.unflatten(2, (heads, -1))
        self._lse_rows = rows_last(self._lse).unflatten(2, (heads, -1))

    def add(self, partial: AttentionOutput) -> None:
        """Merges a partial of all queries; raises ValueError for shapes that are not the first one's."""
        if partial.out.shape != self._out.shape or partial.lse.shape != self._lse.shape:
            raise ValueError(
                f"expected a partial of out {tuple(self._out.shape)} and lse {tuple(self._lse.shape)}, got "
                f"{tuple(partial.out.shape)} and {tuple(partial.lse.shape)}"
            )
        merge_into(self._out, rows_last(self._lse), partial.out, rows_last(partial.lse))

    def add_rows(self, rows: Tensor, heads: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merges a partial of some queries, none of them twice.

        Args:
            rows: `(h, L)`, int64, which queries.
            heads: `(h,)`, int64, of which key/value heads.
            out: `(B, h, L, G, D)`.
            lse: `(B, h, L, G, 1)`.
        """
        # (B, h, L, G, d) of (B, N, H_kv, G, d)
        at = (slice(None), rows, heads[:, None])
        merged_out, merged_lse = self._out_rows[at], self._lse_rows[at]
        merge_into(merged_out, merged_lse, out, lse.to(merged_lse.dtype))
        self._out_rows[at] = merged_out
        self._lse_rows[at] = merged_lse

    def hide(self, masked: Tensor) -> None:
        """Empties the queries where `masked` `(B, N)` is True."""
        self._out.masked_fill_(masked[:, :, None, None], 0.0)
        self._lse.masked_fill_(masked[:, None], -torch.inf)

    def result(self, dtype: torch.dtype) -> AttentionOutput:
        """`out` in `dtype`, `lse` in the accumulator's; later merges do not change them."""
        return AttentionOutput(self._out.to(dtype, copy=True), self._lse.clone())
