"""Slides from files, their options and maps."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import slide_files
import torch
from hypothesis import strategies as st

from dilated_attention_pytorch.models import SlideEncoder, slide_segment_lengths
from dilated_attention_pytorch.models.slide.embed import EmbedOptions, SlideEmbedder
from dilated_attention_pytorch.models.slide.files import Slide, SlideReader, find_slides, pad_slides
from dilated_attention_pytorch.models.slide.maps import SlideMap, slide_map
from dilated_attention_pytorch.models.slide.results import ResultFolder
from dilated_attention_pytorch.models.slide.work import scan
from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets.modules import spoil
from fuzz.values import anything, pick


@cache
def folder() -> Path:
    """Eight slides of two classes in `features`, their `labels.csv` and an `encoder`; read, never written to."""
    found = Path(tempfile.mkdtemp(prefix="fuzz-slides-"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    (found / "features").mkdir()
    slide_files.checkpoint(found / "encoder", depth=1)
    rows = ["slide_id,case_id,label"]
    for i in range(8):
        corners = slide_files.tissue(9 + i) * 512
        slide_files.trident(found / f"features/s{i}.h5", slide_files.features(9 + i), corners, magnification=40)
        rows.append(f"s{i},p{i},{'tumour' if i % 2 else 'normal'}")
    (found / "labels.csv").write_text("\n".join(rows) + "\n")
    return found


@cache
def _encoder() -> SlideEncoder:
    return SlideEncoder.from_pretrained(folder() / "encoder")


@target("slide_segment_lengths", 6)
def _segment_lengths(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {"max_wsi_size": draw(st.integers(2**15, 2**20)), "tile_size": 256}
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(lengths: tuple[int, ...]) -> None:
        assert len(lengths) == 5 and lengths[0] == 1024 and sorted(lengths) == list(lengths) and lengths[-1] < 2**63

    return Call(slide_segment_lengths, (), given, check=check, right=not names)


@target("SlideReader", 16)
def _reader(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        "in_chans": slide_files.WIDTH, "tile_size": 256, "slide_ngrids": 1000, "patch_size_level0": None,
        "coords_folder": None, "grid": draw(st.sampled_from(["tile", "stride"])), "strict": draw(st.booleans()),
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def read(**given: Any) -> Slide:
        return SlideReader(**given).read(folder() / "features/s3.h5")

    def check(slide: Slide) -> None:
        assert slide.tiles.shape == (1, 12, slide_files.WIDTH) and slide.coords.shape == (1, 12, 2)
        assert bool((slide.coords >= 0).all())

    also = ("features", "outside", "doubtful")  # what the values then say of the file
    return Call(read, (), given, (*given, *also), check, not names)


@target("find_slides", 6)
def _find(draw: st.DrawFn) -> Call:
    given = {"folder": folder() / "features"}
    names = pick(draw, list(given))
    spoil(draw, given, names)
    return Call(find_slides, (), given, check=lambda found: len(found) == 8 or 1 / 0, right=not names, also=(OSError,))


@target("pad_slides", 8)
def _pad(draw: st.DrawFn) -> Call:
    reader = SlideReader.of(_encoder().config)
    slides: Any = [reader.read(folder() / f"features/s{i}.h5") for i in draw(st.lists(st.integers(0, 7), max_size=3))]
    right = len(slides) > 0
    if draw(st.booleans()):
        right = False
        if slides and draw(st.booleans()):
            slides[draw(st.integers(0, len(slides) - 1))] = draw(anything)
        else:
            slides = draw(anything)

    def check(padded: Any) -> None:
        tiles, coords, mask = padded
        for i, slide in enumerate(slides):
            n = slide.tiles.shape[1]
            assert torch.equal(tiles[i, :n], slide.tiles[0]) and torch.equal(coords[i, :n], slide.coords[0])
            assert mask is None or int(mask[i].sum()) == n

    return Call(pad_slides, (slides,), {}, ("slides",), check, right)


@target("slide_map", 12)
def _map(draw: st.DrawFn) -> Call:
    slide = SlideReader.of(_encoder().config).read(folder() / "features/s3.h5")
    given: dict[str, Any] = {
        "encoder": _encoder(), "tiles": slide.tiles, "coords": slide.coords,
        "query": draw(st.sampled_from(["cls", 0, 11])), "layer": None,
        "heads": draw(st.sampled_from(["mean", "max", 0, 3])), "rollout": False,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(found: SlideMap) -> None:
        assert found.ratio.shape == found.probability.shape == (12,) and float(found.probability.min()) >= 0.0

    return Call(slide_map, (), given, (*given, "mask"), check, not names)


@target("EmbedOptions", 12)
def _options(draw: st.DrawFn) -> Call:
    given: dict[str, Any] = {
        "dtype": torch.float32, "layers": (0, 1), "tiles": True, "batch_tokens": 64, "ring_above": None,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def embed(**given: Any) -> int:
        options = EmbedOptions(**given)
        with tempfile.TemporaryDirectory() as place:
            results = ResultFolder(Path(place, "out"), "npz", {})
            reader = SlideReader.of(_encoder().config)
            with results.held():
                embedder = SlideEmbedder(_encoder(), reader, results, options)
                found = scan([folder() / "features/s3.h5"], reader)
                return sum(outcome.problem is None for outcome in embedder.run(found))

    return Call(embed, (), given, check=lambda count: count == 1 or 1 / 0, right=not names)


@target("SlideEmbedder", 8, "SlideEmbedder", "ResultFolder")
def _embedder(draw: st.DrawFn) -> Call:
    place = Path(tempfile.gettempdir(), "fuzz-none")  # nothing is made before a run
    if draw(st.booleans()):
        given: dict[str, Any] = {"path": place, "format": "npz", "settings": {}}
        names = pick(draw, list(given))
        spoil(draw, given, names)
        return Call(ResultFolder, (), given, right=not names)
    given = {
        "encoder": _encoder(), "reader": SlideReader.of(_encoder().config), "options": None, "ranks": None,
        "folder": ResultFolder(place, "npz", {}),
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)
    return Call(SlideEmbedder, (), given, right=not names)
