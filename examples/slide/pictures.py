"""What the job leaves to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from probe import Probe, Run, Settings, mean_of_neighbours
from tiles import TileSet
from torch import Tensor

from dilated_attention_pytorch.kernels.hilbert import CurveOrder
from dilated_attention_pytorch.viz import heat_figure, neighbourhood_figure, orders_figure, save


def draw(
    out: Path, tiles: TileSet, settings: Settings, orders: dict[str, CurveOrder], runs: dict[str, Run]
) -> list[Path]:
    """Writes orders.png, neighbourhood.png and heat.png: the fragment around one validation tile near the middle."""
    held_out = next(iter(runs.values())).held_out
    # In the largest fragment, which starts at the origin: the middle tile of those that were held out.
    middle = tiles.coords.double().median(0).values
    query = int((tiles.coords - middle).square().sum(1).masked_fill(~held_out, torch.inf).argmin())
    plane = int(tiles.coords[query, 0]) if tiles.coords.shape[1] == 3 else None
    shown = tiles.fragment == tiles.fragment[query]
    colors = tiles.shown if tiles.shown.shape[1] == 3 else tiles.shown.expand(-1, 3)
    maps, labels = {"tiles": colors}, {}
    for name in ("raster", "hilbert"):
        title = f"attention, {name}"
        maps[title] = attention_map(runs[name].model, tiles, settings, orders[name], query, held_out)
        labels[title] = "weight, mean over heads"
    errors = {"no model": mean_of_neighbours(tiles, held_out)} | {
        name: runs[name].errors for name in ("raster", "hilbert")
    }
    for name, values in errors.items():
        maps[f"error, {name}"] = smoothed(values, tiles.coords)
        labels[f"error, {name}"] = "squared error"
    figures = {
        "orders": orders_figure(orders, tiles.coords, plane=plane, shown=shown),
        "neighbourhood": neighbourhood_figure(settings.pattern, orders, tiles.coords, query=query, shown=shown),
        "heat": heat_figure(maps, tiles.coords, labels=labels, mark=query, shown=shown),
    }
    return [save(figure, out / f"{name}.png", dpi=110) for name, figure in figures.items()]


@torch.no_grad()
def attention_map(
    model: Probe, tiles: TileSet, settings: Settings, order: CurveOrder, query: int, hidden: Tensor
) -> Tensor:
    """The last layer's attention of one tile over all others, `(N,)` in original order, the mean over heads."""
    found: dict[str, Tensor] = {}

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        found["q"], found["k"] = arguments[0][0], arguments[1][0]

    last = model.encoder.layers[-1].self_attn.attention
    handle = last.register_forward_pre_hook(keep)
    model(order.apply(tiles.features, 0), order.apply(tiles.coords, 0), order.apply(hidden, 0))
    handle.remove()
    q, k = found["q"], found["k"]
    place, pattern = int(order.inverse[query]), settings.pattern
    weights = torch.zeros(len(k))
    for head in range(pattern.num_heads):
        keys = torch.tensor([m for part in pattern.keys_of(place, head, len(k)) for m in part])
        share = (k[keys, head] @ q[place, head] * q.shape[-1] ** -0.5).softmax(0)
        weights.index_add_(0, keys, share / pattern.num_heads)
    weights = order.undo(weights, 0)
    return weights.masked_fill(weights == 0, torch.nan)


def smoothed(values: Tensor, coords: Tensor, width: float = 2.0) -> Tensor:
    """The mean of the values (nan: none) around each token, weighted by a Gaussian of `width` cells."""
    known = values.isfinite()
    near = (-0.5 * (torch.cdist(coords.double(), coords[known].double()) / width).square()).exp()  # (N, known)
    return (near @ values[known].double()) / near.sum(1)
