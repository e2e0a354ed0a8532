"""A value on each tile of a slide: as a picture, as objects for QuPath, and as a page to pan and zoom."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from dilated_attention_pytorch.core.files import replace_text
from dilated_attention_pytorch.viz.style import INK, check_format, save, style

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_SHADES = 256
_TEMPLATE = Path(__file__).with_name("slide_map.html")


@dataclass(frozen=True, kw_only=True)
class TileMap:
    """A value on each tile.

    Args:
        corners: `(L, 2)`, x and y of each tile in pixels of level 0.
        size: side of a tile in them.
        values: `(L,)`; NaN for a tile without a value, which is drawn empty and not exported.
        name: of the slide.
        label: what the values are.
        is_ratio: whether 1 is the middle of the colours, on a logarithmic scale.
        query: number of a tile to ring.
        thumbnail: a `.png` or `.jpg` of the whole slide.
        slide_width: in pixels of level 0, which says how the thumbnail lies; needed with one.

    Raises:
        ValueError: no tile has a value, shapes that do not fit, a thumbnail that is not there, without slide_width or
            with another ending.
    """

    corners: NDArray[Any]
    size: float
    values: NDArray[Any]
    name: str
    label: str
    is_ratio: bool = False
    query: int | None = None
    thumbnail: Path | None = None
    slide_width: float | None = None

    def __post_init__(self) -> None:
        if self.corners.shape != (*self.values.shape, 2) or not np.isfinite(self.values).any():
            raise ValueError(
                f"expected corners (L, 2) and values (L,), some of them finite, got {self.corners.shape} and "
                f"{self.values.shape}"
            )
        if self.thumbnail is not None:
            check_format(self.thumbnail, tuple(IMAGES), "thumbnail")
            if not self.thumbnail.is_file():
                raise ValueError(f"expected a thumbnail that is there, got {self.thumbnail}")
            if self.slide_width is None:
                raise ValueError("expected slide_width beside a thumbnail: the slide's width in pixels of level 0")

    @property
    def scale(self) -> Normalize:
        """From values to [0, 1]; the hundredth part at either end is not told apart."""
        found = self.values[np.isfinite(self.values)].astype(np.float64)
        if self.is_ratio:
            most = np.percentile(np.abs(np.log(found.clip(1e-12))), 99)
            factor = float(np.exp(max(most, 1e-3)))
            return LogNorm(1 / factor, factor, clip=True)
        low, high = np.percentile(found, (1, 99)).tolist()
        return Normalize(low, high if high > low else low + 1e-12, clip=True)

    @property
    def shades(self) -> NDArray[np.int64]:
        """Index of each tile's colour, -1 without a value."""
        there = np.isfinite(self.values)
        place = np.asarray(self.scale(np.where(there, self.values, 1.0)), dtype=np.float64)
        return np.where(there, (place * (_SHADES - 1)).round(), -1).astype(np.int64)

    @property
    def colors(self) -> NDArray[np.float64]:
        """The colours, from low to high, `(256, 4)`: grey in the middle of ratios, so that it shows on any ground."""
        return matplotlib.colormaps["coolwarm" if self.is_ratio else "viridis"](np.linspace(0, 1, _SHADES))


def find_thumbnail(features: Path) -> Path | None:
    """The picture of a slide's name beside its feature file, or in a folder `thumbnails` there or up to two above."""
    here = features.resolve().parent
    folders = (here, *(folder / "thumbnails" for folder in (here, *here.parents[:2])))
    candidates = (folder / f"{features.stem}{ending}" for folder in folders for ending in IMAGES)
    return next((path for path in candidates if path.is_file()), None)


def map_figure(found: TileMap) -> Figure:
    """The tiles of a slide in their colours, over its thumbnail where there is one."""
    low, high = found.corners.min(0), found.corners.max(0) + found.size
    with style():
        figure = Figure(
            figsize=(7.0, float(np.clip(6.0 * np.divide(*(high - low)[::-1]), 2.5, 9.0))), layout="constrained"
        )
        ax = figure.subplots()
        if found.thumbnail is not None and found.slide_width is not None:
            picture = imread(found.thumbnail)
            ax.imshow(
                picture, extent=(0, found.slide_width, found.slide_width * picture.shape[0] / picture.shape[1], 0)
            )
        colors = np.vstack((found.colors, (0.5, 0.5, 0.5, 0.15)))[found.shades]  # the last for those without a value
        colors[:, 3] *= 1.0 if found.thumbnail is None else 0.6
        ax.add_collection(
            PolyCollection(list(_squares(found)), facecolors=colors, edgecolors="none", antialiased=False)
        )
        if found.query is not None:
            middle = found.corners[found.query] + found.size / 2
            ax.plot(*middle, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6)
        margin = found.size
        ax.set(xlim=(low[0] - margin, high[0] + margin), ylim=(high[1] + margin, low[1] - margin), aspect="equal")
        ax.axis("off")
        ax.set_title(found.name, loc="left")
        shown = matplotlib.cm.ScalarMappable(found.scale, matplotlib.colors.ListedColormap(found.colors))
        bar = figure.colorbar(shown, ax=ax, label=found.label, shrink=0.8, ticks=_ticks(found))
        bar.ax.minorticks_off()
        bar.ax.set_yticklabels([f"{tick:.3g}" for tick in _ticks(found)])
    return figure


def geojson(found: TileMap) -> dict[str, Any]:
    """A FeatureCollection as QuPath reads it: a tile object for each value, with its colour."""
    there = found.shades >= 0
    colors = (found.colors[found.shades[there], :3] * 255).round().astype(int).tolist()
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*square, square[0]]]},
            "properties": {"objectType": "tile", "measurements": {"attention": _short(value)}, "color": color},
        }
        for square, value, color in zip(_squares(found)[there].tolist(), found.values[there], colors, strict=True)
    ]
    return {"type": "FeatureCollection", "features": features}


def map_data(found: TileMap) -> dict[str, Any]:
    """What the page knows."""
    picture = None
    if found.thumbnail is not None:
        kind = IMAGES[found.thumbnail.suffix.lower()]
        picture = f"data:{kind};base64,{base64.b64encode(found.thumbnail.read_bytes()).decode()}"
    return {
        "name": found.name,
        "label": found.label,
        "size": found.size,
        "corners": found.corners.tolist(),
        "values": [_short(value) if np.isfinite(value) else None for value in found.values],
        "shades": found.shades.tolist(),
        "colors": [to_hex(color) for color in found.colors],
        "ticks": [[float(found.scale(tick)), f"{tick:.3g}"] for tick in _ticks(found)],
        "query": found.query,
        "picture": picture,
        "width": found.slide_width,
    }


def save_map(found: TileMap, path: Path | str) -> Path:
    """Write a map whole or not at all, as `.png` (`.svg`, `.pdf`), `.geojson` or `.html`; ValueError for another."""
    path = Path(path)
    kind = check_format(path, MAP_FORMATS)
    if kind not in _TEXTS:
        return save(map_figure(found), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, _TEXTS[kind](found))
    return path


def _page(found: TileMap) -> str:
    data = json.dumps(map_data(found), separators=(",", ":")).replace("<", "\\u003c")  # a name may hold </script>
    return _TEMPLATE.read_text(encoding="utf-8").replace(">DATA<", f">{data}<")


_TEXTS: dict[str, Callable[[TileMap], str]] = {
    ".geojson": lambda found: json.dumps(geojson(found), separators=(",", ":")),
    ".html": _page,
}
MAP_FORMATS = (".png", ".svg", ".pdf", *_TEXTS)


def _squares(found: TileMap) -> NDArray[Any]:
    """The four corners of each tile, `(L, 4, 2)`, clockwise as y points down."""
    size = int(found.size) if float(found.size).is_integer() else found.size
    squares: NDArray[Any] = found.corners[:, None] + size * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    return squares


def _ticks(found: TileMap) -> list[float]:
    low, high = float(found.scale.vmin or 0.0), float(found.scale.vmax or 0.0)
    return [low, low**0.5, 1.0, high**0.5, high] if found.is_ratio else np.linspace(low, high, 3).tolist()


def _short(value: float) -> float:
    return float(f"{value:.4g}")
