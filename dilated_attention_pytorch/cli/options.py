"""Options that several subcommands share."""

from __future__ import annotations

import re
from typing import Annotated

import torch
import typer
from rich.console import Console

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.types import Offsets

console = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

Lengths = Annotated[str, typer.Option("--segments", "-w", help="Segment lengths, one a branch: 2048,4096,8192.")]
Rates = Annotated[str, typer.Option("--rates", "-r", help="Dilation rates, one a branch: 1,2,4.")]
Heads = Annotated[int, typer.Option(help="Key/value heads.")]
OffsetRule = Annotated[str, typer.Option("--offsets", help="modulo (the paper) or blocked (published checkpoints).")]
Length = Annotated[int, typer.Option("--length", "-n", help="Positions in the sequence.")]
Causal = Annotated[bool, typer.Option("--causal/--full", help="Hide later positions, or not.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]

PAPER_LENGTHS, PAPER_RATES = "2048,4096,8192,16384,32768", "1,2,4,6,12"


def ints(name: str, text: str) -> tuple[int, ...]:
    """Ints with commas between them.

    Raises:
        ValueError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected {name} to be ints with commas between them, got {text!r}") from None


def make_pattern(segments: str, rates: str, heads: int, offsets: str) -> DilatedPattern:
    """The pattern that the options describe."""
    rule: Offsets = offsets  # type: ignore[assignment]  # checked by DilatedPattern, with the library's own message
    return DilatedPattern(ints("--segments", segments), ints("--rates", rates), heads, rule)


def check_device(text: str) -> str:
    """A device that this machine has, as torch names it.

    Raises:
        ValueError: another text, or CUDA where there is none.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"expected --device to be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if text != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"expected a --device of this machine, which has {count} CUDA devices, got {text!r}")
    return text


def human_bytes(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    """A large number as people read it."""
    for unit in ("", " K", " M", " G", " T", " P"):
        if count < 1000 or unit == " P":
            return f"{count:,.0f}" if unit == "" else f"{count:,.2f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")
