"""`slide map`: pictures, objects for QuPath, and a page that pans and zooms in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slide_files as write
import torch
from browser import ask, needs_browser
from command import call, fails
from matplotlib.image import imread, imsave

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.slide.files import Slide, SlideReader
from dilated_attention_pytorch.models.slide.maps import slide_map
from dilated_attention_pytorch.viz.slide_map import TileMap, find_thumbnail, map_data, map_figure, save_map

COUNT = 61
CORNERS = write.tissue(COUNT) * 512


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SlideEncoder, Slide]:
    """A slide's file, a checkpoint, and the encoder and slide in them."""
    folder, checkpoint = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("checkpoint")
    write.trident(folder / "a.h5", write.features(COUNT), CORNERS, magnification=40)
    encoder = write.checkpoint(checkpoint)
    return folder / "a.h5", checkpoint, encoder, SlideReader.of(encoder.config).read(folder / "a.h5")


def draw(made: tuple[Path, Path, Any, Any], *more: object, file: Path | None = None) -> str:
    return call("slide", "map", file or made[0], "--checkpoint", made[1], "--device", "cpu", *more)


def values(path: Path) -> list[float]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return [feature["properties"]["measurements"]["attention"] for feature in found["features"]]


def example(**options: Any) -> TileMap:
    """A page's worth of tiles: four by three, the last without a value."""
    corners = 100 * np.stack(np.meshgrid(np.arange(4), np.arange(3), indexing="ij"), -1).reshape(-1, 2)
    numbers = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, np.nan])
    given = {
        "corners": corners,
        "size": 100,
        "values": numbers,
        "name": "<b>a</script>",
        "label": "x",
        "is_ratio": True,
    }
    return TileMap(**given | options)


def test_each_option_decides_the_numbers(made: tuple[Path, Path, SlideEncoder, Slide], tmp_path: Path) -> None:
    _, _, encoder, slide = made
    cases: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--query", "17", "--layer", "0"], {"query": 17, "layer": 0}),
        (["--rollout", "--heads", "2"], {"rollout": True, "heads": 2}),
        (["--heads", "max"], {"heads": "max"}),
    ]
    for options, same in cases:
        for raw in (False, True):
            out = tmp_path / "a.geojson"
            draw(made, "--out", out, *options, *(["--raw"] if raw else []))
            found = slide_map(encoder, slide.tiles, slide.coords, **same)
            want = found.probability if raw else found.ratio
            want = want[~want.isnan()]
            torch.testing.assert_close(torch.tensor(values(out)), want, rtol=1e-3, atol=1e-7)  # four digits are written


def test_all_formats_at_once(made: tuple[Path, Path, SlideEncoder, Slide], tmp_path: Path) -> None:
    outs = [tmp_path / "made" / f"a{ending}" for ending in (".png", ".geojson", ".html")]
    printed = draw(made, "--rollout", *(word for out in outs for word in ("--out", out)))
    assert "61 tiles, 0 of them not seen" in printed and all(out.name in printed for out in outs)
    assert sorted(path.name for path in outs[0].parent.iterdir()) == sorted(out.name for out in outs)
    assert imread(outs[0]).std() > 0.01
    for feature, corner in zip(json.loads(outs[1].read_text())["features"], CORNERS.tolist(), strict=True):
        x, y = corner
        square = [[x, y], [x + 512, y], [x + 512, y + 512], [x, y + 512], [x, y]]  # closed, as the format asks
        assert feature["type"] == "Feature" and feature["geometry"] == {"type": "Polygon", "coordinates": [square]}
        properties = feature["properties"]
        assert set(properties) == {"objectType", "measurements", "color"} and properties["objectType"] == "tile"
        assert len(properties["color"]) == 3 and all(type(c) is int and 0 <= c < 256 for c in properties["color"])
    draw(made, "--out", outs[1], "--unit", "0.5", "--rollout")
    first = json.loads(outs[1].read_text())["features"][0]["geometry"]["coordinates"][0]
    assert first[0] == (CORNERS[0] / 2).tolist() and first[2] == (CORNERS[0] / 2 + 256).tolist()


def test_a_thumbnail_is_found_and_placed(made: tuple[Path, Path, SlideEncoder, Slide], tmp_path: Path) -> None:
    file = tmp_path / "20x_256px_0px_overlap" / "features_x" / "a.h5"  # TRIDENT's folders
    file.parent.mkdir(parents=True)
    write.trident(file, write.features(COUNT), CORNERS, magnification=40, level0_width="None")
    assert find_thumbnail(file) is None
    (tmp_path / "thumbnails").mkdir()
    picture = tmp_path / "thumbnails" / "a.png"
    imsave(picture, np.full((20, 40, 3), (255, 0, 0), np.uint8))
    assert find_thumbnail(file) == picture
    page = tmp_path / "a.html"

    def shown(*more: object) -> dict[str, Any]:
        draw(made, "--rollout", "--out", page, *more, file=file)
        found = re.findall(
            r'<script id="data" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8")
        )
        return json.loads(found[0])  # type: ignore[no-any-return]

    assert shown()["picture"] is None  # the file does not tell the slide's width
    assert shown("--slide-width", 20_000)["width"] == 20_000
    write.trident(file, write.features(COUNT), CORNERS, magnification=40, level0_width=16_000, level0_height=8_000)
    assert shown()["width"] == 16_000 and shown()["picture"].startswith("data:image/png;base64,iVBOR")
    ax = map_figure(example(thumbnail=picture, slide_width=400.0)).axes[0]
    assert ax.images[0].get_extent() == [0, 400, 200, 0]


def test_the_scale_of_ratios_has_one_in_the_middle() -> None:
    found = example()
    assert found.shades[-1] == -1 and map_data(found)["values"][-1] is None
    assert found.shades[found.values == 1.0].tolist() == [round(255 / 2)] * 7
    assert (np.diff(found.shades[:5]) > 0).all()
    assert found.scale(0.5) == pytest.approx(1 - found.scale(2.0))
    linear = example(is_ratio=False, values=np.arange(12.0))
    assert linear.shades[0] == 0 and linear.shades[-1] == 255
    assert set(example(values=np.ones(12)).shades) == {128} and set(
        example(values=np.ones(12), is_ratio=False).shades
    ) == {0}


def test_mistakes_are_named_before_anything_is_written(
    made: tuple[Path, Path, Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture, file = tmp_path / "p.png", tmp_path / "a.h5"
    imsave(picture, np.zeros((2, 2, 3), np.uint8))
    write.trident(file, write.features(COUNT), CORNERS, magnification=40, level0_width="None")
    for options, message in (
        (["--out", tmp_path / "x.gif"], "expected --out to end in .png, .svg, .pdf, .geojson or .html, got 'x.gif'"),
        (["--query", "-1"], "expected --query to be cls or a number, got '-1'"),
        (["--query", "61"], "expected --query tiles in [0, 61), got [61]"),
        (["--heads", "all"], "expected --heads to be mean, max or a number, got 'all'"),
        (["--heads", "max", "--rollout"], "expected --heads to be 'mean' or a head's number with --rollout, got 'max'"),
        (["--layer", "2"], "expected --layer in [0, 2), got 2"),
        (["--unit", "0"], "expected --unit above 0, got 0.0"),
        (["--unit", "9e18"], "expected --unit to leave places below 2**53, got 9e+18"),
        (["--max-wsi-size", str(2**62)], "expected --max-wsi-size and tile_size to make fewer than 2**63 tiles"),
        (["--unit", "inf"], "expected --unit to be finite, got inf"),
        (["--slide-width", "nan"], "expected --slide-width to be finite, got nan"),
        (["--query", "9" * 5000], "expected --query to be cls or a number, got '999"),
        (["--thumbnail", picture], "expected --slide-width beside a thumbnail"),
        (["--thumbnail", tmp_path / "no.png", "--slide-width", "9"], "expected a thumbnail that is there, got "),
    ):
        arguments = ["slide", "map", file, "--checkpoint", made[1], "--out", tmp_path / "x.html", *options]
        assert message in fails(capsys, monkeypatch, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "p.png"]
    with pytest.raises(ValueError, match="some of them finite"):
        example(values=np.full(12, np.nan))


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    text = save_map(example(), tmp_path / "x.html").read_text(encoding="utf-8")
    (kept,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert json.loads(kept) == json.loads(json.dumps(map_data(example())))
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(|fetch\(|import\(", text)
    assert len(re.findall(r"(?s)\"use strict\".*</script>", text)[0].splitlines()) < 150


@needs_browser
def test_the_page_draws_pans_and_zooms(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    imsave(picture, np.full((3, 4, 3), (255, 0, 0), np.uint8))
    path = save_map(example(query=5, thumbnail=picture, slide_width=400.0), tmp_path / "x.html")
    script = """(() => {
      const said = () => at("said").textContent, look = () => ({...view});
      const middle = (i) => corners[i].map((c, axis) => (c + size / 2 - [view.x, view.y][axis]) * view.scale);
      const send = (name, [x, y], more = {}) => {
        const box = canvas.getBoundingClientRect();
        const Kind = name === "wheel" ? WheelEvent : PointerEvent;
        const where = {clientX: box.left + x, clientY: box.top + y, pointerId: 1};
        canvas.dispatchEvent(new Kind(name, {cancelable: true, ...where, ...more}));
      };
      const key = (name) => canvas.dispatchEvent(new KeyboardEvent("keydown", {key: name, cancelable: true}));
      at("opacity").value = 1;
      draw();
      const pixel = (i) => [...pen.getImageData(...middle(i).map((c) => Math.round(c * devicePixelRatio)), 1, 1).data];
      const found = {title: document.title, bold: at("name").children.length, help: said(), start: look()};
      found.pixels = [0, 2, 4].map(pixel);
      found.ticks = [...at("ticks").children].map((one) => one.textContent);
      send("pointermove", middle(4));
      found.hover = said();
      send("pointermove", middle(11));
      found.unseen = said();
      send("pointermove", middle(5));
      found.query = said();
      const before = middle(4);
      send("wheel", before, {deltaY: -400});
      found.zoomed = look();
      found.still = Math.hypot(middle(4)[0] - before[0], middle(4)[1] - before[1]);
      send("pointerdown", [50, 50]);
      send("pointermove", [80, 40]);
      send("pointerup", [80, 40]);
      found.dragged = look();
      send("pointerdown", [100, 100]);
      send("pointerdown", [200, 100], {pointerId: 2});
      send("pointermove", [300, 100], {pointerId: 2});
      send("pointerup", [0, 0]);
      send("pointerup", [0, 0], {pointerId: 2});
      found.pinched = look();
      send("dblclick", [0, 0]);
      found.whole = look();
      key("+");
      key("ArrowLeft");
      found.keys = look();
      key("0");
      found.zero = look();
      found.spoken = said();
      const resized = (height) => {
        canvas.style.cssText = `flex: none; height: ${height}px`;
        dispatchEvent(new Event("resize"));
      };
      resized(200);
      found.fitted = look();
      key("ArrowUp");
      const kept = look();
      resized(400);
      found.kept = kept.scale === view.scale;
      canvas.style.cssText = "";
      const whole = document.documentElement;
      found.wide = whole.scrollWidth <= innerWidth && whole.scrollHeight <= innerHeight;
      return found;
    })()"""
    found = ask(path, script, "", "--window-size=700,700")
    assert found["title"] == "<b>a</script>: slide map" and found["bold"] == 0
    assert found["help"].startswith("Drag to move")
    colors = (example().colors[example().shades[[0, 2, 4]]] * 255).round().tolist()
    assert np.abs(np.array(found["pixels"]) - np.array(colors)).max() <= 1
    assert found["ticks"][2] == "1" and float(found["ticks"][4]) == pytest.approx(
        1 / float(found["ticks"][0]), rel=0.01
    )
    assert found["hover"] == "Tile 4 at (100, 100): 4"
    assert found["unseen"] == "Tile 11 at (300, 200): not seen by the query"
    assert found["query"] == "Tile 5 at (100, 200): 1, the query"
    start, zoomed, dragged = found["start"], found["zoomed"], found["dragged"]
    assert zoomed["scale"] == pytest.approx(start["scale"] * np.e) and found["still"] < 2.5  # events have whole pixels
    assert [(zoomed[c] - dragged[c]) * zoomed["scale"] for c in "xy"] == pytest.approx([30, -10])
    assert found["pinched"]["scale"] == pytest.approx(min(2 * dragged["scale"], 7))  # a tile in 700 pixels
    assert found["whole"] == start and found["zero"] == start
    assert found["keys"]["scale"] == pytest.approx(1.4 * start["scale"])
    assert found["fitted"]["scale"] == pytest.approx(0.95 * 200 / 300) and found["kept"]
    assert found["spoken"].startswith("Tile ") and found["wide"]
