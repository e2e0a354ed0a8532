"""One number per tile of a slide, drawn where the tile lies."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.viz.style import style

_MAX_PIXELS = 64_000_000


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
    if columns * rows > _MAX_PIXELS:
        raise ValueError(f"expected tiles within a grid of {_MAX_PIXELS:,} places, got {columns:,} x {rows:,}")
    sums, counts = np.zeros((rows, columns)), np.zeros((rows, columns))
    np.add.at(sums, (row, column), value)
    np.add.at(counts, (row, column), 1.0)
    grid = np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)  # NaN is drawn as nothing
    with style():
        height = min(9.0, max(2.5, 5.5 * rows / columns))
        figure = Figure(figsize=(7.0, height), layout="constrained")
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
