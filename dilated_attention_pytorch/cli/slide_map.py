"""`slide map`: where a slide encoder looks on one slide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, notes
from dilated_attention_pytorch.core.validation import quoted

_FILE = "Feature file of a slide."
_OUT = "What to write, by its ending: .png (.svg, .pdf), .geojson for QuPath, .html. May be given several times."
_QUERY = "Whose attention: cls, or a tile's number in the file, from 0."
_LAYER = "From 0; the last by default. A rollout goes from it to the first."
_ROLLOUT = "Through all layers up to --layer, each with its residual, in place of one layer."
_HEADS = "mean, max (not with --rollout) or a head's number."
_RAW = "Probabilities, in place of their ratio to those of uniform attention over the same pattern."
_THUMBNAIL = (
    "Picture of the whole slide; by default NAME.png or .jpg beside the file or in a folder thumbnails near it."
)
_WIDTH = "The slide's width in pixels of level 0, which places the thumbnail, where the file does not tell."
_UNIT = "Pixels of level 0 per unit of the file's coordinates, where those are micrometres or others."


def slide_map(
    file: Annotated[Path, Argument(help=_FILE)],
    checkpoint: options.Checkpoint,
    out: Annotated[list[Path], Option(help=_OUT)],
    query: Annotated[str, Option(help=_QUERY)] = "cls",
    layer: Annotated[int | None, Option(help=_LAYER)] = None,
    rollout: Annotated[bool, Option("--rollout", help=_ROLLOUT)] = False,
    heads: Annotated[str, Option(help=_HEADS)] = "mean",
    raw: Annotated[bool, Option("--raw", help=_RAW)] = False,
    thumbnail: Annotated[Path | None, Option(help=_THUMBNAIL)] = None,
    slide_width: Annotated[float | None, Option(help=_WIDTH)] = None,
    unit: Annotated[float, Option(help=_UNIT)] = 1.0,
    patch_size_level0: options.TileSize = None,
    coords: options.CoordsFolder = None,
    grid: options.Grid = "tile",
    max_wsi_size: options.SlideSide = None,
    device: options.Device = None,
) -> None:
    """Draw the attention of the cls token, or of a tile, over a slide.

    A ratio of 2 means twice the attention that the dilated pattern alone would give the tile.
    """
    import torch

    from dilated_attention_pytorch.core.validation import check_above_zero
    from dilated_attention_pytorch.models import SlideEncoder
    from dilated_attention_pytorch.models.slide import maps
    from dilated_attention_pytorch.models.slide.files import SlideReader
    from dilated_attention_pytorch.models.slide.work import reason
    from dilated_attention_pytorch.viz import slide_map as viz
    from dilated_attention_pytorch.viz.style import check_format

    for path in out:
        check_format(path, viz.MAP_FORMATS, "--out")
    check_above_zero("unit", unit)
    if slide_width is not None:
        check_above_zero("slide_width", slide_width)
    asked: dict[str, Any] = {"query": query if query == "cls" else _number("query", query, "cls")}
    asked |= {"heads": heads if heads in ("mean", "max") else _number("heads", heads, "mean, max")}
    place = options.check_device(device) if device else ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = SlideEncoder.from_pretrained(checkpoint, max_wsi_size, device=place)
    reader = SlideReader.of(encoder.config, patch_size_level0=patch_size_level0, coords_folder=coords, grid=grid)
    try:
        slide = reader.read(file)
    except Exception as error:  # half a file can raise anything
        said = reason(error)
        ours = said.startswith("expected ")
        raise ValueError(f"{said}, in {file}" if ours else f"expected a slide in {file}, got {said}") from error
    for line in slide.doubts:
        notes.print(f"{slide.name}: {line}", soft_wrap=True)
    if (float(slide.corners.abs().max()) + slide.tile_size) * unit >= 2**53:
        raise ValueError(f"expected unit to leave places below 2**53, got {unit}")
    width = slide_width or (slide.extent and slide.extent[0] * unit)
    if thumbnail is None and (thumbnail := viz.find_thumbnail(file)) is not None and not width:
        notes.print(f"{thumbnail} is left out: --slide-width would place it", soft_wrap=True)
        thumbnail = None
    found = maps.slide_map(
        encoder, slide.tiles.to(place), slide.coords.to(place), layer=layer, rollout=rollout, **asked
    )
    whose = "of cls" if query == "cls" else f"of tile {query}"
    which = encoder.config.depth - 1 if layer is None else layer
    how = f"rolled out to layer {which}" if rollout else f"in layer {which}"
    part = {"mean": "mean of heads", "max": "largest of heads"}.get(heads, f"head {heads}")
    drawn = viz.TileMap(
        corners=slide.corners.numpy() * (int(unit) if unit.is_integer() else unit),
        size=slide.tile_size * unit,
        values=(found.probability if raw else found.ratio).cpu().numpy(),
        name=slide.name,
        label=f"attention {whose} {how}, {part}{'' if raw else ', over uniform'}",
        is_ratio=not raw,
        query=None if query == "cls" else int(query),
        thumbnail=thumbnail,
        slide_width=width,
    )
    console.print(f"{slide.name}: {slide.said}", soft_wrap=True)
    unseen = int(found.ratio.isnan().sum())
    console.print(f"{len(found.ratio):,} tiles, {unseen:,} of them not seen by the query", soft_wrap=True)
    for path in out:
        console.print(viz.save_map(drawn, path), soft_wrap=True)


def _number(name: str, text: str, others: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"expected --{name} to be {others} or a number, got {quoted(text)}")
    return int(text)
