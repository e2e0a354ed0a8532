"""`convert`: weights of another implementation as a model of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from dilated_attention_pytorch.cli.options import console, ints, notes

# Options of weights that have a shape of their own, and of each source beside them.
_SHAPE = ("num_heads", "segment_lengths", "dilation_rates")
_MORE = {
    "gigapath": ("max_wsi_size", "tile_size"),
    "torchscale-encoder": (),
    "torchscale-decoder": ("scale_embedding",),
}
_SOURCES = "gigapath, torchscale-encoder, torchscale-decoder, fkodom or fkodom-lm; by default the names tell."
_SCALED = "torchscale-decoder: it was built with no_scale_embedding=False."
_START = "fkodom: take the weights, though the numbers will be others."
_LENGTHS = "{}, one per branch; all but gigapath need them."


def convert(
    src: Annotated[Path, Argument(help="Weights: .pth, .pt or .bin of torch.save, or .safetensors.")],
    dst: Annotated[Path, Argument(help="Folder for model.safetensors and config.json.")],
    source: Annotated[str | None, Option("--from", help=_SOURCES)] = None,
    heads: Annotated[int | None, Option(help="Attention heads, which weights do not tell (gigapath: 16).")] = None,
    segments: Annotated[str | None, Option("--segments", "-w", help=_LENGTHS.format("Segment lengths"))] = None,
    rates: Annotated[str | None, Option("--rates", "-r", help=_LENGTHS.format("Dilation rates"))] = None,
    max_wsi_size: Annotated[int | None, Option(help="gigapath: side of the largest slide, 262144.")] = None,
    tile_size: Annotated[int | None, Option(help="gigapath: side of a tile, 256.")] = None,
    scale_embedding: Annotated[bool, Option("--scale-embedding", help=_SCALED)] = False,
    as_initialisation: Annotated[bool, Option("--as-initialisation", help=_START)] = False,
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
    given: dict[str, Any] = {
        "num_heads": heads,
        "segment_lengths": None if segments is None else ints("--segments", segments),
        "dilation_rates": None if rates is None else ints("--rates", rates),
        "max_wsi_size": max_wsi_size,
        "tile_size": tile_size,
        "scale_embedding": scale_embedding or None,
        "as_initialisation": as_initialisation or None,
    }
    takes = _SHAPE + _MORE.get(kind, ("as_initialisation",))
    for name, value in given.items():
        if value is not None and name not in takes:
            raise ValueError(f"expected no {name} with weights of {kind}, got {value}")
        if value is None and name in _SHAPE and kind != "gigapath":
            raise ValueError(f"expected {name} with weights of {kind}, which do not tell it, got none")
    found = converted(state, kind, **{name: value for name, value in given.items() if value is not None})
    for note in found.notes:
        notes.print(f"note: {note}", soft_wrap=True)
    save_pretrained(found.model, dst)
    count = sum(p.numel() for p in found.model.parameters())
    console.print(f"{found.source} to {type(found.model).__name__}, {count:,} parameters, in {dst}", soft_wrap=True)
