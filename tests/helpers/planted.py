"""Slides with one planted region that decides their label, and an encoder that looks there.

The tiles of the region carry a mark (feature 0), and feature 1 has the sign of the label there. Elsewhere feature 1 is
loud noise, so a mean over all tiles tells little of the label and attention to marked tiles tells it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.models import SlideEncoder

COLUMNS, ROWS, WIDTH = 20, 15, 4


class Planted(NamedTuple):
    tiles: Tensor  # (1, L, WIDTH)
    coords: Tensor  # (1, L, 2), 256 pixels apart, column by column
    region: Tensor  # bool (L,)
    label: int


def planted(seed: int, side: int = 5) -> Planted:
    """A slide of 300 tiles with a square region at random."""
    random = torch.Generator().manual_seed(seed)
    left, top, label = (int(torch.randint(n, (), generator=random)) for n in (COLUMNS - side, ROWS - side, 2))
    places = torch.cartesian_prod(torch.arange(COLUMNS), torch.arange(ROWS))
    within = places - torch.tensor((left, top))
    region = ((within >= 0) & (within < side)).all(1)
    tiles = torch.randn(len(places), WIDTH, generator=random)
    tiles[:, 0] += 5.0 * region
    tiles[~region, 1] *= 6.0
    tiles[region, 1] += 4.0 * (2 * label - 1)
    return Planted(tiles[None], 256 * places[None], region, label)


@torch.no_grad()
def looking(sharpness: float) -> SlideEncoder:
    """An encoder at random but for its logits: in every layer `sharpness` times a least-squares guess of the region.

    With 0 attention is uniform over the pattern.
    """
    torch.manual_seed(0)
    encoder = SlideEncoder(
        in_chans=WIDTH, embed_dim=32, depth=2, num_heads=4, ffn_dim=32, segment_lengths=(32, 100, 400),
        dilation_rates=(1, 2, 4),
    ).eval()  # fmt: skip
    slides = [planted(100 + i) for i in range(20)]
    wanted = torch.cat([slide.region for slide in slides]).float()[:, None]
    for i, layer in enumerate(encoder.encoder.layers):
        states = [list(encoder.layer_inputs(slide.tiles, slide.coords, i))[-1][0, 1:] for slide in slides]
        rows = layer.self_attn_layer_norm(torch.cat(states))
        rows, aim = rows - rows.mean(0), wanted - wanted.mean()
        weight = torch.linalg.solve(rows.T @ rows + torch.eye(32), rows.T @ aim)[:, 0]  # a LayerNorm's rows sum to 0
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        head_dim = q.out_features // encoder.config.num_heads
        q.weight.zero_()
        k.weight.zero_()
        q.bias[::head_dim] = head_dim**0.5  # undoes the scale: the logit is the first number of each head's key
        k.weight[::head_dim] = sharpness * weight
    return encoder


def screenshot(path: str) -> None:
    """Two pages of one slide side by side, probabilities and ratios, as `docs/slides.md` shows them."""
    import subprocess
    import tempfile
    from pathlib import Path

    import numpy as np
    from browser import BROWSER
    from matplotlib.image import imread, imsave

    from dilated_attention_pytorch.models.slide.maps import slide_map
    from dilated_attention_pytorch.viz.slide_map import TileMap, save_map

    slide, shots = planted(5_000_003), []
    found = slide_map(looking(2.5), slide.tiles, slide.coords, rollout=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, values in found._asdict().items():
            label = f"{name}, attention of cls rolled out to layer 1"
            options = {"corners": slide.coords[0].numpy(), "size": 256, "values": values.numpy(), "label": label}
            page = save_map(TileMap(name="made", is_ratio=name == "ratio", **options), Path(folder) / f"{name}.html")
            shot = page.with_suffix(".png")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
            command = [str(BROWSER), *flags, "--window-size=640,560", f"--screenshot={shot}", f"file://{page}"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            shots.append(imread(shot))
    imsave(path, np.concatenate(shots, 1))


if __name__ == "__main__":
    import sys

    screenshot(sys.argv[1])
