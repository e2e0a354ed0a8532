"""The slide example on pictures made here: what it cuts, what it counts, and that it trains and draws."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.kernels.hilbert import CURVES, curve_order, grid_coords

FOLDER = Path(__file__).parents[2] / "examples" / "slide"
MODULES = ("tiles", "locality", "probe", "pictures", "text")


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, ModuleType]]:
    """Its modules, which import each other by their own names; other examples have some of these names too."""
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours, so that neighbours tell something of a tile."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [(6 * (y * (c + 1 + seed) + x * (3 - c))).sin() / 2 + 0.5 for c in range(3)]
    return torch.stack(waves, -1) * 0.9 + 0.05


def test_tiles_are_cut_and_placed(example: dict[str, ModuleType]) -> None:
    images = [picture(70, 50), picture(33, 100, 1)]
    images[0][:16, :16] = 0.0  # glass
    tiles = example["tiles"].from_images(images, 16, "test")
    assert len(tiles.coords) == 4 * 3 - 1 + 2 * 6
    assert tiles.coords.amin(0).tolist() == [0, 0] and tiles.grid == (4 + 1 + 2, 6)
    assert [0, 0] not in tiles.coords.tolist()
    at = tiles.coords.tolist().index([2, 1])
    assert torch.allclose(tiles.shown[at], images[0][32:48, 16:32].mean((0, 1)))
    assert torch.allclose(tiles.features.mean(0), torch.zeros(48), atol=1e-5)
    assert torch.allclose(tiles.targets.std(0), torch.ones(5), atol=1e-5)
    # The gradient of the second picture's grey values, tile by tile, up to the standardising.
    gradient = tiles.targets[11:, 4]
    grey = images[1].mean(-1)[:32, :96].unflatten(0, (2, 16)).unflatten(2, (6, 16)).transpose(1, 2)
    assert float(torch.corrcoef(torch.stack((gradient, grey.diff(dim=-1).mean((-1, -2)).flatten())))[0, 1]) > 0.999


def test_volumes_are_cut_into_cubes(example: dict[str, ModuleType]) -> None:
    volume = torch.rand(20, 17, 26)
    tiles = example["tiles"].from_volume(volume, 8, "test")
    assert torch.equal(tiles.coords, grid_coords((2, 2, 3)))
    assert torch.allclose(tiles.shown[4, 0], volume[:8, 8:16, 8:16].mean())
    assert tiles.features.shape == (12, 64) and tiles.targets.shape == (12, 4)


def test_locality_is_what_a_count_gives(example: dict[str, ModuleType]) -> None:
    pattern = DilatedPattern((6, 20), (1, 3), 4)
    coords = torch.cat((grid_coords((5, 6)), torch.tensor([[9, 9]])))
    for name in CURVES:
        order = curve_order(name, coords)
        found = example["locality"].locality(pattern, order, coords)
        distances, reached = [], torch.zeros(4, 31, 31, dtype=torch.bool)
        for head, place in itertools.product(range(4), range(31)):
            for key in (m for part in pattern.keys_of(place, head, 31) for m in part):
                query, token = order.order[place], order.order[key]
                distances.append(float((coords[query] - coords[token]).double().norm()))
                reached[head, query, token] = True
        touches = (coords[:, None] - coords[None]).abs().amax(-1) == 1
        assert found.distance == pytest.approx(sum(distances) / len(distances))
        assert found.neighbours == pytest.approx(float(reached.any(0)[touches].double().mean()))
        assert found.neighbours_per_head == pytest.approx(float(reached[:, touches].double().mean()))


def test_hilbert_is_more_local_than_raster_and_text_is_not(example: dict[str, ModuleType]) -> None:
    pattern, coords = DilatedPattern((64, 256), (1, 2), 2), grid_coords((64, 64))
    near = {name: example["locality"].locality(pattern, curve_order(name, coords), coords) for name in CURVES}
    # Segments that are whole squares of cells are as compact along Morton's curve.
    assert near["hilbert"].distance == pytest.approx(near["morton"].distance, rel=0.01)
    assert near["hilbert"].distance < 0.4 * near["raster"].distance
    assert near["hilbert"].neighbours > near["morton"].neighbours > near["raster"].neighbours > 0
    plain, folded = example["text"].main(side=32)
    assert plain[1] < folded[1] and plain[2] > folded[2]


def test_a_probe_learns_and_cannot_see_what_is_hidden(example: dict[str, ModuleType]) -> None:
    probe = example["probe"]
    tiles = example["tiles"].from_images([picture(160, 160)], 16, "test")
    settings = probe.Settings((16, 64), (1, 2), width=32, heads=2, layers=1, steps=40)
    order = curve_order("hilbert", tiles.coords)
    run = probe.train(tiles, order, settings, 0)
    assert run.history[-1] < 0.7 * run.history[0]
    assert bool(run.errors[run.held_out].isfinite().all()) and bool(run.errors[~run.held_out].isnan().all())
    assert run.loss == pytest.approx(float(run.errors[run.held_out].mean()))
    features = tiles.features.clone()
    features[run.held_out] = 1e3
    model = run.model
    arguments = order.apply(tiles.coords, 0), order.apply(run.held_out, 0)
    with torch.no_grad():
        here = model(order.apply(tiles.features, 0), *arguments)
        assert torch.equal(model(order.apply(features, 0), *arguments), here)
        # Only distances enter: the same slide elsewhere gives the same.
        moved = model(order.apply(tiles.features, 0), arguments[0] + torch.tensor([7, 30]), arguments[1])
    assert torch.allclose(moved, here, atol=1e-4)
    again = probe.train(tiles, order, settings, 0)
    assert again.loss == run.loss


def test_attention_map_is_a_distribution_over_the_keys(example: dict[str, ModuleType]) -> None:
    tiles = example["tiles"].from_images([picture(96, 96)], 16, "test")
    settings = example["probe"].Settings((8, 16), (1, 2), width=32, heads=2, layers=1, steps=1)
    order = curve_order("hilbert", tiles.coords)
    run = example["probe"].train(tiles, order, settings, 0)
    found = example["pictures"].attention_map(run.model, tiles, settings, order, 14, run.held_out)
    shown = found.nan_to_num()
    assert float(shown.sum()) == pytest.approx(1.0, abs=1e-5)
    place, keys = int(order.inverse[14]), set()
    for head in range(2):
        keys |= {int(order.order[m]) for part in settings.pattern.keys_of(place, head, 36) for m in part}
    assert set(shown.nonzero().flatten().tolist()) == keys


def test_smoothed_values_are_means_of_those_nearby(example: dict[str, ModuleType]) -> None:
    coords, values = grid_coords((40, 3)), torch.full((120,), torch.nan)
    values[:60:7], values[60::7] = 2.0, 5.0
    found = example["pictures"].smoothed(values, coords)
    assert torch.allclose(found[:30], torch.tensor(2.0, dtype=torch.float64), atol=1e-3)  # ten cells from the others
    assert torch.allclose(found[-30:], torch.tensor(5.0, dtype=torch.float64), atol=1e-3)
    assert 2.1 < float(found[60]) < 4.9


def test_fragments_are_the_pictures(example: dict[str, ModuleType]) -> None:
    tiles = example["tiles"].from_images([picture(64, 64), picture(32, 80, 1)], 16, "test")
    assert torch.equal(tiles.fragment, (tiles.coords[:, 0] > 4).long()) and tiles.fragment.bincount().tolist() == [
        16,
        10,
    ]


@pytest.mark.parametrize("data", ["images", "mni152"])
def test_the_command(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: dict[str, ModuleType]
) -> None:
    """Start to end in a few seconds, on data of this test."""
    monkeypatch.setattr(example["tiles"], "sample_images", lambda: [picture(160, 100), picture(64, 64, 2)])
    monkeypatch.setattr(example["tiles"], "brain", lambda: picture(64, 56)[None].mean(-1).repeat(48, 1, 1))
    spec = importlib.util.spec_from_file_location("slide_main", FOLDER / "__main__.py")
    assert spec is not None and spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    command.main(data, tmp_path / "out", 8, 2, 2, "16,64", "1,2")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["orders"]) == list(CURVES)
    assert all(len(row["losses"]) == 2 for row in results["orders"].values())
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 6
    for name in ("orders", "neighbourhood", "heat"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


def test_the_real_images_are_in_the_wheel(example: dict[str, ModuleType]) -> None:
    pytest.importorskip("skimage", reason="`make slide` installs scikit-image")
    tiles = example["tiles"].load("images", 20)
    assert len(tiles.coords) > 4000
    with pytest.raises(ValueError, match="expected data to be"):
        example["tiles"].load("paintings", 20)
