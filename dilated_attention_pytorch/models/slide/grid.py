"""From a file's coordinates to the encoder's grid: how large a tile is in them, each tile's place, what looks wrong.

Only x / t counts for the encoder, with t the side of a tile in the unit of x: `1 + 1000 * floor(x / t) + floor(y / t)`.
Every producer writes t in a way of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from dilated_attention_pytorch.core.messages import quoted

Grid = Literal["tile", "stride"]


class Spacing(NamedTuple):
    """How tiles stand in the unit of a file's coordinates.

    Attributes:
        size: side of a tile.
        stride: from a tile to its neighbour; less than `size` where tiles overlap.
        words: where these come from.
        is_rounded: whether places are rounded: micrometres are multiples of a size that floats do not hold.
        extent: width and height of the slide, where the file says.
    """

    size: float
    stride: float
    words: str
    is_rounded: bool = False
    extent: tuple[float, float] | None = None


def spacing_of(attributes: Mapping[str, Any]) -> Spacing | None:
    """The spacing that a file's attributes tell, of TRIDENT, CLAM, STAMP or slide2vec; None where they tell none.

    Raises:
        ValueError: a size that is no number above 0.
    """
    # TRIDENT stores None as a text.
    known = {name: plain(value) for name, value in attributes.items()}
    known = {name: value for name, value in known.items() if value not in (None, "None", "")}

    def number(name: str) -> float:
        value = known[name][0] if isinstance(known[name], list) else known[name]
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = -1.0
        if not 0 < found < 1e9 and not (name == "overlap" and found == 0):
            raise ValueError(f"expected attrs.{name} to be above 0, got {quoted(value)}")
        return found

    extent = None
    if {"level0_width", "level0_height"} <= set(known):
        extent = (number("level0_width"), number("level0_height"))
    if "patch_size_level0" in known or {"patch_size", "level0_magnification", "target_magnification"} <= set(known):
        return _trident(known, number, extent)
    if {"patch_size", "downsample"} <= set(known):
        factor = number("downsample") * (number("custom_downsample") if "custom_downsample" in known else 1.0)
        size = float(round(number("patch_size") * factor))
        return Spacing(size, size, f"CLAM: {known['patch_size']} pixels, downsampled {factor:g} times")
    for name in ("tile_size_um", "tile_size"):
        if name in known and (name == "tile_size_um" or known.get("unit") == "um"):
            size = number(name)
            return Spacing(size, size, "STAMP: micrometres", is_rounded=True)
    if "tile_size_lv0" in known:
        size = number("tile_size_lv0")
        return Spacing(size, size, "slide2vec: pixels of level 0")
    return None


def _trident(known: Mapping[str, Any], number: Any, extent: tuple[float, float] | None) -> Spacing:
    magnified = {"level0_magnification", "target_magnification"} <= set(known)
    ratio = number("level0_magnification") / number("target_magnification") if magnified else 0.0
    if "patch_size_level0" in known:
        size = number("patch_size_level0")
        ratio = ratio or (size / number("patch_size") if "patch_size" in known else 1.0)
    else:
        size = float(number("patch_size") * number("level0_magnification") // number("target_magnification"))
    overlap = number("overlap") if "overlap" in known else 0.0
    # As TRIDENT counts it: at 15x the stride is a pixel more than the size.
    step = round(number("patch_size") * ratio) if "patch_size" in known else size
    words = "TRIDENT: pixels of level 0"
    if magnified and "patch_size" in known:
        words = (
            f"TRIDENT: {known['patch_size']} pixels at {number('target_magnification'):g}x, level 0 at "
            f"{number('level0_magnification'):g}x"
        )
    return Spacing(size, step - round(overlap * ratio), words, extent=extent)


def plain(value: Any) -> Any:
    """An attribute as Python has it: arrays as lists, bytes as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return list(value) if isinstance(value, tuple) else value


def places(corners: np.ndarray, spacing: Spacing, grid: Grid) -> np.ndarray:
    """Column and row of each tile, int64 `(L, 2)`, counted in tiles or, with `grid="stride"`, in strides."""
    scaled = corners.astype(np.float64) / (spacing.size if grid == "tile" else spacing.stride)
    return (np.rint(scaled) if spacing.is_rounded else np.floor(scaled)).astype(np.int64)


def check_inside(at: np.ndarray, slide_ngrids: int) -> None:
    """Raises a ValueError for a tile outside the encoder's grid."""
    outside = ((at < 0) | (at >= slide_ngrids)).any(1)
    if outside.any():
        column, row = at[outside][0].tolist()
        raise ValueError(
            f"expected places within {slide_ngrids} x {slide_ngrids}, got {int(outside.sum())} tiles outside, such as "
            f"column {column}, row {row}: is a tile larger in the unit of the coordinates?"
        )


def doubts(corners: np.ndarray, at: np.ndarray, spacing: Spacing, grid: Grid) -> list[str]:
    """What looks wrong, a line each: tiles that share places or lie outside, a stride that fits no tile size."""
    found = []
    copies = len(corners) - len(np.unique(corners, axis=0))
    if copies:
        found.append(f"{copies} tiles stand where another one does, to the pixel: duplicates?")
    taken = len(np.unique(at, axis=0))
    if taken < len(at) - copies:
        cure = "; the grid 'stride' gives each a place" if spacing.stride < spacing.size and grid == "tile" else ""
        found.append(f"{len(at)} tiles share {taken} places{cure}")
    if spacing.extent is not None and (over := int((corners >= np.array(spacing.extent)).any(1).sum())) > 0:
        width, height = spacing.extent
        found.append(f"{over} tiles lie outside the slide of {width:g} x {height:g}")
    distance = neighbour_distance(corners)
    # A unit is rounding.
    if distance is not None and abs(distance - spacing.stride) > 1:
        found.append(f"most neighbours stand {distance:g} apart, where {spacing.stride:g} was expected")
    return found


def neighbour_distance(corners: np.ndarray) -> float | None:
    """The commonest distance between neighbours in a row or column of tiles; None where no two share one."""
    steps = []
    for axis in (0, 1):
        sorted_ = corners[np.lexsort((corners[:, axis], corners[:, 1 - axis]))].astype(np.float64)
        apart = np.diff(sorted_, axis=0)
        steps.append(apart[(apart[:, 1 - axis] == 0) & (apart[:, axis] > 0), axis])
    values, counts = np.unique(np.concatenate(steps).round(1), return_counts=True)
    return float(values[counts.argmax()]) if len(values) else None
