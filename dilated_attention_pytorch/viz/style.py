"""Colours and style of the pictures. Figures are made without pyplot: no display, no global state."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dilated_attention_pytorch.core.files import replace_file
from dilated_attention_pytorch.core.validation import quoted

INK = "#263238"
GRID = "#cfd8dc"
FAINT = "#eceff1"
# Distinct to colour-blind readers as well (Okabe and Ito, without its yellow and black).
BRANCHES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")

_STYLE: Any = {  # mypy knows no plain dict as rc parameters
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}


def binned(positions: NDArray[np.int64], seq_len: int, most: int = 1024) -> tuple[NDArray[Any], NDArray[Any]]:
    """The share of each bin of a sequence that some positions fill, and the edges of the bins."""
    edges = np.linspace(0, seq_len, min(seq_len, most) + 1)
    return np.histogram(positions, bins=edges)[0] / np.diff(edges), edges


def branch_color(branch: int) -> str:
    """The colour of a branch, the same in every picture."""
    return BRANCHES[branch % len(BRANCHES)]


def branch_label(branch: tuple[int, int]) -> str:
    """Segment length and dilation rate of a branch."""
    return f"w = {branch[0]:,}, r = {branch[1]}"


def mark_query(ax: Axes, query: int) -> None:
    """A dotted line through the middle of a position, in a frame without its upper right."""
    ax.axvline(query + 0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.spines[["top", "right"]].set_visible(False)


def style() -> AbstractContextManager[None]:
    """A context for making figures."""
    return matplotlib.rc_context(_STYLE)


def save(figure: Figure, path: Path | str, *, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: any of this package's.
        path: its ending names the format, such as `.png` or `.svg`.
        dpi: of formats made of pixels.

    Returns:
        The path written.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"expected path to end in a picture format such as .png, got {quoted(path.name)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if kind == "svg" else None  # SVG would carry the date, and random ids
    with style(), matplotlib.rc_context({"svg.hashsalt": "dilated-attention-pytorch"}):
        replace_file(path, lambda at: figure.savefig(at, format=kind, dpi=dpi, metadata=metadata))
    return path
