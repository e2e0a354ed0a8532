"""`convert`: weights of another implementation as a model of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from dilated_attention_pytorch.cli.options import console, ints, notes
from dilated_attention_pytorch.core.files import parse_json

_SOURCES = "gigapath, longvit, torchscale-encoder, torchscale-decoder, fkodom or fkodom-lm; by default the names tell."
_ARGS = "torchscale: JSON file with the settings it was built with; by default those in the weights' file."
_START = "fkodom: take the weights, though the numbers will be others."
_LENGTHS = "{}, one per branch; gigapath and longvit have their own."


def convert(
    src: Annotated[Path, Argument(help="Weights: .pth, .pt or .bin of torch.save, or .safetensors.")],
    dst: Annotated[Path, Argument(help="Folder for model.safetensors and config.json.")],
    source: Annotated[str | None, Option("--from", help=_SOURCES)] = None,
    args: Annotated[Path | None, Option(help=_ARGS)] = None,
    heads: Annotated[int | None, Option(help="Attention heads (gigapath, longvit: 16).")] = None,
    segments: Annotated[str | None, Option("--segments", "-w", help=_LENGTHS.format("Segment lengths"))] = None,
    rates: Annotated[str | None, Option("--rates", "-r", help=_LENGTHS.format("Dilation rates"))] = None,
    activation: Annotated[str | None, Option(help="relu or gelu (torchscale: gelu; fkodom: relu).")] = None,
    layer_norm_eps: Annotated[float | None, Option(help="Of the LayerNorms, 1e-5.")] = None,
    scale_embedding: Annotated[bool | None, Option(help="torchscale: not its no_scale_embedding; no.")] = None,
    xpos_scale_base: Annotated[float | None, Option(help="torchscale-decoder with xPos: 512.")] = None,
    max_wsi_size: Annotated[int | None, Option(help="gigapath: side of the largest slide, 262144.")] = None,
    tile_size: Annotated[int | None, Option(help="gigapath: side of a tile, 256.")] = None,
    global_pool: Annotated[bool | None, Option(help="gigapath: mean over tiles in place of the cls token; no.")] = None,
    as_initialisation: Annotated[bool, Option("--as-initialisation", help=_START)] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a model that is in the folder.")] = False,
) -> None:
    """Convert weights of Prov-GigaPath, LongViT, torchscale's LongNet or fkodom's LongNet.

    What weights do not tell is given by options or --args. What is assumed for want of them is printed.
    """
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.models.checkpoint import save_pretrained
    from dilated_attention_pytorch.models.convert import ASSUMED, SHAPE, Source, sniff
    from dilated_attention_pytorch.models.convert import convert as converted
    from dilated_attention_pytorch.models.weights import CONFIG, WEIGHTS, read_checkpoint

    if source is not None:
        check_choice("--from", source, Source)
    there = [name for name in (WEIGHTS, CONFIG) if (dst / name).exists()]
    if there and not overwrite:
        raise ValueError(f"expected a folder without a model, got {dst} with {there[0]}; --overwrite replaces it")
    state, own = read_checkpoint(src)
    kind: Any = source or sniff(state)
    given: dict[str, Any] = {
        "num_heads": heads,
        "segment_lengths": None if segments is None else ints("--segments", segments),
        "dilation_rates": None if rates is None else ints("--rates", rates),
        "activation": activation,
        "layer_norm_eps": layer_norm_eps,
        "scale_embedding": scale_embedding,
        "xpos_scale_base": xpos_scale_base,
        "max_wsi_size": max_wsi_size,
        "tile_size": tile_size,
        "global_pool": global_pool,
        "as_initialisation": as_initialisation or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    takes = {*SHAPE, *ASSUMED[kind], *(("as_initialisation",) if kind.startswith("fkodom") else ())}
    for name, value in given.items():
        if name not in takes:
            raise ValueError(f"expected no --{name.replace('_', '-')} with weights of {kind}, got {value}")
    if kind.startswith("torchscale"):
        given["args"] = own if args is None else _read_json(args)
    elif args is not None:
        raise ValueError(f"expected no --args with weights of {kind}, got {args}")
    found = converted(state, kind, **given)
    for note in found.notes:
        notes.print(f"note: {note}", soft_wrap=True)
    save_pretrained(found.model, dst)
    count = sum(p.numel() for p in found.model.parameters())
    console.print(f"{found.source} to {type(found.model).__name__}, {count:,} parameters, in {dst}", soft_wrap=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The values by name that a JSON file holds."""
    if not path.is_file():
        raise FileNotFoundError(f"expected --args to be a JSON file, found none at {path}")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected --args to be a JSON file, got {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected --args to hold values by name, got {type(values).__name__} in {path}")
    return values
