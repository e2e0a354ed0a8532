"""Feature files in the layouts of their producers, written with h5py, torch and NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dilated_attention_pytorch.models import SlideEncoder, save_pretrained

WIDTH = 12
TINY: dict[str, Any] = {
    "in_chans": WIDTH,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "segment_lengths": (16, 45, 300),
    "dilation_rates": (1, 2, 5),
    "padding": "zero_keys",
}
BRANCHES = list(zip(TINY["segment_lengths"], TINY["dilation_rates"], strict=True))


def checkpoint(folder: Path, **options: Any) -> SlideEncoder:
    """A small encoder with weights at random everywhere, saved in a folder."""
    torch.manual_seed(0)
    encoder = SlideEncoder(**TINY | options).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_pretrained(encoder, folder)
    return encoder


def features(count: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width), dtype=np.float32)


def tissue(count: int) -> np.ndarray:
    """Columns and rows of tiles, column by column, with holes: int64 `(count, 2)`."""
    side = int((2 * count) ** 0.5) + 2
    chosen = np.sort(np.random.default_rng(count).choice(side * side, count, replace=False))
    return np.stack((chosen // side, chosen % side), 1) + 3


def trident(
    path: Path, x: np.ndarray, corners: np.ndarray, *, magnification: int, overlap: int = 0, target: int = 20,
    **other: Any,
) -> None:  # fmt: skip
    import h5py

    size = 256 * magnification // target
    with h5py.File(path, "w") as file:
        file["features"] = x
        coords = file.create_dataset("coords", data=corners, chunks=(1, 2) if len(corners) else None)
        attributes = {
            "patch_size": 256, "patch_size_level0": size, "level0_magnification": magnification,
            "target_magnification": target, "overlap": overlap, "name": path.stem, "savetodir": "None",
            "level0_width": 2_000_000, "level0_height": 2_000_000,
        }  # fmt: skip
        coords.attrs.update(attributes | other)


def clam(folder: Path, name: str, x: np.ndarray, corners: np.ndarray, *, downsample: int) -> None:
    """CLAM's three files: features in `h5_files` and `pt_files`, attributes in `patches` alone."""
    import h5py

    for part in ("h5_files", "pt_files", "patches"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "h5_files" / f"{name}.h5", "w") as file:
        file["features"], file["coords"] = x, corners.astype(np.int32)
    torch.save(torch.from_numpy(x), folder / "pt_files" / f"{name}.pt")
    with h5py.File(folder / "patches" / f"{name}.h5", "w") as file:
        coords = file.create_dataset("coords", data=corners.astype(np.int32))
        coords.attrs.update({
            "patch_size": 256, "patch_level": 1, "downsample": np.array([downsample, downsample], float),
            "name": name, "save_path": "somewhere",
        })  # fmt: skip


def stamp(path: Path, x: np.ndarray, at: np.ndarray, size_um: float = 113.12) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = x.astype(np.float16), (at * size_um).astype(np.float32)
        file.attrs["tile_size_um"], file.attrs["unit"] = size_um, "um"


def slide2vec(folder: Path, name: str, x: np.ndarray, corners: np.ndarray, size: int) -> Path:
    for part in ("tile_embeddings", "tiles"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(x), folder / "tile_embeddings" / f"{name}.pt")
    np.savez(folder / "tiles" / f"{name}.coordinates.npz", x=corners[:, 0], y=corners[:, 1])
    meta = {"tiling": {"tile_size_lv0": size}}
    (folder / "tiles" / f"{name}.coordinates.meta.json").write_text(json.dumps(meta))
    return folder / "tile_embeddings" / f"{name}.pt"


def odd_files(folder: Path) -> dict[str, tuple[str, bool]]:
    """Forty files with something wrong: what a message says of each, and whether it is a doubt, not an error."""
    import h5py

    found: dict[str, tuple[str, bool]] = {}
    at, x = tissue(40), features(40)

    def bad(name: str, message: str, write: Callable[[Path], Any], ending: str = ".h5", doubt: bool = False) -> None:
        write(folder / f"{name}{ending}")
        found[name] = (message, doubt)

    def h5(name: str, message: str, x: Any = x, corners: Any = at * 512, doubt: bool = False, **other: Any) -> None:
        settings = {"magnification": 40} | other
        bad(name, message, lambda path: trident(path, np.asarray(x), np.asarray(corners), **settings), doubt=doubt)

    def spoiled(value: float, where: Any) -> np.ndarray:
        y = x.copy()
        y[where] = value
        return y

    def cut(path: Path, keep: float) -> None:
        trident(path, features(4000), tissue(4000) * 512, magnification=40)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    def datasets(path: Path, **arrays: Any) -> None:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value

    h5("nan", "expected finite features, got NaN or inf in 1 of 40 tiles", spoiled(np.nan, (3, 4)))
    h5("nan-everywhere", "got NaN or inf in 40 of 40 tiles", spoiled(np.nan, ...))
    h5("inf", "got NaN or inf in 2 of 40 tiles", spoiled(np.inf, (slice(0, 2), 0)))
    h5("half-overflow", "got NaN or inf in 40 of 40 tiles", np.full((40, WIDTH), np.inf, np.float16))
    h5("empty", "got an empty slide", np.zeros((0, WIDTH), np.float32), np.zeros((0, 2), np.int64))
    h5("empty-flat", "got an empty slide", np.zeros(0, np.float32), np.zeros((0, 2), np.int64))
    h5("wide", "expected features 12 wide, as the encoder takes them, got 13", features(40, 13))
    h5("narrow", "got 11", features(40, 11))
    h5("flat", "expected features of shape (N, D) or (1, N, D), got (40,)", x[:, 0])
    h5("two-slides", "expected features of shape (N, D) or (1, N, D), got (2, 20, 12)", x.reshape(2, 20, 12))
    h5("ints", "expected features of a floating dtype, got int64", x.astype(np.int64))
    h5("fewer-coords", "expected coordinates of shape (40, 2)", corners=at[:39] * 512)
    h5("more-coords", "expected coordinates of shape (40, 2)", corners=np.concatenate((at, at)) * 512)
    h5("three-coords", "expected coordinates of shape (40, 2)", corners=np.repeat(at, 2, 1)[:, :3])
    h5("half-coords", "expected coordinates of int32, int64, float32 or float64", corners=at.astype(np.float16))
    h5("nan-coords", "expected finite coordinates", corners=np.full((40, 2), np.nan))
    h5("negative", "got 40 tiles outside, such as column", corners=at * 512 - 100_000)
    h5("beyond", "expected places within 1000 x 1000", corners=at * 512 + [1000 * 512, 0])
    h5("below", "expected places within 1000 x 1000", corners=at * 512 + [0, 1000 * 512])
    h5("no-size", "expected attrs.patch_size_level0 to be above 0, got 0", patch_size_level0=0)
    h5("size-in-words", "expected attrs.patch_size_level0 to be above 0, got 'large'", patch_size_level0="large")
    h5("negative-overlap", "expected attrs.overlap to be above 0, got -64", overlap=-64)
    bad("cut-in-half", "OSError: ", lambda path: cut(path, 0.5))
    bad("cut-at-the-end", "OSError: ", lambda path: cut(path, 0.99))
    bad("no-bytes", "OSError: ", lambda path: path.write_bytes(b""))
    bad("text", "OSError: ", lambda path: path.write_text("no features"))
    bad("folder", "Error: ", lambda path: path.mkdir())
    bad("no-features", "expected features under one of", lambda path: datasets(path, coords=at))
    bad("no-coords", "expected coordinates in the file or in a folder of them", lambda path: datasets(path, features=x))
    bad("no-attributes", "neighbours stand 512 apart", lambda path: datasets(path, features=x, coords=at * 512))
    bad("torn-pt", "Error: ", lambda path: path.write_bytes(b"PK\x03\x04 torn"), ".pt")
    bad(
        "object-pt",
        "to hold tensors as torch.save writes them",
        lambda path: torch.save({"features": Path("code")}, path),
        ".pt",
    )
    bad("list-pt", "expected a tensor or a dictionary", lambda path: torch.save([torch.zeros(3)], path), ".pt")
    bad("bare-pt", "expected coordinates in the file", lambda path: torch.save(torch.from_numpy(x), path), ".pt")
    bad("torn-npz", "Error: ", lambda path: path.write_bytes(b"PK torn"), ".npz")
    bad("no-features-npz", "expected features under one of", lambda path: np.savez(path, coords=at), ".npz")
    # Taken, with a line, unless the run is strict.
    h5("copies", "1 tiles stand where another one does", corners=np.concatenate((at[:39], at[:1])) * 512, doubt=True)
    h5("shared", "40 tiles share", corners=at * 192, doubt=True, overlap=64, magnification=20)
    h5("stride", "most neighbours stand 1024 apart, where 512 was expected", corners=at * 1024, doubt=True)
    h5("outside", "tiles lie outside the slide of 3000 x 3000", doubt=True, level0_width=3000, level0_height=3000)
    assert len(found) == 40
    return found
