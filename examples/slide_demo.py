"""Slides from nothing: feature files of scikit-image's pictures, then `slide embed`, `slide tune` and `slide map`.

    python examples/slide_demo.py --out runs/slide-demo

A slide is a few pieces of pictures on glass, cut into tiles. A tile's features are its colours, its texture and its
gradients. In slides of the class "stained" two of four pieces are of an immunohistochemistry stain; the others have
pieces of other pictures in their place. The files are as TRIDENT writes them, of a slide scanned at 40x and cut at 20x.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from matplotlib.image import imsave

from dilated_attention_pytorch.models import SlideEncoder, save_pretrained

PICTURES = ("coffee", "chelsea", "astronaut", "rocket")
STAIN = "immunohistochemistry"
TILE, PIECE = 16, 10  # pixels of a tile's side; tiles of a piece's side
LEVEL0 = 2  # pixels of level 0 per pixel of a picture


def pictures() -> dict[str, np.ndarray]:
    """Colour pictures `(H, W, 3)` in [0, 1] that the wheel of scikit-image holds."""
    from skimage import data

    return {name: getattr(data, name)().astype(np.float32)[..., :3] / 255 for name in (*PICTURES, STAIN)}


def canvas(kinds: list[str], sources: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Pieces of pictures, turned at random, in two columns on white glass: `(H, W, 3)`."""
    step, rows = (PIECE + 2) * TILE, -(-len(kinds) // 2)
    slide = np.ones((rows * step, 2 * step, 3), np.float32)
    for i, kind in enumerate(kinds):
        source, side = sources[kind], PIECE * TILE
        top, left = (int(rng.integers(n - side + 1)) for n in source.shape[:2])
        piece = np.rot90(source[top : top + side, left : left + side], int(rng.integers(4)))
        y, x = (int(TILE * rng.integers(3)) for _ in range(2))
        y, x = y + i // 2 * step, x + i % 2 * step
        slide[y : y + side, x : x + side] = piece * rng.uniform(0.85, 1.0)  # staining is never quite the same
    return slide


def features(tiles: np.ndarray) -> np.ndarray:
    """Of tiles `(N, T, T, 3)`, `(N, 15)`: colours, their spread, gradients by direction, second ones, grey values."""
    colour = [tiles.mean((1, 2)), tiles.std((1, 2))]
    grey = tiles.mean(3)
    down, right = np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1]
    strength, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi
    directions = [np.where((angle * 4 // np.pi) == i, strength, 0).mean((1, 2)) for i in range(4)]
    turns = np.abs(np.diff(grey, 2, axis=1)).mean((1, 2)), np.abs(np.diff(grey, 2, axis=2)).mean((1, 2))
    spread = np.quantile(grey, (0.1, 0.5, 0.9), axis=(1, 2))
    return np.concatenate([*colour, np.stack([*directions, *turns, *spread], 1)], 1).astype(np.float32)


def write_slides(folder: Path, count: int, sources: dict[str, np.ndarray], seed: int) -> None:
    """`count` slides with thumbnails, a patient for every two, and their labels; tiles of glass are left out."""
    rng = np.random.default_rng(seed)
    for part in ("features", "thumbnails"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows, found, places, sizes = [], [], [], []
    for i in range(count):
        stained, name = i // 2 % 2 == 1, f"slide{i:02}"
        kinds = [str(rng.choice(PICTURES)) for _ in range(4)]
        if stained:
            kinds[:2] = [STAIN] * 2
        rng.shuffle(kinds)
        slide = canvas(kinds, sources, rng)
        imsave(folder / "thumbnails" / f"{name}.png", slide)
        cut = slide.reshape(slide.shape[0] // TILE, TILE, -1, TILE, 3).swapaxes(1, 2)
        kept = np.argwhere(cut.min((2, 3, 4)) < 1)
        found.append(features(cut[kept[:, 0], kept[:, 1]]))
        places.append(kept[:, ::-1])
        sizes.append(slide.shape)
        rows.append((name, f"patient{i // 2:02}", "stained" if stained else "plain"))
    everything = np.concatenate(found)
    mean, deviation = everything.mean(0), everything.std(0)
    for (name, _, _), x, at, (height, width, _) in zip(rows, found, places, sizes, strict=True):
        with h5py.File(folder / "features" / f"{name}.h5", "w") as file:
            file["features"] = (x - mean) / deviation
            coords = file.create_dataset("coords", data=at * TILE * LEVEL0)  # corners, row by row
            coords.attrs.update({
                "patch_size": TILE, "patch_size_level0": TILE * LEVEL0, "level0_magnification": 40,
                "target_magnification": 20, "overlap": 0, "name": name, "savetodir": "None",
                "level0_width": width * LEVEL0, "level0_height": height * LEVEL0,
            })  # fmt: skip
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("slide_id", "case_id", "label"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/slide-demo"))
    parser.add_argument("--slides", type=int, default=48, help="a multiple of 4")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.out
    write_slides(folder, given.slides, pictures(), given.seed)
    # Small and at random: it learns all it knows from the labels.
    torch.manual_seed(given.seed)
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 4, "ffn_dim": 96}
    branches = {"segment_lengths": (128, 256, 1024), "dilation_rates": (1, 2, 4)}
    save_pretrained(SlideEncoder(in_chans=15, **shape, **branches), folder / "checkpoint")
    tuning = ["--mode", "full", "--folds", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--dropout", "0"]
    commands = [
        ["embed", "features", "--checkpoint", "checkpoint", "--out", "embeddings"],
        ["tune", "labels.csv", "--features", "features", "--checkpoint", "checkpoint", "--out", "tuned", *tuning,
         "--epochs", str(given.epochs)],
        ["map", "features/slide02.h5", "--checkpoint", "tuned/fold_2", "--out", "map.png", "--out", "map.html",
         "--out", "map.geojson"],
    ]  # fmt: skip
    for words in commands:
        print(f"\n$ dilated-attention slide {' '.join(words)}", flush=True)
        command = [sys.executable, "-m", "dilated_attention_pytorch.cli", "slide", *words]
        subprocess.run(command, check=True, cwd=folder)
    print(f"\neverything is in {folder}")


if __name__ == "__main__":
    main()
