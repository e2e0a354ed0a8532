"""What the workers of the curve's ring tests run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.ring_attention import (
    HilbertRingAttention,
    RingAttentionConfig,
    RingDilatedAttentionHilbert,
    RingError,
)
from dilated_attention_pytorch.ring_attention.utils import rows

Groups = dict[int, dist.ProcessGroup]
CLASSES = {"curve": RingDilatedAttentionHilbert, "original": HilbertRingAttention}


def make(
    kind: str, group: dist.ProcessGroup | None, pattern: dict[str, Any], **settings: Any
) -> RingDilatedAttentionHilbert | HilbertRingAttention:
    ring = {name: settings.pop(name) for name in ("dropout", "mode", "check") if name in settings}
    return CLASSES[kind](RingAttentionConfig(**pattern, timeout=20, **ring), group, **settings)


def inputs(length: int, heads: tuple[int, int], masked: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, the cotangents of out and lse, and a mask, all in original order."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, n, 5) for n in (heads[0], heads[1], heads[1], heads[0])] + [(2, heads[0], length)]
    drawn = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]
    mask = torch.rand(2, length, generator=generator) < (0.7 if masked else 2.0)
    return [*drawn, mask]


def attend(
    groups: Groups | None, world_size: int, kind: str, length: int, heads: tuple[int, int], masked: bool,
    is_causal: bool, seed: int | None, pattern: dict[str, Any], settings: dict[str, Any], broken: bool = False,
) -> dict[str, Tensor] | None:  # fmt: skip
    """This rank's part of everything, in the order that the module takes."""
    rank = 0 if groups is None else dist.get_rank()
    if rank >= world_size:
        return None
    attention = make(kind, None if groups is None else groups[world_size], pattern, **settings)
    *tensors, mask = inputs(length, heads, masked)
    if kind == "curve":
        tensors = [attention.apply_hilbert_ordering(x, 2 if x.dim() == 3 else 1) for x in tensors]
        mask = attention.apply_hilbert_ordering(mask)
    *qkv, grad_out, grad_lse = (attention.own_rows(x, 2 if x.dim() == 3 else 1) for x in tensors)
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    plan = rows.Move.plan

    def wrong(*arguments: Any) -> rows.Move:
        right = plan(*arguments)
        return right._replace(arriving=right.arriving.flip(0))

    with mock.patch.object(rows.Move, "plan", wrong if broken else plan):
        out, lse = attention.with_lse(q, k, v, is_causal, attention.own_rows(mask) if masked else None, seed=seed)
    objective = (out * grad_out).sum() + (lse.masked_fill(torch.isneginf(lse), 0.0) * grad_lse).sum()
    dq, dk, dv = torch.autograd.grad(objective, (q, k, v))
    return {"out": out.detach(), "lse": lse.detach().transpose(1, 2), "dq": dq, "dk": dk, "dv": dv}


def different_orders(groups: Groups, world_size: int) -> str | None:
    """One rank has other coordinates; the error's text."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    grid = (4, 6) if rank == 1 else (6, 4)
    attention = make("original", groups[world_size], {"segment_lengths": [8], "dilation_rates": [1]}, grid=grid)
    x = torch.zeros(1, 24 // world_size, 1, 2)
    try:
        attention(x, x, x)
    except RingError as error:
        return str(error)
    return "no error"
