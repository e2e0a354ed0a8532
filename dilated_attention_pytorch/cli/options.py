"""Options that several subcommands share, and how they print."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from typer import Option

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.types import Offsets


class _Console(Console):
    """A console whose reader may leave: what follows goes nowhere, and the command goes on."""

    def on_broken_pipe(self) -> None:
        """Point the stream elsewhere, where rich would end the process: Python flushes it once more at the end."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich prints; a terminal that was closed is a reader that left."""
        try:
            super().print(*objects, **how)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.on_broken_pipe()


# No markup: paths and texts of the user hold brackets and colons of their own.
console = _Console(highlight=False, markup=False, emoji=False)
notes = _Console(stderr=True, highlight=False, markup=False, emoji=False)

Lengths = Annotated[str, Option("--segments", "-w", help="Segment lengths, one per branch: 2048,4096,8192.")]
Rates = Annotated[str, Option("--rates", "-r", help="Dilation rates, one per branch: 1,2,4.")]
Heads = Annotated[int, Option(help="Key/value heads.")]
HeadDim = Annotated[int, Option(min=1, help="Width of a head.")]
OffsetRule = Annotated[str, Option("--offsets", help="modulo (the paper) or blocked (published checkpoints).")]
Length = Annotated[int, Option("--length", "-n", help="Positions in the sequence.")]
Causal = Annotated[bool, Option("--causal/--bidirectional", help="Hide later positions, or attend in both directions.")]
Dtype = Annotated[str, Option(help="Of the tensors: fp32, bf16 or fp16.")]
Layers = Annotated[int, Option("--layers", min=1, max=65536, help="Layers of the model.")]
Shift = Annotated[str, Option("--shift", help="Segment shift of the layers: a number, one per layer, or alternate.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON in place of tables.")]

# Of the commands on slides.
_CHECKPOINT = "Weights: a file, a folder of save_pretrained, or hf-hub:ORG/NAME."
_SIZE = "Side of a tile in the unit of the coordinates, for files that do not tell."
_COORDS = "Folder of files with coordinates, where feature files have none: CLAM's or TRIDENT's patches."
_GRID = "tile: places counted in tiles, as TRIDENT does. stride: overlapping tiles get a place each."
_POOL = "The mean over tiles, or the cls token; by default as the checkpoint's config says."
Checkpoint = Annotated[str, Option("--checkpoint", help=_CHECKPOINT)]
TileSize = Annotated[float | None, Option("--patch-size-level0", help=_SIZE)]
CoordsFolder = Annotated[Path | None, Option("--coords", help=_COORDS)]
Grid = Annotated[str, Option("--grid", help=_GRID)]
Pooling = Annotated[bool | None, Option("--global-pool/--cls", help=_POOL)]
SlideSide = Annotated[int | None, Option("--max-wsi-size", help="Side of the largest slide in pixels, 262144.")]
Device = Annotated[str | None, Option("--device", help="cpu, cuda or cuda:1; by default CUDA where there is one.")]

PAPER_LENGTHS, PAPER_RATES = "2048,4096,8192,16384,32768", "1,2,4,6,12"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ints(name: str, text: str) -> tuple[int, ...]:
    """Ints with commas between them; anything else is a ValueError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected {name} to be ints with commas between them, got {check.quoted(text)}") from None


def shift(text: str) -> int | tuple[int, ...] | str:
    """What `--shift` says: a number, numbers with commas between them, or a word."""
    if text == "alternate":
        return text
    found = ints("--shift", text)
    return found[0] if len(found) == 1 else found


def refuse(context: Any, names: Iterable[str], where: str) -> None:
    """Raise a ValueError for options that were given where they have no effect."""
    for param in context.command.params:
        source = context.get_parameter_source(param.name)
        if param.name in names and source is not None and source.name == "COMMANDLINE":
            value = context.params[param.name]
            shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else "it" if value is True else value
            raise ValueError(f"expected no {max(param.opts, key=len)} {where}, got {shown}")


def pairs(settings: Sequence[str]) -> dict[str, str]:
    """What `--set NAME=VALUE` says, by name."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"expected --set NAME=VALUE, got {check.quoted(setting)}")
    return {name.strip(): value.strip() for name, _, value in (setting.partition("=") for setting in settings)}


def make_pattern(segments: str, rates: str, heads: int, offsets: str) -> DilatedPattern:
    """The pattern that the options describe."""
    rule: Offsets = offsets  # type: ignore[assignment]  # checked by DilatedPattern, with the library's own message
    return DilatedPattern(ints("--segments", segments), ints("--rates", rates), heads, rule)


def check_dtype(text: str, known: dict[str, torch.dtype] = _DTYPES) -> torch.dtype:
    """The dtype that `--dtype` names."""
    if text not in known:
        raise ValueError(f"expected --dtype to be one of {sorted(known)}, got {check.quoted(text)}")
    return known[text]


def check_device(text: str) -> str:
    """A device that this machine has, as torch names it; a ValueError for any other."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"expected --device to be cpu, cuda or cuda:N, got {check.quoted(text)}")
    count = torch.cuda.device_count()
    if text != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(
            f"expected a --device of this machine, which has {count} CUDA devices, got {check.quoted(text)}"
        )
    return text


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0) -> None:
    """Print rows under a title; the first `left` columns are text, the others numbers. Empty names are not shown."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def human_bytes(count: float) -> str:
    """A number of bytes as people read it."""
    return _human(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"), 1)


def human_count(count: float) -> str:
    """A large number as people read it."""
    return _human(count, 1000, ("", " K", " M", " G", " T", " P"), 2)


def _human(count: float, base: int, units: Sequence[str], digits: int) -> str:
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:,.{digits if power else 0}f}{units[power]}"
