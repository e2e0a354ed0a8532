"""Colours and style of the pictures. Figures are made without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dilated_attention_pytorch.core.files import replace_file
from dilated_attention_pytorch.core.validation import quoted

INK = "#263238"
GRID = "#cfd8dc"
FAINT = "#eceff1"
FORMATS = (".png", ".svg", ".pdf")
# Distinct to colour-blind readers as well (Okabe and Ito, without its yellow and black).
_FEW_BRANCHES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")

STYLE: Any = {  # mypy knows no plain dict as rc parameters
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


def branch_colors(count: int, *, on_dark: bool = False) -> list[str]:
    """One colour per branch, none of them twice.

    More than six go from dark to light (viridis), so that lightness alone tells neighbouring branches apart.
    """
    if count <= len(_FEW_BRANCHES):
        return list(_FEW_BRANCHES[:count])
    low, high = (0.3, 1) if on_dark else (0, 0.9)
    return [to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(low, high, count))]


def branch_label(branch: tuple[int, int]) -> str:
    """Segment length and dilation rate of a branch."""
    return f"w = {branch[0]:,}, r = {branch[1]}"


def position_label(position: float) -> str:
    """A position on an axis, short where no digit is lost: 4,097, 25k, 1.5M."""
    if position >= 1_000_000 and position % 10_000 == 0:
        return f"{position / 1_000_000:g}M"
    if position >= 1_000 and position % 100 == 0:
        return f"{position / 1_000:g}k"
    return f"{position:,.0f}"


def label_positions(axis: Axis, most: int = 8) -> None:
    """Whole positions as an axis's ticks, few enough that their labels do not meet."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda position, _: position_label(position))


def mark_query(ax: Axes, query: int) -> None:
    """A dotted line through the middle of a position, in a frame without its upper right."""
    ax.axvline(query + 0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.spines[["top", "right"]].set_visible(False)


def style() -> AbstractContextManager[None]:
    """A context for making figures."""
    return matplotlib.rc_context(STYLE)


def check_format(path: Path, formats: Sequence[str] = FORMATS, name: str = "path") -> str:
    """The ending of a path in lower case; a ValueError for one that names no format written here."""
    if path.suffix.lower() not in formats:
        expected = " or ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))
        raise ValueError(f"expected {name} to end in {expected}, got {quoted(path.name)}")
    return path.suffix.lower()


def save(figure: Figure, path: Path | str, *, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: any of this package's.
        path: its ending names the format: `.png`, `.svg` or `.pdf`.
        dpi: of formats made of pixels.

    Returns:
        The path written.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    kind = check_format(path).removeprefix(".")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # they would carry the date
    with style(), matplotlib.rc_context({"svg.hashsalt": "dilated-attention-pytorch"}):  # SVG has random ids
        replace_file(path, lambda at: figure.savefig(at, format=kind, dpi=dpi, metadata=metadata))
    return path
