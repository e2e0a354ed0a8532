"""Tokens in space: the walk of each order, the keys of one token, and values over tokens and over a slide's tiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.kernels.hilbert import CurveOrder
from dilated_attention_pytorch.viz.pattern import keys_by_branch
from dilated_attention_pytorch.viz.style import FAINT, INK, branch_colors, branch_label, style

_MOST_STEPS = 20_000  # of a walk drawn as a line
_MOST_TILES = 64_000_000  # of a slide's grid


def orders_figure(
    orders: Mapping[str, CurveOrder], coords: Tensor, *, plane: int | None = None, shown: Tensor | None = None
) -> Figure:
    """Each order's walk over the tokens, coloured from its start to its end.

    Args:
        orders: by name.
        coords: int `(N, 2)` or `(N, 3)`, the cells of the tokens.
        plane: of tokens in 3-D, the first coordinate to show; the middle by default. A step of the walk is drawn if
            both its ends are drawn.
        shown: bool `(N,)`, the tokens to draw, such as one fragment of a slide; all by default.

    Raises:
        ValueError: no orders, an order of another length, coords or shown of another shape, nothing to draw.
    """
    _check_orders(orders, coords)
    drawn, cells = _drawn(coords, plane, shown)
    with style():
        figure, axes = _axes(orders, cells)
        for ax, found in zip(axes, orders.values(), strict=True):
            place = found.inverse[drawn]
            _image(ax, cells, place.double().numpy(), cmap="viridis", alpha=0.45)
            walk = place.argsort()
            steps = torch.stack((cells[walk[:-1]], cells[walk[1:]]), 1).flip(-1).double()
            follows = place[walk].diff() == 1
            if len(walk) <= _MOST_STEPS:
                ax.add_collection(LineCollection(list(steps[follows].numpy()), colors=INK, linewidths=0.5))
    return figure


def neighbourhood_figure(
    pattern: DilatedPattern,
    orders: Mapping[str, CurveOrder],
    coords: Tensor,
    *,
    query: int,
    head: int | None = None,
    shown: Tensor | None = None,
) -> Figure:
    """The keys of one token in each order, coloured by the first branch that shows them.

    Args:
        pattern: the branches.
        orders, coords: as in `orders_figure`; in 3-D the plane through the token is drawn.
        query: the token, by its original index.
        head: key/value head; all of them by default.
        shown: as in `orders_figure`; keys that are not drawn count in the title all the same.

    Raises:
        ValueError: as in `orders_figure`; a token or head out of range.
    """
    _check_orders(orders, coords)
    check.check_index("query", query, len(coords))
    if head is not None:
        check.check_index("head", head, pattern.num_heads)
    drawn, cells = _drawn(coords, None if coords.shape[1] == 2 else int(coords[query, 0]), shown)
    with style():
        figure, axes = _axes(orders, cells, legend=True)
        shades = branch_colors(len(pattern.branches))
        for ax, (name, found) in zip(axes, orders.items(), strict=True):
            branch, count = first_branch(pattern, found, query, head)
            colors = ListedColormap([FAINT, *shades])
            _image(ax, cells, (branch[drawn] + 1).double().numpy(), cmap=colors, vmin=-0.5, vmax=colors.N - 0.5)
            row, column = coords[query, -2:].tolist()
            ax.plot(column, row, marker="o", markersize=4, markerfacecolor="white", markeredgecolor=INK)
            ax.set_title(f"{name}: {count:,} keys")
        handles = [Patch(facecolor=c, label=branch_label(b)) for c, b in zip(shades, pattern.branches, strict=True)]
        figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    return figure


def first_branch(pattern: DilatedPattern, order: CurveOrder, query: int, head: int | None = None) -> tuple[Tensor, int]:
    """The first branch that shows each token to a query, -1 for none, and the number of tokens shown.

    The tensor, int64 `(N,)`, and `query` go by the original order; without `head` any head counts.
    """
    place, size = int(order.inverse[query]), len(order.order)
    found = torch.full((size,), len(pattern.branches), device="cpu")
    for h in range(pattern.num_heads) if head is None else [head]:
        for i, keys in keys_by_branch(pattern, place, h, size):
            tokens = order.order[keys.start : keys.stop : keys.step]
            found[tokens] = found[tokens].clamp(max=i)
    found[found == len(pattern.branches)] = -1
    return found, int((found >= 0).sum())


def heat_figure(
    values: Mapping[str, Tensor],
    coords: Tensor,
    *,
    labels: Mapping[str, str] | None = None,
    mark: int | None = None,
    plane: int | None = None,
    shown: Tensor | None = None,
) -> Figure:
    """Values over tokens, three pictures a row, with colour bars; tokens without a value (nan) stay grey.

    A scale is logarithmic, over at most four decades, if its values are positive and span more than two.

    Args:
        values: float `(N,)` in original order, by title; or `(N, 3)` colours in [0, 1].
        coords: int `(N, 2)` or `(N, 3)`.
        labels: of the colour bars, by title; maps of one label share one bar. The title by default.
        mark: a token to circle, by original index.
        plane: as in `orders_figure`; the marked token's by default.
        shown: as in `orders_figure`.

    Raises:
        ValueError: nothing to draw, values or coords of another shape, a token out of range.
    """
    if not values:
        raise ValueError("expected values to hold at least one map, got none")
    for name, x in values.items():
        if x.shape not in ((len(coords),), (len(coords), 3)):
            raise ValueError(
                f"expected values[{check.quoted(name)}] of shape ({len(coords)},) or (..., 3), got {tuple(x.shape)}"
            )
    if mark is not None:
        check.check_index("mark", mark, len(coords))
    if plane is None and mark is not None and coords.shape[1] == 3:
        plane = int(coords[mark, 0])
    drawn, cells = _drawn(coords, plane, shown)
    groups: dict[str, list[str]] = {}  # the maps of one label
    for name in (name for name, x in values.items() if x.dim() == 1):
        groups.setdefault((labels or {}).get(name, name), []).append(name)
    with style():
        figure, axes = _axes(values, cells, columns=3, bars=True)
        at = dict(zip(values, axes, strict=True))
        for name, x in values.items():
            _image(at[name], cells, torch.full((len(drawn),), 0.5, device="cpu").numpy(), cmap="Greys", vmin=0, vmax=4)
            if x.dim() == 2:
                _image(at[name], cells, x[drawn].detach().double().numpy())
        for label, names in groups.items():
            maps = [np.asarray(values[name][drawn].detach().double().numpy()) for name in names]
            scale = _scale(np.concatenate(maps))
            images = [_image(at[name], cells, x, norm=scale, cmap="magma") for name, x in zip(names, maps, strict=True)]
            bar = figure.colorbar(images[-1], ax=[at[name] for name in names], pad=0.02, label=label)
            bar.ax.yaxis.set_major_formatter("{x:g}")
        if mark is not None:
            row, column = coords[mark, -2:].tolist()
            for ax in axes:  # a ring around the neighbours, not over them
                for color, width in (("white", 2.6), ("#0072b2", 1.2)):
                    ax.plot(column, row, marker="o", markersize=17, mfc="none", markeredgecolor=color, mew=width)
    return figure


def _scale(values: NDArray[np.float64]) -> Normalize:
    """From colours to the values of all maps of one label."""
    found = values[np.isfinite(values)]
    low, high = (found.min(), found.max()) if len(found) else (0.0, 1.0)
    if 0 < 100 * low < high:
        return LogNorm(max(low, high / 1e4), high, clip=True)
    return Normalize(low, high)


def slide_figure(
    coords: Tensor,
    values: Tensor,
    *,
    tile_size: int = 256,
    title: str = "",
    label: str = "",
    marks: Tensor | None = None,
) -> Figure:
    """A heat map over a slide: each tile a square, white without a tile.

    Args:
        coords: `(L, 2)`, x and y of each tile in pixels.
        values: `(L,)`, such as a row of `AttentionMap.tiles`. Tiles at one place show their mean.
        tile_size: pixels between neighbouring tiles.
        title: above the picture.
        label: of the colour bar.
        marks: indices of tiles to ring, such as the query.

    Raises:
        ValueError: shapes that do not fit, no tiles, a value that is not finite, tiles too far apart.

    Example:
        >>> from dilated_attention_pytorch.viz import save, slide_figure
        >>> coords = 256 * torch.cartesian_prod(torch.arange(4), torch.arange(3))
        >>> figure = slide_figure(coords, torch.rand(12), label="attention")
    """
    check.check_positive_int("tile_size", tile_size)
    if coords.dim() != 2 or coords.shape[1] != 2 or coords.shape[0] == 0 or values.shape != coords.shape[:1]:
        raise ValueError(
            f"expected coords (L, 2) and values (L,) of at least one tile, got {tuple(coords.shape)} and "
            f"{tuple(values.shape)}"
        )
    value = np.asarray(values.detach().cpu().double().numpy())
    if not np.isfinite(value).all():
        raise ValueError(f"expected finite values, got {int((~np.isfinite(value)).sum())} that are not")
    place = np.floor(coords.detach().cpu().double().numpy() / tile_size).astype(np.int64)
    corner = place.min(0)
    column, row = (place - corner).T
    columns, rows = int(column.max()) + 1, int(row.max()) + 1
    if columns * rows > _MOST_TILES:
        raise ValueError(f"expected tiles within a grid of {_MOST_TILES:,} places, got {columns:,} x {rows:,}")
    sums, counts = np.zeros((2, rows, columns))
    np.add.at(sums, (row, column), value)
    np.add.at(counts, (row, column), 1.0)
    grid = np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)  # NaN is drawn as nothing
    with style():
        figure = Figure(figsize=(7.0, min(9.0, max(2.5, 5.5 * rows / columns))), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(grid, cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=ax, label=label, shrink=0.8)
        if marks is not None:
            at = np.atleast_1d(np.asarray(marks.detach().cpu().numpy()))
            ax.scatter(column[at], row[at], s=40, facecolors="none", edgecolors="#d55e00", linewidths=1.2)
        left, top = (int(c) * tile_size for c in corner)
        ax.set(xlabel=f"tiles right of x = {left:,}", ylabel=f"tiles below y = {top:,}")
        ax.set_title(title, loc="left")
    return figure


def _check_orders(orders: Mapping[str, CurveOrder], coords: Tensor) -> None:
    if not orders:
        raise ValueError("expected orders to hold at least one, got none")
    for name, found in orders.items():
        if len(found.order) != len(coords):
            raise ValueError(f"expected orders[{check.quoted(name)}] of {len(coords)} tokens, got {len(found.order)}")


def _drawn(coords: Tensor, plane: int | None, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """The indices of the tokens to draw, and their rows and columns."""
    if coords.dim() != 2 or coords.shape[1] not in (2, 3) or coords.is_floating_point() or len(coords) == 0:
        raise ValueError(
            f"expected coords of integers, shape (N, 2) or (N, 3), N >= 1, got {coords.dtype} {tuple(coords.shape)}"
        )
    if shown is None:
        shown = torch.ones(len(coords), dtype=torch.bool, device="cpu")
    elif shown.dtype != torch.bool or shown.shape != coords.shape[:1]:
        raise ValueError(f"expected shown of bools, shape ({len(coords)},), got {shown.dtype} {tuple(shown.shape)}")
    if coords.shape[1] == 3:
        plane = int(coords[:, 0].double().median()) if plane is None else plane
        if not bool((coords[:, 0] == plane).any()):
            raise ValueError(f"expected a plane that holds tokens, got {plane}")
        shown = shown & (coords[:, 0] == plane)
    drawn = shown.nonzero().flatten()
    if len(drawn) == 0:
        raise ValueError("expected shown to hold tokens of the plane, got none")
    return drawn, coords[drawn, -2:]


def _axes(
    names: Collection[str], cells: Tensor, *, legend: bool = False, columns: int = 4, bars: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one picture per name, in rows."""
    columns = min(columns, len(names))
    rows = ceil_div(len(names), columns)
    height, width = (cells.amax(0) - cells.amin(0) + 1).tolist()
    # Pictures 2.5 inches wide, with room for titles; long strips are narrower.
    tall = min(6.0, 2.5 * height / width)
    wide = tall * width / height + 0.15 + 0.35 * bars
    figure = Figure(figsize=(wide * columns, (tall + 0.3) * rows + 0.15 + 0.35 * legend), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        ax.set(xticks=[], yticks=[], title=name)
    return figure, axes[: len(names)]


def _image(ax: Axes, cells: Tensor, values: NDArray[Any], **how: Any) -> AxesImage:
    low, high = cells.amin(0), cells.amax(0)
    rows, columns = (high - low + 1).tolist()
    picture = np.full((rows, columns, *values.shape[1:]), np.nan)
    at = (cells - low).numpy()
    picture[at[:, 0], at[:, 1]] = values
    extent = (int(low[1]) - 0.5, int(high[1]) + 0.5, int(high[0]) + 0.5, int(low[0]) - 0.5)
    if picture.ndim == 3:  # colours have no nan; missing tokens are white
        picture, how = np.nan_to_num(picture, nan=1.0), {}
    return ax.imshow(picture, interpolation="nearest", extent=extent, **how)
