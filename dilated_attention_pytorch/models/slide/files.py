"""Slides from files: tile embeddings with their coordinates on the encoder's grid.

Reads what TRIDENT, CLAM, STAMP, slide2vec, tiatoolbox, LazySlide and Owkin's tools write (`formats.py`), and says what
it did with the coordinates (`grid.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.files import check_path
from dilated_attention_pytorch.models.slide import formats
from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig
from dilated_attention_pytorch.models.slide.grid import (
    Grid,
    Spacing,
    check_inside,
    doubts,
    neighbour_distance,
    places,
    spacing_of,
)


class Slide(NamedTuple):
    """A slide as `SlideEncoder` takes it: `encoder(slide.tiles, slide.coords)`.

    Attributes:
        tiles: `(1, L, D)`, of the file's own floating dtype.
        coords: int64 `(1, L, 2)`, x and y of each tile in pixels of the encoder's grid.
        corners: `(L, 2)`, x and y as the file has them, in most of them pixels of level 0.
        tile_size: side of a tile in the unit of `corners`.
        name: of the slide.
        said: what was done with the coordinates, and the features' dtype where it is not fp32.
        doubts: what looks wrong and was taken nevertheless, a line each.
        extent: width and height of the slide in the unit of `corners`, where the file says.
    """

    tiles: Tensor
    coords: Tensor
    corners: Tensor
    tile_size: float
    name: str
    said: str
    doubts: tuple[str, ...]
    extent: tuple[float, float] | None = None


def find_slides(folder: Path) -> list[Path]:
    """The feature files of a folder, by name.

    Raises:
        ValueError: no folder, or none in it; the folders below it that hold some are named.
    """
    folder = check_path("folder", folder)
    if not folder.is_dir():
        raise ValueError(f"expected a folder of feature files, got {folder}")
    found = sorted(path for path in folder.iterdir() if _is_slide(path))
    if not found:
        below = sorted({str(path.parent) for path in folder.glob("*/*") if _is_slide(path)})
        hint = f"; there are some in {', '.join(below[:5])}" if below else ""
        raise ValueError(f"expected folder {folder} to hold {', '.join(formats.ENDINGS)}, found none{hint}")
    return found


def _is_slide(path: Path) -> bool:
    return path.suffix.lower() in formats.ENDINGS and not path.name.startswith(".")


@dataclass(frozen=True, kw_only=True)
class SlideReader:
    """Reads slides from feature files.

    Args:
        in_chans: width of a tile's embedding; any by default.
        tile_size: pixels between neighbours in `coords`, as the encoder's config has it.
        slide_ngrids: side of the encoder's grid, in tiles.
        patch_size_level0: side of a tile in the coordinates' unit, for files that do not tell.
        coords_folder: folder of the files that hold coordinates, for feature files without, by the slide's name.
        grid: `"tile"` counts places in tiles, as TRIDENT does, so that overlapping tiles share them; `"stride"` gives
            each a place.
        strict: doubts are errors.

    Raises:
        ValueError: a value out of range; an unknown grid.

    Example:
        >>> SlideReader.of(SlideEncoderConfig(in_chans=1024)).in_chans
        1024
    """

    in_chans: int | None = None
    tile_size: int = 256
    slide_ngrids: int = 1000
    patch_size_level0: float | None = None
    coords_folder: Path | None = None
    grid: Grid = "tile"
    strict: bool = False

    def __post_init__(self) -> None:
        check.check_choice("grid", self.grid, Grid)
        check.check_bool("strict", self.strict)
        for name in ("in_chans", "tile_size", "slide_ngrids"):
            if getattr(self, name) is not None or name != "in_chans":
                object.__setattr__(self, name, check.check_int(name, getattr(self, name), 1, 2**31))
        if self.patch_size_level0 is not None:
            check.check_above_zero("patch_size_level0", self.patch_size_level0)
        if self.coords_folder is not None:
            folder = check_path("coords_folder", self.coords_folder)
            if not folder.is_dir():
                raise ValueError(f"expected coords_folder to be a folder, got {folder}")
            object.__setattr__(self, "coords_folder", folder)

    @classmethod
    def of(cls, config: SlideEncoderConfig, **options: Any) -> Self:
        """The reader for an encoder's config; `options` are the other fields."""
        size = config.level0_tile_size or config.tile_size
        return cls(in_chans=config.in_chans, tile_size=size, slide_ngrids=config.slide_ngrids, **options)

    def count(self, path: Path) -> int:
        """The number of tiles, without reading them; errors as in `read`."""
        with formats.opened(path) as stored:
            return self._length(tuple(stored.features.shape))

    def sources(self, path: Path) -> list[Path]:
        """What a slide is read from: the feature file, what is in it if it is a folder, and coordinates beside it."""
        beside = formats.coordinates_file(path, self.coords_folder)
        return [path, *(path.rglob("*") if path.is_dir() else ()), *(() if beside is None else (beside,))]

    def read(self, path: Path) -> Slide:
        """One slide.

        Args:
            path: a feature file.

        Returns:
            The slide, on the CPU.

        Raises:
            ValueError: no tiles, another width than `in_chans`, numbers that are not finite, no coordinates, tiles
                outside the grid, a tile's size that neither the file nor `patch_size_level0` tells.
            ImportError: a reader that is not installed.
            Exception: a damaged file, as its reader says it.
        """
        with formats.opened(path) as stored:
            shape = tuple(stored.features.shape)
            length = self._length(shape)
            features = _tensor(stored.features[0] if len(shape) == 3 else stored.features[:])
            corners, attributes = stored.coords, stored.attributes
        corners, spacing = self._spacing(path, corners, attributes, length)
        # NaN is both least and largest; asking each number took most of the time of reading.
        if not bool(torch.stack(features.aminmax()).isfinite().all()):
            odd = int((~features.isfinite().all(1)).sum())
            raise ValueError(f"expected finite features, got NaN or inf in {odd} of {length} tiles")
        at = places(corners, spacing, self.grid)
        check_inside(at, self.slide_ngrids)
        found = doubts(corners, at, spacing, self.grid)
        if self.patch_size_level0 is not None and self.patch_size_level0 != spacing.size:
            found.append(f"the file's own tile size was taken, {spacing.size:g}, not {self.patch_size_level0:g}")
        if self.strict and found:
            raise ValueError("expected nothing doubtful, as strict asks, got: " + "; ".join(found))
        unit = spacing.size if self.grid == "tile" else spacing.stride
        said = f"{spacing.words}; divided by {unit:g}"
        if features.dtype != torch.float32:
            said += f"; features in {str(features.dtype).removeprefix('torch.')}"
        coords = torch.from_numpy(at * self.tile_size)[None]
        at_level0 = torch.from_numpy(corners), spacing.size
        return Slide(features[None], coords, *at_level0, path.stem, said, tuple(found), spacing.extent)

    def _length(self, shape: tuple[int, ...]) -> int:
        """The tiles in features of a shape, which is held to what the encoder takes."""
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]
        if shape and shape[0] == 0:
            raise ValueError("expected at least one tile, got an empty slide")
        if len(shape) != 2:
            raise ValueError(f"expected features of shape (N, D) or (1, N, D), got {shape}")
        if self.in_chans is not None and shape[1] != self.in_chans:
            raise ValueError(f"expected features {self.in_chans} wide, as the encoder takes them, got {shape[1]}")
        return shape[0]

    def _spacing(self, path: Path, coords: Any, attributes: dict[str, Any], length: int) -> tuple[np.ndarray, Spacing]:
        """The corners of tiles `(L, 2)` and their spacing, from the file or the one beside it."""
        spacing = spacing_of(attributes)
        if coords is None or spacing is None:
            beside = formats.coordinates_file(path, self.coords_folder)
            if beside is not None:
                theirs, more = formats.read_coordinates(beside)
                if coords is not None and not np.array_equal(np.asarray(coords).reshape(-1, 2), theirs):
                    raise ValueError(f"expected the coordinates of {beside}, got others")
                coords, spacing = theirs, spacing_of(attributes | more)
        if coords is None:
            raise ValueError("expected coordinates in the file or in a folder of them (coords_folder), found none")
        corners = _corners(coords, length)
        if spacing is None and np.shape(corners)[1] == 4:
            sides = (corners[:, 2:] - corners[:, :2]).astype(np.float64)
            size = float(sides[0, 0])
            # Sides that differ, as where the slide's end cuts tiles, are no tile's size.
            spacing = (
                Spacing(size, size, "tiatoolbox: corners of tiles") if size > 0 and np.allclose(sides, size) else None
            )
        corners = np.ascontiguousarray(corners[:, :2])
        if spacing is None:
            if self.patch_size_level0 is None:
                distance = neighbour_distance(corners)
                hint = "" if distance is None else f" (neighbours stand {distance:g} apart)"
                raise ValueError(
                    f"expected attributes that tell a tile's size at level 0, found none: give patch_size_level0{hint}"
                )
            size = float(self.patch_size_level0)
            spacing = Spacing(size, size, "tile size as given")
        return corners, spacing


def pad_slides(slides: Sequence[Slide]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tiles `(B, L, D)`, coords `(B, L, 2)` and mask `(B, L)` of several slides, as `SlideEncoder` takes them.

    The mask is None where all have one length.

    Raises:
        TypeError: something else than slides.
        ValueError: none.
    """
    check.check_instance("slides", slides, list, tuple)
    for i, slide in enumerate(slides):
        check.check_instance(f"slides[{i}]", slide, Slide)
    if not slides:
        raise ValueError("expected slides to hold at least one, got none")
    lengths = torch.tensor([slide.tiles.shape[1] for slide in slides], device="cpu")
    if len(slides) == 1:
        return slides[0].tiles, slides[0].coords, None
    dtype = reduce(torch.promote_types, (slide.tiles.dtype for slide in slides))
    tiles = torch.nn.utils.rnn.pad_sequence([slide.tiles[0].to(dtype) for slide in slides], batch_first=True)
    coords = torch.nn.utils.rnn.pad_sequence([slide.coords[0] for slide in slides], batch_first=True)
    mask = torch.arange(tiles.shape[1], device="cpu") < lengths[:, None]
    return tiles, coords, None if bool(mask.all()) else mask


def _tensor(array: Any) -> Tensor:
    """Features as a tensor of a floating dtype."""
    # Of this machine's byte order, and not a view of the file, which is closed.
    if isinstance(array, Tensor):
        tensor = array.detach().clone()
    else:
        array = np.asarray(array)
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise ValueError(f"expected features of a floating dtype, got {array.dtype}")
        array = np.asarray(array, dtype=array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(array if array.flags.owndata and array.flags.writeable else array.copy())
    if tensor.dtype not in check.FLOAT_DTYPES:
        raise ValueError(f"expected features of a floating dtype, got {tensor.dtype}")
    return tensor


def _corners(coords: Any, length: int) -> np.ndarray:
    """Coordinates as int64 or fp64, `(L, 2)` or, with the far corner, `(L, 4)`."""
    corners = np.asarray(coords)
    if corners.ndim == 3 and corners.shape[0] == 1:
        corners = corners[0]
    if corners.shape not in ((length, 2), (length, 4)):
        raise ValueError(f"expected coordinates of shape ({length}, 2), one for each tile, got {corners.shape}")
    if corners.dtype.kind not in "iuf" or corners.dtype.itemsize < 4:
        raise ValueError(f"expected coordinates of int32, int64, float32 or float64, got {corners.dtype}")
    if not np.isfinite(corners).all():
        raise ValueError("expected finite coordinates, got NaN or inf")
    return corners.astype(np.float64 if corners.dtype.kind == "f" else np.int64)
