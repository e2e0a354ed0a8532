"""`show`: pictures of a pattern, and a page to explore one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Context, Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console
from dilated_attention_pytorch.core.pattern import DilatedPattern

What = Literal["pattern", "neighbours", "receptive", "orders", "neighbourhood"]
_WHAT = (
    "pattern, neighbours (of --query), receptive (field of --query); of tokens in a --grid, orders or neighbourhood "
    "(of --query) along raster, snake, Morton and Hilbert curves."
)
_OUT = "File to write: .png, .svg or .pdf; with pattern also .html, a page on which to choose the query."
_GRID = "Tokens along each axis, h,w or d,h,w (orders and neighbourhood only)."
# Options that a picture has no use for. To give one is a mistake, not something to pass over.
UNUSED = {
    "pattern": ("query", "layers", "shift", "grid"),
    "neighbours": ("layers", "shift", "grid"),
    "receptive": ("head", "grid"),
    "orders": ("query", "head", "layers", "shift", "length", "causal", "segments", "rates", "heads", "offsets"),
    "neighbourhood": ("layers", "shift", "length", "causal"),
}


def show(
    context: Context,
    what: Annotated[str, Argument(help=_WHAT)] = "pattern",
    out: Annotated[Path | None, Option(help=_OUT)] = None,
    length: options.Length = 64,
    segments: options.Lengths = "16,32,64",
    rates: options.Rates = "1,2,4",
    heads: options.Heads = 4,
    offsets: options.OffsetRule = "modulo",
    causal: options.Causal = True,
    head: Annotated[list[int] | None, Option(help="Head to draw; repeat for more (pattern only).")] = None,
    query: Annotated[int | None, Option(help="Position that looks; the last by default.")] = None,
    layers: Annotated[int, Option(help="Layers of the LongNet (receptive only).")] = 4,
    shift: options.Shift = "0",
    grid: Annotated[str, Option(help=_GRID)] = "32,32",
) -> None:
    """Draw who attends to whom, or how far a LongNet sees through its layers."""
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.viz import neighbours_figure, pattern_figure, receptive_figure, save, save_page
    from dilated_attention_pytorch.viz.style import FORMATS, check_format

    check_choice("WHAT", what, What)
    options.refuse(context, UNUSED[what], f"with 'show {what}'")
    path = out if out is not None else Path(f"{what}.png")
    page = check_format(path, (*FORMATS, ".html") if what == "pattern" else FORMATS, "--out") == ".html"
    if head and len(head) > 1 and (what != "pattern" or page):
        where = f"an --out that ends in {path.suffix}" if page else f"'show {what}'"
        raise ValueError(f"expected one --head with {where}, got {head}")
    pattern = options.make_pattern(segments, rates, heads, offsets)
    first = head[0] if head else 0
    last = length - 1 if query is None else query
    if page:
        save_page(pattern, length, path, head=first, is_causal=causal)
        console.print(f"wrote {path}")
        return
    if what == "pattern":
        figure = pattern_figure(pattern, length, heads=head or [0], is_causal=causal)
    elif what == "neighbours":
        figure = neighbours_figure(pattern, length, query=last, head=first, is_causal=causal)
    elif what == "receptive":
        how: dict[str, Any] = {"is_causal": causal, "segment_shift": options.shift(shift)}
        figure = receptive_figure(pattern, length, query=last, num_layers=layers, **how)
        found = pattern.reach(layers, length, **how)
        console.print(
            f"through {layers} layers the best position reaches {found.best:,} away, the median {found.median:,}, the "
            f"worst {found.worst:,}, with {found.out_of_reach:,} positions out of its reach"
        )
    else:
        figure = _in_space(what, options.ints("--grid", grid), pattern, query, first if head else None)
    console.print(f"wrote {save(figure, path)}")


def _in_space(what: str, grid: tuple[int, ...], pattern: DilatedPattern, query: int | None, head: int | None) -> Any:
    """A grid's orders, or whom one of its tokens, by default the middle one, attends to in each."""
    from dilated_attention_pytorch.kernels.hilbert import CURVES, CurveOrder, curve_order, grid_coords
    from dilated_attention_pytorch.viz import neighbourhood_figure, orders_figure

    orders: dict[str, CurveOrder] = {name: curve_order(name, grid=grid) for name in CURVES}
    coords = grid_coords(grid)
    if what == "orders":
        return orders_figure(orders, coords)
    middle = int((coords - coords.double().mean(0)).square().sum(1).argmin())
    return neighbourhood_figure(pattern, orders, coords, query=middle if query is None else query, head=head)
