"""Rings of one, the pool, streaming and the curves."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import (
    RingAttentionConfig,
    RingDilatedAttention,
    UnifiedMemoryPool,
    dilated_attention_streamed,
    dilated_attention_with_lse,
)
from dilated_attention_pytorch.core.memory.unified_pool import PoolExhausted
from dilated_attention_pytorch.kernels.hilbert import curve_order, hilbert_decode, hilbert_encode, hilbert_order
from dilated_attention_pytorch.types import AttentionOutput
from fuzz import values
from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets.attention import compare
from fuzz.targets.modules import spoil
from fuzz.values import FLOATS, anything, dense, numbers, pick, spoiled, strided

_BRANCHES: dict[str, Any] = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}


@target("RingAttentionConfig", 12)
def _ring_config(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        **_BRANCHES, "offsets": "modulo", "segment_shift": draw(st.sampled_from([0, 3])), "scale": None,
        "dropout": 0.1, "padding": "none", "mode": "sparse",
        "gradient_dtype": None, "remote_rows": "keep", "check": "first", "timeout": 60.0, "backend": "auto",
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(config: RingAttentionConfig) -> None:
        assert hash(config) == hash(RingAttentionConfig(**given))
        if "scale" in names:  # it may be too large for the rows' dtype
            return
        x = torch.randn(1, 9, 2, 4)
        RingDilatedAttention(config).eval()(x, x, x)

    return Call(RingAttentionConfig, (), given, check=check, right=not names)


@target("RingDilatedAttention", 14)
def _ring(draw: st.DrawFn) -> Call:
    config = RingAttentionConfig(**_BRANCHES)
    if draw(st.booleans()):
        given: dict[str, Any] = {"config": config, "process_group": None, "mesh_dim": None}
        names = pick(draw, list(given))
        spoil(draw, given, names)
        return Call(RingDilatedAttention, (), given, right=not names)
    module = RingDilatedAttention(config).eval()
    given = {
        "query": torch.randn(2, 11, 2, 4), "key": torch.randn(2, 11, 2, 4), "value": torch.randn(2, 11, 2, 4),
        "is_causal": draw(st.booleans()), "key_padding_mask": None, "seed": None,
    }  # fmt: skip
    if draw(st.booleans()):
        given["key_padding_mask"] = torch.arange(22).view(2, 11) % 5 > 0
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(result: AttentionOutput) -> None:
        tensors = tuple(given[name] for name in ("query", "key", "value"))
        options = {**_BRANCHES, "is_causal": given["is_causal"], "key_padding_mask": given["key_padding_mask"]}
        compare(result, tensors, options, False)

    return Call(module.with_lse, (), given, (*given, "q", "k", "v"), check, not names)


@target("dilated_attention_streamed", 24)
def _streamed(draw: st.DrawFn) -> Call:
    dtype = draw(st.sampled_from(FLOATS))
    n, heads = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2]))
    q = torch.randn(2, n, 2, 4, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(2, n, heads, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    given: dict[str, Any] = {
        "q": draw(strided(q)), "k": draw(strided(k)), "v": draw(strided(v)), **_BRANCHES,
        "is_causal": draw(st.booleans()), "scale": None, "offsets": "modulo",
        "segment_shift": draw(st.sampled_from([0, 3, 16])), "key_padding_mask": None,
        "backend": "auto", "out": None, "device": None, "device_limit": None, "range_length": None, "pool": None,
        "progress": False, "dropout_p": 0.0, "row_start": None, "cu_seqlens": None, "mixing_gradient": "exact",
        "padding": "none",
    }  # fmt: skip
    if draw(st.booleans()):
        given["range_length"] = draw(st.integers(1, n))
    if draw(st.booleans()):
        given["key_padding_mask"] = torch.arange(2 * n).view(2, n) % 5 > 0
    if draw(st.booleans()):
        given["out"] = torch.empty_like(q)
    names = pick(draw, list(given))
    spoil(draw, given, [name for name in names if name != "progress"])
    if "progress" in names:
        given["progress"] = draw(anything)
        if given["progress"] is True:  # it would draw a bar
            given["progress"] = None

    def check(result: Tensor) -> None:
        assert result is given["out"] or given["out"] is None
        tensors = tuple(given[name] for name in "qkv")
        shared = (*_BRANCHES, "is_causal", "scale", "offsets", "segment_shift", "key_padding_mask")
        options = {name: given[name] for name in shared}
        lse = dilated_attention_with_lse(*(dense(x) for x in tensors), **options).lse
        compare(AttentionOutput(result, lse), tensors, options, False)

    return Call(dilated_attention_streamed, (), given, check=check, right=not names)


@target("UnifiedMemoryPool", 24, "UnifiedMemoryPool", "Handle")
def _pool(draw: st.DrawFn) -> Call:
    strategies = ["simple", "bucketed", "fragment_aware", "numa", "adaptive"]
    what = draw(st.sampled_from(["pool", "borrow", "borrow", "release", "handle"]))
    if what == "pool":
        given: dict[str, Any] = {"strategy": draw(st.sampled_from(strategies)), "limit": None}
        names = pick(draw, list(given))
        spoil(draw, given, names)
        return Call(UnifiedMemoryPool, (), given, right=not names)
    pool = UnifiedMemoryPool(draw(st.sampled_from(strategies)), limit=1 << 22)
    given = {
        "shape": (3, 5),
        "dtype": torch.float32,
        "device": str(values.PLACE),
        "purpose": "fuzz",
        "pinned": False,
        "zero": True,
    }
    if what == "borrow":
        names = pick(draw, list(given))
        spoil(draw, given, [name for name in names if name != "shape"])
        if "shape" in names:
            given["shape"] = draw(st.one_of(st.lists(numbers, max_size=4), numbers, anything))

        def check(handle: Any) -> None:
            assert handle.tensor.dtype == given["dtype"] and handle.tensor.is_contiguous()
            handle.release()
            assert pool.stats().current == 0

        return Call(pool.borrow, (), given, check=check, right=not names, also=(PoolExhausted,))
    handle = pool.borrow(**given)
    wrong = {"tensor": handle.tensor, "stream": None}
    names = pick(draw, list(wrong))
    spoil(draw, wrong, names)
    if what == "handle":
        return Call(handle.release, (wrong["stream"],), {}, ("stream",), right="stream" not in names, keep=pool)
    return Call(pool.release, (), wrong, right=not names, keep=handle)


@target("Hilbert curves", 24, "hilbert_encode", "hilbert_decode", "hilbert_order", "curve_order")
def _hilbert(draw: st.DrawFn) -> Call:
    dims, bits = draw(st.sampled_from([2, 3])), draw(st.integers(1, 6))
    points = torch.randint(1 << bits, (draw(st.integers(0, 20)), dims))
    what = draw(st.sampled_from(["encode", "decode", "order", "curve"]))
    if what == "encode":
        given: dict[str, Any] = {"coords": points, "num_bits": bits}
        function: Any = hilbert_encode
    elif what == "decode":
        given = {"index": torch.randint(1 << (dims * bits), (5,)), "num_dims": dims, "num_bits": bits}
        function = hilbert_decode
    else:
        given = {"coords": points, "grid": None}
        if draw(st.booleans()):
            given = {"coords": None, "grid": draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))}
        function = hilbert_order
        if what == "curve":
            given["name"] = draw(st.sampled_from(["raster", "snake", "morton", "hilbert"]))
            function = curve_order
    names = pick(draw, list(given))
    for name in names:
        if isinstance(given[name], Tensor):
            given[name] = draw(st.one_of(spoiled(given[name]), strided(given[name])))
        elif name == "grid":
            given[name] = draw(st.one_of(st.lists(numbers, max_size=4), anything))
        else:
            given[name] = draw(st.one_of(numbers, anything))

    def check(result: Any) -> None:
        if what == "encode":
            assert torch.equal(hilbert_decode(result, given["coords"].shape[-1], given["num_bits"]), given["coords"])
        elif what == "decode":
            assert torch.equal(hilbert_encode(result, given["num_bits"]), given["index"])
        else:
            assert torch.equal(result.order[result.inverse], torch.arange(len(result.order)))

    return Call(function, (), given, check=check, right=not names)
