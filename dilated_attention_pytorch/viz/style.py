"""How the pictures look. Figures are made without pyplot, so they need no display and leave no global state."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#263238"
GRID = "#cfd8dc"
FAINT = "#eceff1"
# Distinct to colour-blind readers as well (Okabe and Ito, without its yellow and black).
BRANCHES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")

_STYLE: Any = {  # mypy knows no plain dict as rc parameters
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
}


def branch_color(branch: int) -> str:
    """The colour of a branch, the same in every picture."""
    return BRANCHES[branch % len(BRANCHES)]


def style() -> AbstractContextManager[None]:
    """A context in which figures are made."""
    return matplotlib.rc_context(_STYLE)


def save(figure: Figure, path: Path | str, *, dpi: int = 150) -> Path:
    """Writes a figure, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: any of this package's.
        path: its ending names the format, such as `.png` or `.svg`.
        dpi: of formats made of pixels.

    Returns:
        The path written.
    """
    path = Path(path)
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"expected a file name that ends in a picture format such as .png, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    # SVG would carry the date and random ids.
    with style(), matplotlib.rc_context({"svg.hashsalt": "dilated-attention-pytorch"}):
        figure.savefig(temporary, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(temporary, path)
    return path
