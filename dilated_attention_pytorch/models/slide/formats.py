"""What feature files hold, format by format: HDF5, torch, NumPy, and AnnData and zarr where their readers are there.

`opened` gives features, coordinates and attributes as they are stored; `files.py` makes a slide of them.
"""

from __future__ import annotations

import contextlib
import importlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dilated_attention_pytorch.core.files import parse_json
from dilated_attention_pytorch.core.messages import listed
from dilated_attention_pytorch.core.validation import check_values
from dilated_attention_pytorch.models.weights import reading

FEATURES = ("features", "feats", "embeddings")
COORDS = ("coords", "coordinates", "positions")


@dataclass
class Stored:
    """What a file holds. Features have a `shape`, and are read where they are sliced."""

    features: Any
    coords: np.ndarray | None = None  # (N, 2), or (N, 4) with the far corner
    attributes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """A feature file, open: `.h5`, `.pt`, `.npz`, `.npy`, `.h5ad` or `.zarr`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a file without features.
        ImportError: a reader that is not installed.
        OSError, RuntimeError: a damaged file, as its reader says it.
    """
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"expected the name of a feature file to end in {', '.join(ENDINGS)}, got {path.name}")
    if not path.exists():
        raise FileNotFoundError("expected a feature file, found none")
    with _READERS[path.suffix.lower()](path) as stored:
        if not hasattr(stored.features, "shape"):
            raise ValueError(f"expected features to be an array, got {type(stored.features).__name__}")
        yield stored


def _named(group: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    found = next((group[name] for name in names if name in group), None)
    if isinstance(found, Mapping):
        raise ValueError(f"expected an array under one of {list(names)}, got a group")
    if found is None and what:
        raise ValueError(f"expected {what} under one of {list(names)}, got {listed(sorted(map(str, group)))}")
    return found


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[Stored]:
    with package("h5py").File(path, "r") as file:
        features, coords = _named(file, FEATURES, "features"), _named(file, COORDS, "")
        attributes: dict[str, Any] = dict(file.attrs) | dict(features.attrs)
        attributes |= {} if coords is None else dict(coords.attrs)
        yield Stored(features, None if coords is None else coords[()], attributes)


@contextlib.contextmanager
def _torch(path: Path) -> Iterator[Stored]:
    # Tensors and plain containers alone: a pickle can hold any code.
    with reading(path, "tensors as torch.save writes them", Exception):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(loaded, torch.Tensor):
        loaded = {FEATURES[0]: loaded}
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a tensor or a dictionary of tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        if isinstance(value, torch.Tensor):
            check_values(str(key), value)
    loaded = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in loaded.items()}
    coords = _named(loaded, COORDS, "")
    if isinstance(coords, torch.Tensor) and coords.dtype == torch.bfloat16:  # NumPy has none, and it is as coarse
        coords = coords.half()
    numbers = {key: x.item() for key, x in loaded.items() if isinstance(x, torch.Tensor) and x.numel() == 1}
    others = {key: value for key, value in loaded.items() if isinstance(value, int | float | str)} | numbers
    yield Stored(_named(loaded, FEATURES, "features"), None if coords is None else np.asarray(coords), others)


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[Stored]:
    with np.load(path) as archive:
        arrays = {name: _Member(archive, name) for name in archive.files}
        coords = _named(arrays, COORDS, "")
        others = {name: array[()].item() for name, array in arrays.items() if array.shape in ((), (1,))}
        yield Stored(_named(arrays, FEATURES, "features"), None if coords is None else coords[:], others)


class _Member:
    """An array of an open `.npz`, of which the header alone is read until it is sliced."""

    def __init__(self, archive: Any, name: str) -> None:
        self._archive, self._name = archive, name
        with archive.zip.open(f"{name}.npy") as stream:
            layout: Any = np.lib.format
            first = layout.read_magic(stream) == (1, 0)
            header = layout.read_array_header_1_0 if first else layout.read_array_header_2_0
            self.shape: tuple[int, ...] = header(stream)[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._archive[self._name][index]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _npy(path: Path) -> Iterator[Stored]:
    """Owkin's table: level, column, row, features; or features alone."""
    table = np.load(path, mmap_mode="r")
    if table.ndim == 2 and table.shape[1] > 3 and bool((table[:, :3] == np.rint(table[:, :3])).all()):
        if len(levels := np.unique(table[:, 0])) > 1:
            raise ValueError(f"expected tiles of one level, whose columns and rows are one grid, got {listed(levels)}")
        yield Stored(table[:, 3:], np.asarray(table[:, 1:3]), {"tile_size_lv0": 1})
    else:
        yield Stored(table)


@contextlib.contextmanager
def _anndata(path: Path) -> Iterator[Stored]:
    table = package("anndata").read_h5ad(path)
    if "spatial" not in table.obsm:
        raise ValueError(f"expected coordinates in obsm['spatial'], got {listed(sorted(table.obsm))}")
    others = {key: value for key, value in table.uns.items() if np.ndim(value) == 0}
    yield Stored(_dense(table.X), np.asarray(table.obsm["spatial"]), others)


@contextlib.contextmanager
def _zarr(path: Path) -> Iterator[Stored]:
    """Arrays of tiatoolbox, or LazySlide's tables of a SpatialData."""
    group = package("zarr").open_group(path, mode="r")
    if not (path / "tables").is_dir():
        coords = _named(group, COORDS, "")
        yield Stored(_named(group, FEATURES, "features"), None if coords is None else coords[:], dict(group.attrs))
        return
    tables = sorted((path / "tables").glob("*_tiles"))
    if len(tables) != 1:
        raise ValueError(f"expected one table of tiles, got {listed(table.name for table in tables)}")
    table = package("anndata").io.read_zarr(tables[0])
    tiles = package("pandas").read_parquet(path / "shapes" / "tiles" / "shapes.parquet", columns=["tile_id", "x", "y"])
    corners = tiles.set_index("tile_id").loc[table.obs["tile_id"], ["x", "y"]].to_numpy()
    spec = dict(group.attrs).get("tile_spec", {}).get("tiles", {})
    size = int(spec["width"] * spec["base_downsample"]) if {"width", "base_downsample"} <= set(spec) else None
    yield Stored(_dense(table.X), corners, {} if size is None else {"tile_size_lv0": size})


def _dense(x: Any) -> Any:
    return x.toarray() if hasattr(x, "toarray") else x


_READERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Stored]]] = {
    ".h5": _hdf5, ".pt": _torch, ".npz": _npz, ".npy": _npy, ".h5ad": _anndata, ".zarr": _zarr,
}  # fmt: skip
ENDINGS = tuple(_READERS)


def coordinates_file(path: Path, folder: Path | None) -> Path | None:
    """The file beside a feature file that holds its coordinates or their attributes; None where there is none.

    With a folder: TRIDENT's or CLAM's `patches`, or slide2vec's `tiles`. Without: where CLAM and slide2vec put them.
    """
    name, up = path.stem, path.parent.parent
    # CLAM's patches tell the tile's size, its h5_files do not.
    spots = [base / f"{name}.h5" for base in (up / "patches", up.parent / "patches", up / "h5_files")]
    spots += [up / "tiles" / f"{name}.coordinates.npz", up / "coordinates" / f"{name}.npy"]
    if folder is not None:
        spots = [folder / f"{name}{end}" for end in (".h5", "_patches.h5", ".coordinates.npz", ".npz", ".npy")]
    return next((spot for spot in spots if spot.is_file() and spot != path), None)


def read_coordinates(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Coordinates `(N, 2)` and attributes of a file that holds no features."""
    if path.suffix == ".h5":
        with package("h5py").File(path, "r") as file:
            coords = _named(file, COORDS, "coordinates")
            return coords[()], dict(file.attrs) | dict(coords.attrs)
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):  # slide2vec 2: a structured array
        if loaded.dtype.names is None:
            return loaded, {}
        columns = ((name, np.unique(loaded[name])) for name in loaded.dtype.names if name not in ("x", "y"))
        others = {name: values[0] for name, values in columns if len(values) == 1}  # others differ from tile to tile
        return np.stack((loaded["x"], loaded["y"]), 1), others
    with loaded as archive:
        if {"x", "y"} <= set(archive.files):
            coords = np.stack((archive["x"], archive["y"]), 1)
        else:
            coords = archive[_named({name: name for name in archive.files}, COORDS, "coordinates")]
    name = path.name.removesuffix(".npz")
    spots = (path.with_name(f"{stem}.meta.json") for stem in (name, name.removesuffix(".coordinates")))
    meta = next((spot for spot in spots if spot.is_file()), None)
    values = {} if meta is None else parse_json(meta.read_text(encoding="utf-8"))
    return coords, values.get("tiling", values)


def package(name: str) -> Any:
    """An optional package, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.split(".")[0] in ("h5py", "pandas", "pyarrow", "sklearn", "torchsurv")
        how = "pip install 'dilated-attention-pytorch[slides]'" if extra else f"pip install {name}"
        raise ImportError(f"expected {name}, which this needs, found none: {how}") from error
