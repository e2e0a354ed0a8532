"""`show`: pictures of a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console

What = Literal["pattern", "neighbours", "receptive"]


def show(
    what: Annotated[str, typer.Argument(help="pattern, neighbours (of --query) or receptive (field of --query).")] = (
        "pattern"
    ),
    out: Annotated[Path | None, typer.Option(help="File to write; by its ending .png, .svg or .pdf.")] = None,
    length: options.Length = 64,
    segments: options.Lengths = "16,32,64",
    rates: options.Rates = "1,2,4",
    heads: options.Heads = 4,
    offsets: options.OffsetRule = "modulo",
    causal: options.Causal = True,
    head: Annotated[list[int] | None, typer.Option(help="Head to draw; repeat for more (pattern only).")] = None,
    query: Annotated[int | None, typer.Option(help="Position that looks; the last by default.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the LongNet (receptive only); 4 by default.")] = None,
) -> None:
    """Draw who attends to whom, or how far a LongNet sees through its layers."""
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.viz import neighbours_figure, pattern_figure, receptive_figure, save

    check_choice("WHAT", what, What)
    # An option that the picture has no use for is a mistake, not something to pass over.
    for name, value, useful in (
        ("--query", query, what != "pattern"),
        ("--head", head, what != "receptive"),
        ("--layers", layers, what == "receptive"),
    ):
        if value is not None and not useful:
            raise ValueError(f"expected no {name} with 'show {what}', got {value}")
    pattern = options.make_pattern(segments, rates, heads, offsets)
    chosen = list(head) if head else [0]
    last = length - 1 if query is None else query
    if what == "pattern":
        figure = pattern_figure(pattern, length, heads=chosen, is_causal=causal)
    elif what == "neighbours":
        if len(chosen) > 1:
            raise ValueError(f"expected one --head with 'show neighbours', got {chosen}")
        figure = neighbours_figure(pattern, length, query=last, head=chosen[0], is_causal=causal)
    else:
        figure = receptive_figure(
            pattern, length, query=last, num_layers=4 if layers is None else layers, is_causal=causal
        )
    path = save(figure, out if out is not None else Path(f"{what}.png"))
    console.print(f"wrote {path}")
