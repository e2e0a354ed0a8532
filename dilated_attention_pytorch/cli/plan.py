"""`plan`: what a pattern costs and covers at a length, before anything is computed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, human_bytes, human_count
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds, forecast
from dilated_attention_pytorch.ring_attention.plan import closed_form_units, equal_bounds, unit_bytes

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    length: options.Length = 65_536,
    segments: options.Lengths = options.PAPER_LENGTHS,
    rates: options.Rates = options.PAPER_RATES,
    heads: options.Heads = 12,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    offsets: options.OffsetRule = "modulo",
    causal: options.Causal = True,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: of the tensors.")] = "bf16",
    query: Annotated[int | None, typer.Option(help="Also list the keys of this query.")] = None,
    head: Annotated[int, typer.Option(help="The head whose keys are listed.")] = 0,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Also the bytes that ring attention moves between so many ranks.")
    ] = None,
    balanced: Annotated[bool, typer.Option(help="With --ranks: shards of equal work instead of equal length.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """FLOPs, memory, coverage and neighbours of a pattern for a length (batch of one)."""
    if dtype not in _ELEMENT_BYTES:
        raise ValueError(f"expected --dtype to be one of {sorted(_ELEMENT_BYTES)}, got {dtype!r}")
    if length < 1:
        raise ValueError(f"expected --length of at least 1, got {length}")
    pattern = options.make_pattern(segments, rates, heads, offsets)
    found = _measure(pattern, length, head_dim, causal, _ELEMENT_BYTES[dtype])
    if query is not None:
        found["neighbours"] = _neighbours(pattern, length, query, head, causal)
    if ranks is not None:
        found["ring"] = _ring(pattern, length, ranks, head_dim, causal, _ELEMENT_BYTES[dtype], balanced)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _show(found, pattern, length, causal)


def _measure(pattern: DilatedPattern, length: int, head_dim: int, causal: bool, width: int) -> dict[str, Any]:
    heads = pattern.num_heads
    branches = []
    for segment, rate in pattern.branches:
        alone = DilatedPattern((segment,), (rate,), heads, pattern.offsets)
        pairs = alone.pairs(length, is_causal=causal)
        branches.append({"segment_length": segment, "dilation_rate": rate, "pairs": pairs})
    pairs = pattern.pairs(length, is_causal=causal)
    dense = heads * (length * (length + 1) // 2 if causal else length * length)
    tensor = length * heads * head_dim * width
    return {
        "length": length,
        "heads": heads,
        "head_dim": head_dim,
        "causal": causal,
        "branches": branches,
        "coverage": pattern.coverage(length),
        "keys_per_query": pairs / (length * heads),
        # As the op's own FLOP formulas: two products of D a pair forward, five backward.
        "flops_forward": 4 * head_dim * pairs,
        "flops_backward": 10 * head_dim * pairs,
        "flops_dense_forward": 4 * head_dim * dense,
        "bytes_q_k_v_out": 4 * tensor,
        "bytes_lse": 4 * length * heads,
        "bytes_dense_logits": length * length * heads * width,
    }


def _neighbours(pattern: DilatedPattern, length: int, query: int, head: int, causal: bool) -> dict[str, Any]:
    if not 0 <= query < length:
        raise ValueError(f"expected --query in [0, {length}), got {query}")
    if not 0 <= head < pattern.num_heads:
        raise ValueError(f"expected --head in [0, {pattern.num_heads}), got {head}")
    member = pattern.membership(torch.tensor(query))[:, head].tolist()
    ranges = iter(pattern.keys_of(query, head, length, is_causal=causal))  # of the branches it belongs to, in order
    keys = [next(ranges) if belongs else range(0) for belongs in member]
    rows = [
        {"branch": i, "count": len(k), "first": k[0] if k else None, "last": k[-1] if k else None, "step": k.step}
        for i, k in enumerate(keys)
    ]
    return {"query": query, "head": head, "branches": rows}


def _ring(
    pattern: DilatedPattern, length: int, ranks: int, head_dim: int, causal: bool, width: int, balanced: bool
) -> dict[str, Any]:
    bounds = balanced_bounds(pattern, length, ranks, is_causal=causal) if balanced else equal_bounds(length, ranks)
    shares = forecast(pattern, bounds, head_dim, element_size=width, is_causal=causal)
    units = None if causal or balanced else closed_form_units(pattern, length, ranks)
    closed = None if units is None else units * unit_bytes(1, head_dim, width)
    return {"shares": [share._asdict() for share in shares], "bytes_closed_form": closed}


def _show(found: dict[str, Any], pattern: DilatedPattern, length: int, causal: bool) -> None:
    kind = "causal" if causal else "full"
    branches = Table(title=f"branches at {length:,} positions, {pattern.num_heads} heads, {kind}", title_justify="left")
    for name in ("branch", "segment", "rate", "segments", "pairs", "share"):
        branches.add_column(name, justify="right")
    total = sum(b["pairs"] for b in found["branches"])
    for i, b in enumerate(found["branches"]):
        w, share = b["segment_length"], b["pairs"] / total if total else 0.0
        cells = (f"{i}", f"{w:,}", f"{b['dilation_rate']}", f"{-(-length // w):,}", human_count(b["pairs"]))
        branches.add_row(*cells, f"{share:.1%}")
    console.print(branches)
    cost = Table(title="cost of one layer's attention, batch of one", title_justify="left", show_header=False)
    cost.add_column()
    cost.add_column(justify="right")
    dense = found["flops_dense_forward"] / found["flops_forward"] if found["flops_forward"] else float("inf")
    cost.add_row("FLOPs forward", human_count(found["flops_forward"]))
    cost.add_row("FLOPs backward", human_count(found["flops_backward"]))
    cost.add_row("dense attention, forward", f"{human_count(found['flops_dense_forward'])} ({dense:,.1f}x)")
    cost.add_row("q, k, v and out", human_bytes(found["bytes_q_k_v_out"]))
    cost.add_row("log-sum-exp", human_bytes(found["bytes_lse"]))
    cost.add_row("never formed: dense logits", human_bytes(found["bytes_dense_logits"]))
    cost.add_row("keys per query and head (mean)", f"{found['keys_per_query']:,.1f}")
    cost.add_row("(position, head) pairs in a branch (coverage)", f"{found['coverage']:.2%}")
    console.print(cost)
    if "ring" in found:
        ring = Table(title="ring attention, one layer's forward", title_justify="left")
        for name in ("rank", "shard", "receives", "sends", "dense K and V", "share of work"):
            ring.add_column(name, justify="right")
        for rank, share in enumerate(found["ring"]["shares"]):
            sizes = (human_bytes(share[name]) for name in ("received", "sent", "dense"))
            work = share["pairs"] / total if total else 0.0
            ring.add_row(f"{rank}", f"{share['start']:,} - {share['stop']:,}", *sizes, f"{work:.1%}")
        console.print(ring)
        closed = found["ring"]["bytes_closed_form"]
        console.print(f"closed form: {'does not apply' if closed is None else f'{human_bytes(closed)} a rank'}")
    if "neighbours" in found:
        near = found["neighbours"]
        keys = Table(title=f"keys of query {near['query']:,}, head {near['head']}", title_justify="left")
        for name in ("branch", "keys", "first", "last", "step"):
            keys.add_column(name, justify="right")
        for row in near["branches"]:
            ends = [f"{row[e]:,}" if row[e] is not None else "-" for e in ("first", "last")]
            keys.add_row(f"{row['branch']}", f"{row['count']:,}", *ends, f"{row['step']}" if row["count"] else "-")
        console.print(keys)
