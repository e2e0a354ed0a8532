"""`plan --suggest`: a few patterns for a length, side by side."""

from __future__ import annotations

import string
from typing import Any

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, human_count, print_table
from dilated_attention_pytorch.core.pattern import DilatedPattern

_FASTEST_RATE = 64  # of the kernels: larger rates take another, slower one


def suggest(length: int, num_layers: int, heads: int, head_dim: int, rule: str, causal: bool) -> list[dict[str, Any]]:
    """Patterns for N, with what each costs and reaches."""
    rows: dict[tuple[DilatedPattern, str], dict[str, Any]] = {}  # short lengths give some of them twice

    def add(name: str, pattern: DilatedPattern, shift: str = "0") -> None:
        pairs, reach = pattern.pairs(length, is_causal=causal), reach_of(pattern, num_layers, length, causal, shift)
        rows.setdefault((pattern, shift), {
            "name": name, "segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates,
            "segment_shift": shift, "flops_forward": 4 * head_dim * pairs, "keys_per_query": pairs / (length * heads),
            "reach": reach, "coverage": pattern.coverage(length),
        })  # fmt: skip

    shared: dict[str, Any] = {"num_heads": heads, "offsets": rule}
    add("geometric", DilatedPattern.geometric(length, **shared))
    add("geometric, short", DilatedPattern.geometric(length, 1024, 8, **shared))
    add("geometric, rates to 64", DilatedPattern.geometric(length, max_rate=_FASTEST_RATE, **shared))
    paper = options.make_pattern(options.PAPER_LENGTHS, options.PAPER_RATES, heads, rule)
    add("the paper's, shifted", paper, "alternate")
    add("the paper's", paper)
    return list(rows.values())


def reach_of(pattern: DilatedPattern, num_layers: int, length: int, causal: bool, shift: str) -> dict[str, Any] | None:
    """`DilatedPattern.reach` by name; None where the sequence is too long to be gone through."""
    try:
        found = pattern.reach(num_layers, length, is_causal=causal, segment_shift=options.shift(shift))
    except ValueError as error:
        if "every position" not in str(error):
            raise
        return None
    return {"layers": num_layers, "segment_shift": shift, **found._asdict()}


def show_suggested(length: int, num_layers: int, causal: bool, rows: list[dict[str, Any]]) -> None:
    """The suggestions as a table, and what each letter stands for below it."""
    columns = ("", "FLOPs", "keys", "coverage", "best", "median", "unreached", "at start")
    table = []
    for letter, row in zip(string.ascii_uppercase, rows, strict=False):
        reach = row["reach"] or {}
        far = [f"{reach[name]:,}" if reach else "-" for name in ("best", "median", "out_of_reach")]
        start = reach.get("keys_at_start")
        table.append((
            letter, human_count(row["flops_forward"]), f"{row['keys_per_query']:,.0f}", f"{row['coverage']:.0%}", *far,
            "-" if start is None else f"{start:,.1f}",
        ))  # fmt: skip
    kind = "causal" if causal else "bidirectional"
    print_table(f"patterns for {length:,} positions, {num_layers} layers, {kind}", columns, table, left=1)
    for letter, row in zip(string.ascii_uppercase, rows, strict=False):
        lengths, rates = (",".join(map(str, row[name])) for name in ("segment_lengths", "dilation_rates"))
        shift = "" if row["segment_shift"] == "0" else f" --shift {row['segment_shift']}"
        console.print(f"{letter}: {row['name']}: -w {lengths} -r {rates}{shift}", soft_wrap=True)
