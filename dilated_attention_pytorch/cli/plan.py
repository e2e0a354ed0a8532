"""`plan`: reach and cost of a pattern at a length, before anything is computed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
from typer import Context, Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, human_bytes, human_count, print_table
from dilated_attention_pytorch.cli.plan_model import plan_model
from dilated_attention_pytorch.cli.suggest import reach_of, show_suggested, suggest
from dilated_attention_pytorch.cli.words import in_options
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import layer_shifts
from dilated_attention_pytorch.core.validation import check_index, check_positive_int
from dilated_attention_pytorch.models.reach import out_of_reach
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds, forecast
from dilated_attention_pytorch.ring_attention.plan import closed_form_needs, closed_form_units, equal_bounds, unit_bytes

# What --suggest says nothing of, or chooses itself.
_NOT_SUGGESTED = ("length", "segments", "rates", "dtype", "shift", "query", "ranks")

# What the model's own file says.
_NOT_OF_MODELS = (
    *_NOT_SUGGESTED,
    "heads",
    "head_dim",
    "layers",
    "offsets",
    "causal",
    "balanced",
    "head",
    "suggest_for",
)
_MODEL = "Plan the training of a model: a preset of train, or a file such as the train.json of a run."


def plan(
    context: Context,
    length: options.Length = 65_536,
    segments: options.Lengths = options.PAPER_LENGTHS,
    rates: options.Rates = options.PAPER_RATES,
    heads: options.Heads = 12,
    head_dim: options.HeadDim = 64,
    offsets: options.OffsetRule = "modulo",
    causal: options.Causal = True,
    dtype: options.Dtype = "bf16",
    layers: options.Layers = 12,
    shift: options.Shift = "0",
    suggest_for: Annotated[
        int | None, Option("--suggest", help="Compare a few patterns for so many positions.")
    ] = None,
    query: Annotated[int | None, Option(help="Also list the keys of this query.")] = None,
    head: Annotated[int, Option(help="The head of --query.")] = 0,
    ranks: Annotated[int | None, Option(min=1, max=65536, help="Also the bytes of a ring of so many ranks.")] = None,
    balanced: Annotated[
        bool, Option("--balanced", help="With --ranks: shards of equal work instead of equal length.")
    ] = False,
    model: Annotated[str | None, Option(metavar="PRESET|FILE", help=_MODEL)] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="With --model: change a field.")
    ] = None,
    devices: Annotated[int, Option(help="With --model: how many.")] = 1,
    memory: Annotated[float, Option(help="With --model: GiB of each.")] = 80.0,
    tflops: Annotated[float, Option(help="With --model: dense bf16 TFLOP/s of each; 989 is an H100's.")] = 989.0,
    mfu: Annotated[float, Option(help="With --model: the share of them that is assumed.")] = 0.4,
    as_json: options.AsJson = False,
) -> None:
    """Reach, FLOPs, memory, coverage and neighbours of a pattern for a length (batch of one).

    With --model: what training a whole model costs, the mesh it would take, and where it does not fit.
    """
    if model is not None:
        options.refuse(context, _NOT_OF_MODELS, "with --model")
        costs = {"devices": devices, "memory": memory, "tflops": tflops, "mfu": mfu}
        plan_model(model, options.pairs(set_ or []), **costs, as_json=as_json)  # type: ignore[arg-type]
        return
    options.refuse(context, ("set_", "devices", "memory", "tflops", "mfu"), "without --model")
    width = options.check_dtype(dtype).itemsize
    if ranks is None:
        options.refuse(context, ("balanced",), "without --ranks")
    if query is None:
        options.refuse(context, ("head",), "without --query")
    if suggest_for is not None:
        options.refuse(context, _NOT_SUGGESTED, "with --suggest")
        check_positive_int("suggest_for", suggest_for)
        rows = suggest(suggest_for, layers, heads, head_dim, offsets, causal)
        print(json.dumps(rows, indent=1)) if as_json else show_suggested(suggest_for, layers, causal, rows)
        return
    check_positive_int("length", length)
    pattern = options.make_pattern(segments, rates, heads, offsets)
    shifts = layer_shifts(options.shift(shift), pattern.segment_lengths, layers)
    found = {"reach": reach_of(pattern, layers, length, causal, shift)}
    found |= _measure(pattern, length, head_dim, causal, width)
    if query is not None:
        found["neighbours"] = _neighbours(pattern, length, query, head, causal)
    if ranks is not None:
        bounds = balanced_bounds(pattern, length, ranks, is_causal=causal) if balanced else equal_bounds(length, ranks)
        shares = forecast(pattern, bounds, head_dim, element_size=width, is_causal=causal)
        needs = "--bidirectional" if causal else "shards of equal length" if balanced else None
        needs = needs or closed_form_needs(pattern, length, ranks)
        units = None if needs else closed_form_units(pattern, length, ranks)
        closed = None if units is None else units * unit_bytes(1, head_dim, width)
        found["ring"] = {
            "shares": [share._asdict() for share in shares], "bytes_closed_form": closed, "closed_form_needs": needs,
        }  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _show_reach(found)
    if found["reach"] and (message := out_of_reach(pattern, shifts, length, is_causal=causal)):
        message = in_options(message, context.command)
        console.print(f"{message[0].upper()}{message[1:]}.", soft_wrap=True)
    _show(found)


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
    return {"length": length, "heads": heads, "head_dim": head_dim, "causal": causal, "branches": branches} | {
        "coverage": pattern.coverage(length),
        "keys_per_query": pairs / (length * heads),
        # As the op's own FLOP formulas: two products of D per pair forward, five backward.
        "flops_forward": 4 * head_dim * pairs,
        "flops_backward": 10 * head_dim * pairs,
        "flops_dense_forward": 4 * head_dim * dense,
        "bytes_q_k_v_out": 4 * tensor,
        "bytes_lse": 4 * length * heads,
        "bytes_dense_logits": length * length * heads * width,
    }


def _neighbours(pattern: DilatedPattern, length: int, query: int, head: int, causal: bool) -> dict[str, Any]:
    check_index("query", query, length)
    check_index("head", head, pattern.num_heads)
    member = pattern.membership(torch.tensor(query, device="cpu"))[:, head].tolist()
    ranges = iter(pattern.keys_of(query, head, length, is_causal=causal))  # of the branches it belongs to, in order
    keys = [next(ranges) if belongs else range(0) for belongs in member]
    rows = [
        {"branch": i, "count": len(k), "first": k[0] if k else None, "last": k[-1] if k else None, "step": k.step}
        for i, k in enumerate(keys)
    ]
    return {"query": query, "head": head, "branches": rows}


def _show_reach(found: dict[str, Any]) -> None:
    reach, lines = found["reach"], {}
    for which in ("best", "median", "worst"):
        lines[f"farthest input of the {which} position"] = f"{reach[which]:,} away" if reach else "not computed"
    lines["out of reach of the worst position"] = f"{reach['out_of_reach']:,}" if reach else "not computed"
    start = reach["keys_at_start"] if reach else None
    lines["fewest keys per head where a segment starts"] = "-" if start is None else f"{start:,.1f}"
    shift = f", shifted by {reach['segment_shift']}" if reach and reach["segment_shift"] != "0" else ""
    layers = f"{reach['layers']} layers" if reach else "layers: too many positions that all differ"
    print_table(f"reach at {found['length']:,} positions, {layers}{shift}", ("", ""), lines.items(), left=1)


def _show(found: dict[str, Any]) -> None:
    length, branches = found["length"], found["branches"]
    total = sum(b["pairs"] for b in branches)

    def share(pairs: int) -> str:
        return f"{pairs / total if total else 0.0:.1%}"

    print_table(
        f"branches at {length:,} positions, {found['heads']} heads, {'causal' if found['causal'] else 'bidirectional'}",
        ("branch", "segment", "rate", "segments", "pairs", "share"),
        (
            (f"{i}", f"{w:,}", f"{rate}", f"{-(-length // w):,}", human_count(pairs), share(pairs))
            for i, (w, rate, pairs) in enumerate(b.values() for b in branches)
        ),
    )
    dense = found["flops_dense_forward"] / found["flops_forward"] if found["flops_forward"] else float("inf")
    costs = {
        "FLOPs forward": human_count(found["flops_forward"]),
        "FLOPs backward": human_count(found["flops_backward"]),
        "dense attention, forward": f"{human_count(found['flops_dense_forward'])} ({dense:,.1f}x)",
        "q, k, v and out": human_bytes(found["bytes_q_k_v_out"]),
        "log-sum-exp": human_bytes(found["bytes_lse"]),
        "never formed: dense logits": human_bytes(found["bytes_dense_logits"]),
        "keys per query and head (mean)": f"{found['keys_per_query']:,.1f}",
        "(position, head) pairs in a branch (coverage)": f"{found['coverage']:.2%}",
    }
    print_table("cost of one layer's attention, batch of one", ("", ""), costs.items(), left=1)
    if ring := found.get("ring"):
        rows = []
        for rank, part in enumerate(ring["shares"]):
            sizes = (human_bytes(part[name]) for name in ("received", "sent", "dense"))
            rows.append((f"{rank}", f"{part['start']:,} - {part['stop']:,}", *sizes, share(part["pairs"])))
        columns = ("rank", "shard", "receives", "sends", "dense K and V", "share of work")
        print_table("ring attention, one layer's forward", columns, rows)
        closed = ring["bytes_closed_form"]
        said = f"needs {ring['closed_form_needs']}" if closed is None else f"{human_bytes(closed)} per rank"
        console.print(f"closed form: {said}")
    if near := found.get("neighbours"):
        rows = []
        for row in near["branches"]:
            ends = [f"{row[e]:,}" if row["count"] else "-" for e in ("first", "last", "step")]
            rows.append((f"{row['branch']}", f"{row['count']:,}", *ends))
        title = f"keys of query {near['query']:,}, head {near['head']}"
        print_table(title, ("branch", "keys", "first", "last", "step"), rows)
