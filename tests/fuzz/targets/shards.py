"""Shards, rings along curves, and streaming's two halves."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import (
    DilatedPattern,
    HilbertRingAttention,
    RingAttentionConfig,
    RingDilatedAttentionHilbert,
    RingDistributedDilatedAttention,
    dilated_attention_with_lse,
)
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds
from dilated_attention_pytorch.streaming import streamed_backward, streamed_forward
from dilated_attention_pytorch.testing import relative_norm
from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets.modules import spoil
from fuzz.values import pick, strided

_BRANCHES: dict[str, Any] = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}


@target("balanced_bounds", 10)
def _bounds(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        "pattern": DilatedPattern((4, 8), (1, 2), 2), "seq_len": draw(st.integers(0, 60)),
        "world_size": draw(st.integers(1, 5)), "is_causal": draw(st.booleans()), "multiple": None,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)
    for name in ("seq_len", "world_size"):  # it looks at each bound, which is no hang
        if isinstance(given[name], int) and 1000 < given[name] < 2**63:
            given[name] = 1000

    def check(bounds: tuple[int, ...]) -> None:
        seq_len, world_size = (operator.index(given[name]) for name in ("seq_len", "world_size"))
        assert bounds[0] == 0 and bounds[-1] == seq_len and len(bounds) == world_size + 1
        assert list(bounds) == sorted(bounds)

    return Call(balanced_bounds, (), given, check=check, right=not names)


@target("rings along curves", 14, "RingDilatedAttentionHilbert", "HilbertRingAttention", "HilbertMixin")
def _curves(draw: st.DrawFn) -> Call:
    cls = draw(st.sampled_from([RingDilatedAttentionHilbert, HilbertRingAttention]))
    given: dict[str, Any] = {
        "config": RingAttentionConfig(**_BRANCHES), "process_group": None, "grid": (3, 4), "coords": None,
        "curve": draw(st.sampled_from(["hilbert", "morton", "snake", "raster"])),
        "causal_along": draw(st.sampled_from(["original", "curve"])), "mesh_dim": None,
    }  # fmt: skip
    if draw(st.booleans()):
        given |= {"grid": None, "coords": torch.cartesian_prod(torch.arange(3), torch.arange(4))}
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(module: Any) -> None:
        if not names:
            x = torch.randn(1, 12, 2, 4)
            assert bool(module.eval()(x, x, x, is_causal=True).isfinite().all())

    # A tuple in the config's place is 0.2's argument list.
    return Call(cls, (), given, (*given, "segment_lengths", "dilation_rates"), check, not names)


@target("RingDistributedDilatedAttention", 10)
def _distributed(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        "embed_dim": 16, "num_heads": 4, "config": RingAttentionConfig(**_BRANCHES), "process_group": None,
        "mesh_dim": None, "num_kv_heads": draw(st.sampled_from([None, 2])), "bias": True, "layer_norm": True,
        "layer_norm_eps": 1e-5, "gamma_init": 1.0, "device": None, "dtype": None,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(module: Any) -> None:
        if not names:
            x = torch.randn(2, 11, 16)
            assert module.eval()(x).shape == x.shape

    return Call(RingDistributedDilatedAttention, (), given, check=check, right=not names)


@target("streamed_forward and streamed_backward", 16, "streamed_forward", "streamed_backward")
def _halves(draw: st.DrawFn) -> Call:
    n = draw(st.integers(1, 30))
    q, k, v, grad = (torch.randn(2, n, 2, 4, dtype=torch.float64) for _ in range(4))
    options: dict[str, Any] = {**_BRANCHES, "is_causal": draw(st.booleans()), "range_length": draw(st.integers(1, n))}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = {name: value for name, value in options.items() if name != "range_length"}
    out, lse = dilated_attention_with_lse(*leaves, **whole)
    backward = draw(st.booleans())
    want: tuple[Tensor, ...] = torch.autograd.grad(out, leaves, grad) if backward else (out.detach(), lse.detach())
    given: dict[str, Any] = {"q": draw(strided(q.clone())), "k": k, "v": v, **options, "key_padding_mask": None}
    if backward:
        given |= {"grad_out": grad, "out": out.detach(), "lse": lse.detach(), "dq": None, "dk": None, "dv": None}
    else:
        given |= {"out": torch.empty_like(q), "lse": None}
    same = torch.equal(given["q"], q)
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(found: tuple[Tensor, ...]) -> None:
        if not names and same:
            assert all(relative_norm(a, b, scale=1.0) <= 1e-10 for a, b in zip(found, want, strict=True))

    return Call(streamed_backward if backward else streamed_forward, (), given, check=check, right=not names)
