"""Tile sets the shape of a slide's, from pictures and a brain inside Python packages: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGES = ("retina", "immunohistochemistry", "astronaut", "coffee", "chelsea")
BACKGROUND = 0.03  # mean brightness below which a tile holds nothing
BRAIN = 0.1


@dataclass(frozen=True)
class TileSet:
    """The tiles of one slide that hold something.

    Attributes:
        name: of the data.
        features: `(N, F)`, each tile at 4 samples a side, standardised.
        targets: `(N, T)`, mean value of each channel and mean gradient along each axis, standardised.
        coords: int64 `(N, D)`, cell of each tile, rows before columns.
        shown: `(N, C)` in [0, 1], mean value, for pictures.
        fragment: int64 `(N,)`, which picture a tile is from; 0 in a volume.
        grid: cells along each axis.
    """

    name: str
    features: Tensor
    targets: Tensor
    coords: Tensor
    shown: Tensor
    fragment: Tensor
    grid: tuple[int, ...]


def load(data: str, tile: int) -> TileSet:
    """The tile set named: `"images"`, scikit-image's sample pictures side by side; `"mni152"`, a brain volume."""
    if data == "images":
        return from_images(sample_images(), tile, data)
    if data == "mni152":
        return from_volume(brain(), tile, data)
    raise ValueError(f"expected data to be 'images' or 'mni152', got {data!r}")


def sample_images() -> list[Tensor]:
    """Colour pictures `(H, W, 3)` in [0, 1] that the wheel of scikit-image holds."""
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the slide of sample images needs scikit-image: pip install scikit-image") from error
    return [torch.from_numpy(getattr(data, name)().copy()).float() / 255 for name in IMAGES]


def brain() -> Tensor:
    """The MNI152 template `(D, H, W)` in [0, 1] at one millimetre, which the wheel of nilearn holds."""
    try:
        from nilearn.datasets import load_mni152_template
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the brain volume needs nilearn: pip install nilearn") from error
    return torch.from_numpy(load_mni152_template(resolution=1).get_fdata().copy()).float()


def from_images(images: Sequence[Tensor], tile: int, name: str) -> TileSet:
    """Pictures `(H, W, 3)` as fragments on one slide, a tile of glass between them; dark tiles are left out."""
    cut, cells, fragments, top = [], [], [], 0
    for number, image in enumerate(images):
        rows, columns = image.shape[0] // tile, image.shape[1] // tile
        if rows == 0 or columns == 0:
            raise ValueError(f"expected pictures of at least one tile of {tile} pixels, got {tuple(image.shape)}")
        kept = image[: rows * tile, : columns * tile].permute(2, 0, 1)
        cut.append(kept.unflatten(1, (rows, tile)).unflatten(3, (columns, tile)).permute(1, 3, 0, 2, 4).flatten(0, 1))
        cells.append(torch.cartesian_prod(torch.arange(rows) + top, torch.arange(columns)))
        fragments.append(torch.full((rows * columns,), number))
        top += rows + 1
    return _tile_set(name, torch.cat(cut), torch.cat(cells), torch.cat(fragments), BACKGROUND)


def from_volume(volume: Tensor, tile: int, name: str) -> TileSet:
    """A volume `(D, H, W)` in cubes; those without brain are left out."""
    sizes = [n // tile for n in volume.shape]
    if 0 in sizes:
        raise ValueError(f"expected a volume of at least one cube of {tile} voxels, got {tuple(volume.shape)}")
    kept = volume[tuple(slice(n * tile) for n in sizes)]
    cubes = kept.unflatten(0, (sizes[0], tile)).unflatten(2, (sizes[1], tile)).unflatten(4, (sizes[2], tile))
    cubes = cubes.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).unsqueeze(1)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    return _tile_set(name, cubes, cells, torch.zeros(len(cells), dtype=torch.int64), BRAIN)


def _tile_set(name: str, tiles: Tensor, cells: Tensor, fragment: Tensor, background: float) -> TileSet:
    """From tiles `(N, C, tile, ...)`, their cells and their fragments."""
    held = tiles.flatten(1).mean(1) > background
    tiles, cells, fragment = tiles[held], cells[held], fragment[held]
    num_dims = cells.shape[1]
    pool = F.adaptive_avg_pool2d if num_dims == 2 else F.adaptive_avg_pool3d
    grey = tiles.mean(1)
    gradients = [grey.diff(dim=axis + 1).flatten(1).mean(1) for axis in range(num_dims)]
    shown = tiles.flatten(2).mean(2)
    targets = torch.stack((*shown.unbind(1), *gradients), 1)
    features = pool(tiles, 4).flatten(1)
    grid = tuple(int(n) + 1 for n in cells.amax(0))
    return TileSet(name, _standard(features), _standard(targets), cells, shown, fragment, grid)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
