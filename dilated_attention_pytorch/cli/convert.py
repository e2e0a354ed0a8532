"""`convert`: weights of another implementation as a model of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_attention_pytorch.cli.options import console, ints, notes

_MORE = {
    "gigapath": ("--max-wsi-size", "--tile-size"),
    "torchscale-encoder": (),
    "torchscale-decoder": ("--scale-embedding",),
}
_LENGTHS = "{}, one per branch; all but gigapath need them."


def convert(
    src: Annotated[Path, typer.Argument(help="Weights: .pth, .pt or .bin of torch.save, or .safetensors.")],
    dst: Annotated[Path, typer.Argument(help="Folder for model.safetensors and config.json.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="gigapath, torchscale-encoder, torchscale-decoder, fkodom or fkodom-lm; by default the names tell.",
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, which weights do not tell (gigapath: 16).")
    ] = None,
    segments: Annotated[str | None, typer.Option("--segments", "-w", help=_LENGTHS.format("Segment lengths"))] = None,
    rates: Annotated[str | None, typer.Option("--rates", "-r", help=_LENGTHS.format("Dilation rates"))] = None,
    max_wsi_size: Annotated[int | None, typer.Option(help="gigapath: side of the largest slide, 262144.")] = None,
    tile_size: Annotated[int | None, typer.Option(help="gigapath: side of a tile, 256.")] = None,
    scale_embedding: Annotated[
        bool, typer.Option("--scale-embedding", help="torchscale-decoder: it was built with no_scale_embedding=False.")
    ] = False,
    as_initialisation: Annotated[
        bool, typer.Option("--as-initialisation", help="fkodom: take the weights, though the numbers will be others.")
    ] = False,
) -> None:
    """Convert weights of Prov-GigaPath's slide encoder, torchscale's LongNet or fkodom's LongNet."""
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.models.checkpoint import save_pretrained
    from dilated_attention_pytorch.models.convert import Source, sniff
    from dilated_attention_pytorch.models.convert import convert as converted
    from dilated_attention_pytorch.models.weights import read_state

    if source is not None:
        check_choice("--from", source, Source)
    state = read_state(src)
    kind: Any = source or sniff(state)
    given: dict[str, tuple[str, Any]] = {
        "--heads": ("num_heads", heads),
        "--segments": ("segment_lengths", None if segments is None else ints("--segments", segments)),
        "--rates": ("dilation_rates", None if rates is None else ints("--rates", rates)),
        "--max-wsi-size": ("max_wsi_size", max_wsi_size),
        "--tile-size": ("tile_size", tile_size),
        "--scale-embedding": ("scale_embedding", scale_embedding or None),
        "--as-initialisation": ("as_initialisation", as_initialisation or None),
    }
    common = ("--heads", "--segments", "--rates")
    takes = common + _MORE.get(kind, ("--as-initialisation",))
    for option, (_, value) in given.items():
        if value is not None and option not in takes:
            raise ValueError(f"expected no {option} with weights of {kind}, got {value}")
        if value is None and option in common and kind != "gigapath":
            raise ValueError(f"expected {option} with weights of {kind}, which do not tell it, got none")
    found = converted(state, kind, **{name: value for name, value in given.values() if value is not None})
    for note in found.notes:
        notes.print(f"note: {note}", soft_wrap=True)
    save_pretrained(found.model, dst)
    count = sum(p.numel() for p in found.model.parameters())
    console.print(f"{found.source} to {type(found.model).__name__}, {count:,} parameters, in {dst}", soft_wrap=True)
