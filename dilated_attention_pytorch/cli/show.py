"""`show`: pictures of a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console

What = Literal["pattern", "neighbours", "receptive", "orders", "neighbourhood"]
IN_SPACE = ("orders", "neighbourhood")  # of tokens in a grid
UNUSED = {
    "orders": ("length", "causal", "segments", "rates", "heads", "offsets"),
    "neighbourhood": ("length", "causal"),
}


def show(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="pattern, neighbours (of --query), receptive (field of --query); of tokens in a --grid, orders or "
            "neighbourhood (of --query) along raster, snake, Morton and Hilbert curves."
        ),
    ] = "pattern",
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
    grid: Annotated[
        str | None, typer.Option(help="Tokens along each axis, h,w or d,h,w (orders and neighbourhood only); 32,32.")
    ] = None,
) -> None:
    """Draw who attends to whom, or how far a LongNet sees through its layers."""
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.viz import neighbours_figure, pattern_figure, receptive_figure, save

    check_choice("WHAT", what, What)
    # An option that the picture has no use for is a mistake, not something to pass over.
    for name, value, useful in (
        ("--query", query, what not in ("pattern", "orders")),
        ("--head", head, what not in ("receptive", "orders")),
        ("--layers", layers, what == "receptive"),
        ("--grid", grid, what in IN_SPACE),
    ):
        if value is not None and not useful:
            raise ValueError(f"expected no {name} with 'show {what}', got {value}")
    for name in UNUSED.get(what, ()):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"expected no --{name} with 'show {what}', which draws all tokens of a --grid")
    if what in IN_SPACE:
        path = out if out is not None else Path(f"{what}.png")
        sizes = options.ints("--grid", grid or "32,32")
        console.print(f"wrote {_in_space(path, what, sizes, segments, rates, heads, offsets, query, head)}")
        return
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


def _in_space(
    path: Path, what: str, grid: tuple[int, ...], segments: str, rates: str, heads: int, offsets: str,
    query: int | None, head: list[int] | None,
) -> Path:  # fmt: skip
    """Draws a grid's orders, or whom one of its tokens attends to in each."""
    from dilated_attention_pytorch.kernels.hilbert import CURVES, CurveOrder, curve_order, grid_coords
    from dilated_attention_pytorch.viz import neighbourhood_figure, orders_figure, save

    orders: dict[str, CurveOrder] = {name: curve_order(name, grid=grid) for name in CURVES}
    coords = grid_coords(grid)
    if what == "orders":
        return save(orders_figure(orders, coords), path)
    if head is not None and len(head) > 1:
        raise ValueError(f"expected one --head, or none for all, with 'show neighbourhood', got {head}")
    pattern = options.make_pattern(segments, rates, heads, offsets)
    middle = int((coords - coords.double().mean(0)).square().sum(1).argmin())
    token = middle if query is None else query
    figure = neighbourhood_figure(pattern, orders, coords, query=token, head=None if head is None else head[0])
    return save(figure, path)
