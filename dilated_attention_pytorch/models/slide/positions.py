"""Positions of tiles: sincos codes of their columns and rows, made when they are needed.

The official code keeps a table of a row for each of 1,000 x 1,000 places, 3 GB at 768 wide. Each row is two codes side
by side, one for each coordinate, so a table of 1,000 half rows (1.5 MB) holds the very same numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dilated_attention_pytorch.core.validation import INT_DTYPES


def sincos(positions: Tensor, width: int) -> Tensor:
    """`[sin, cos]` of positions `(...)` times `10000 ** (-i / (width / 2))`, fp64 `(..., width)`.
    The result is on the CPU: not every device has fp64."""
    omega = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.to("cpu", torch.float64)[..., None] * omega
    return torch.cat((angle.sin(), angle.cos()), -1)


@lru_cache(maxsize=8)
def sincos_table(size: int, width: int, device: torch.device) -> Tensor:
    """`sincos` of 0, 1, ... `size - 1`, fp32 `(size, width)`, kept for the device; do not write to it."""
    # Outside inference mode, so that what is kept serves training too.
    with torch.inference_mode(False):
        return sincos(torch.arange(size), width).to(device, torch.float32)


def position_rows(coords: Tensor, width: int, tile_size: int, slide_ngrids: int, real: Tensor | None = None) -> Tensor:
    """The rows of the official position table for tiles at coords `(..., 2)`, x and y in pixels: fp32 `(..., width)`.

    Tile (x, y) has the number `floor(x / tile_size) * slide_ngrids + floor(y / tile_size)` in a square grid, so a y
    beyond the grid runs over into the next x, there and here. Tiles that are not `real`, bool `(...)`, may be anywhere.
    """
    if coords.dtype not in (torch.float32, torch.float64, *INT_DTYPES):
        raise TypeError(
            f"expected coords of an int dtype, float32 or float64, got {coords.dtype}: a slide's pixels need 18 bits"
        )
    if coords.is_floating_point():
        finite = coords.isfinite() if real is None else coords.isfinite() | ~real[..., None]
        if not bool(finite.all()):
            raise ValueError("expected finite coords, got inf or nan")
        tile = torch.floor(coords / tile_size).long()
    else:
        tile = coords.long() // tile_size
    number = tile[..., 0] * slide_ngrids + tile[..., 1]
    if real is not None:
        number = number.masked_fill(~real, 0)
    if number.numel():
        least, most = (int(x) for x in torch.aminmax(number))
        if least < 0 or most >= slide_ngrids**2:
            raise ValueError(
                f"expected coords within a grid of {slide_ngrids} x {slide_ngrids} tiles of {tile_size} pixels, got "
                f"tile numbers from {least} to {most}; are coords (x, y) in pixels of the level that tile_size is in?"
            )
    table = sincos_table(slide_ngrids, width // 2, coords.device)
    return torch.cat((table[number % slide_ngrids], table[number // slide_ngrids]), -1)
