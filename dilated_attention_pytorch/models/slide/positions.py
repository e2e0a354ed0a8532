"""Positions of tiles: sincos codes of their columns and rows, made when they are needed.

The official code keeps a table of a row for each of 1,000 x 1,000 places, 3 GB at 768 wide. Each row is two codes side
by side, one for each coordinate, so a table of 1,000 half rows (1.5 MB) holds the very same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch._deprecated import warn_user
from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.tables import kept
from dilated_attention_pytorch.core.validation import INT_DTYPES


def sincos(positions: Tensor, width: int) -> Tensor:
    """`[sin, cos]` of positions `(...)` times `10000 ** (-i / (width / 2))`, fp64 `(..., width)`.
    Positions on MPS, which has no fp64, give a result on the CPU."""
    device = torch.device("cpu") if positions.is_mps else positions.device
    omega = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2))
    angle = positions.to(device, torch.float64)[..., None] * omega
    return torch.cat((angle.sin(), angle.cos()), -1)


@kept(8)
def sincos_table(size: int, width: int, device: torch.device) -> Tensor:
    """`sincos` of 0, 1, ... `size - 1`, fp32 `(size, width)`, kept for the device; do not write to it."""
    return sincos(torch.arange(size, device="cpu"), width).to(device, torch.float32)


def position_rows(coords: Tensor, width: int, tile_size: int, slide_ngrids: int, real: Tensor | None = None) -> Tensor:
    """The rows of the official position table for tiles at coords `(..., L, 2)`, x and y in pixels: fp32
    `(..., L, width)`. Tiles that are not `real`, bool `(..., L)`, may be anywhere.

    Tile (x, y) has the number `floor(x / tile_size) * slide_ngrids + floor(y / tile_size)` in a square grid. The
    official code has no border between columns: a y beyond the grid, or below 0, is a place in another column there,
    and an error here.
    """
    if coords.dtype not in (torch.float32, torch.float64, *INT_DTYPES):
        raise TypeError(
            f"expected coords of an int dtype, float32 or float64, got {coords.dtype}: a slide's pixels need 18 bits"
        )
    if torch.compiler.is_compiling():
        return _traced_rows(coords, width, tile_size, slide_ngrids, real)
    if real is not None:
        coords = coords.masked_fill(~real[..., None], 0)
    if coords.is_floating_point():
        if not bool(coords.isfinite().all()):
            raise ValueError("expected finite coords, got inf or nan")
        tile = torch.floor(coords / tile_size).long()
    else:
        tile = coords.long() // tile_size
    if tile.numel():
        _check_places(coords, tile, tile_size, slide_ngrids, real)
    table = sincos_table(slide_ngrids, width // 2, coords.device)
    return torch.cat((table[tile[..., 1]], table[tile[..., 0]]), -1)


def _check_places(coords: Tensor, tile: Tensor, tile_size: int, slide_ngrids: int, real: Tensor | None) -> None:
    """Raises a ValueError for a tile outside the grid; warns where more than two tiles, on average, share a place."""
    least, most = (int(x) for x in torch.aminmax(tile))
    if least < 0 or most >= slide_ngrids:
        outside = ((tile < 0) | (tile >= slide_ngrids)).any(-1)
        wrong = tuple(coords[outside][0].tolist())
        raise ValueError(
            f"expected coords (x, y) in [0, {slide_ngrids * tile_size}) pixels, a grid of {slide_ngrids} x "
            f"{slide_ngrids} tiles of {tile_size}, got {wrong} and {int(outside.sum()) - 1} more outside; are they in "
            "pixels of the level that tile_size is in?"
        )
    number = (tile[..., 0] * slide_ngrids + tile[..., 1]).view(-1, tile.shape[-2])
    number = number + slide_ngrids**2 * torch.arange(len(number), device=number.device)[:, None]  # by slide
    number = number.flatten() if real is None else number[real.view_as(number)]
    places = number.unique().numel()
    if 2 * places < number.numel():
        warn_user(
            f"expected about one tile on each place of the grid, got {number.numel()} tiles on {places} places of "
            f"{tile_size} x {tile_size} pixels: coords are pixels, neither column and row numbers nor pixels of "
            "another level (tile_size, or level0_tile_size, is their distance)",
            UserWarning,
        )


def _traced_rows(coords: Tensor, width: int, tile_size: int, slide_ngrids: int, real: Tensor | None) -> Tensor:
    """`position_rows` for a graph: without the table, and with the check where the graph runs."""
    if real is not None:
        coords = coords.masked_fill(~real[..., None], 0)
    tile = coords.div(tile_size, rounding_mode="floor").long()  # of inf and NaN too it is outside
    within = ((tile >= 0) & (tile < slide_ngrids)).all()
    torch_private.check_in_graph(within, f"expected coords within {slide_ngrids} x {slide_ngrids} tiles of {tile_size}")
    return sincos(tile.flip(-1), width // 2).flatten(-2).to(coords.device, torch.float32)
