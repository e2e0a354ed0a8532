"""Draws docs/img from `DilatedPattern`, so that no picture can say anything but what the code does.

    python docs/figures.py [FOLDER]

The same code and the same matplotlib give the same bytes; tests/project/test_project.py compares them with what is
committed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.viz import neighbours_figure, save_page
from dilated_attention_pytorch.viz.style import FAINT, GRID, INK, STYLE, branch_colors

HERE = Path(__file__).parent
N = 32
PATTERN = DilatedPattern((8, 16, 32), (1, 2, 4), num_heads=4)

BRANCHES = branch_colors(len(PATTERN.branches))
COUNTS = ("#c5cae9", "#7986cb", "#1a237e")
SHARDS = ("#0072b2", "#d55e00")

FIXED = STYLE | {
    "svg.hashsalt": "dilated-attention-pytorch",  # element ids are random without it
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
}


def multiplicity(head: int, *, is_causal: bool = False) -> np.ndarray:
    """How often each key counts for each query, a layer for each branch: `(num_branches, N, N)`."""
    counts = np.zeros((len(PATTERN.branches), N, N), dtype=int)
    member = PATTERN.membership(torch.arange(N))[:, head]
    for n in range(N):
        # keys_of lists only the branches that the query belongs to, in order.
        mine = [i for i in range(len(PATTERN.branches)) if member[i, n]]
        for i, keys in zip(mine, PATTERN.keys_of(n, head, N, is_causal=is_causal), strict=True):
            counts[i, n, list(keys)] += 1
    return counts


def squares(ax: Axes, cells: np.ndarray, color: str) -> None:
    """Fills the true cells of a (row, column) array, as one outline: small files, sharp at any size."""
    corners = [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94), (0.06, 0.06)]
    codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY]
    rows, columns = np.nonzero(cells)
    if len(rows) == 0:
        return
    points = [(x + dx, y + dy) for y, x in zip(rows, columns, strict=True) for dx, dy in corners]
    ax.add_patch(PathPatch(Outline(points, codes * len(rows)), facecolor=color, linewidth=0))


def frame(ax: Axes, rows: int, columns: int) -> None:
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.tick_params(length=0)


def segment_lines(ax: Axes, length: int, *, rows: bool) -> None:
    for edge in range(0, N + 1, length):
        ax.axvline(edge, color=INK, linewidth=0.7)
        if rows:
            ax.axhline(edge, color=INK, linewidth=0.7)


def attention_axes(ax: Axes, title: str) -> None:
    frame(ax, N, N)
    ax.set_title(title)
    ticks = range(0, N, 8)
    ax.set_xticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    ax.set_yticks([t + 0.5 for t in ticks], [str(t) for t in ticks])


def draw_counts(ax: Axes, counts: np.ndarray) -> None:
    for times, color in enumerate(COUNTS, start=1):
        squares(ax, counts == times, color)


def count_legend(figure: Figure, **where: object) -> None:
    names = ("counts once", "twice", "three times")
    handles = [Patch(facecolor=c, label=n) for c, n in zip(COUNTS, names, strict=True)]
    figure.legend(handles=handles, frameon=False, ncols=3, **where)


def membership() -> Figure:
    """Which positions each head keeps, branch by branch."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    member = PATTERN.membership(torch.arange(N)).numpy()
    rows = figure.subplots(len(PATTERN.branches), 1)
    for i, (ax, (length, rate)) in enumerate(zip(rows, PATTERN.branches, strict=True)):
        frame(ax, PATTERN.num_heads, N)
        squares(ax, ~member[i], FAINT)
        squares(ax, member[i], BRANCHES[i])
        segment_lines(ax, length, rows=False)
        ax.set_title(f"branch {i}:  w = {length},  r = {rate}", loc="left")
        ax.set_yticks([h + 0.5 for h in range(PATTERN.num_heads)], [f"head {h}" for h in range(PATTERN.num_heads)])
        last = i == len(PATTERN.branches) - 1
        ax.set_xticks([t + 0.5 for t in range(0, N, 4)], [str(t) for t in range(0, N, 4)] if last else [])
        if last:
            ax.set_xlabel("position")
    return figure


def attention() -> Figure:
    """Who attends to whom: each branch alone, then all of them, for two heads."""
    heads = (0, 1)
    figure = Figure(figsize=(8.2, 4.9), layout="constrained")
    grid = figure.subplots(len(heads), len(PATTERN.branches) + 1)
    for row, head in zip(grid, heads, strict=True):
        counts = multiplicity(head)
        for i, (length, rate) in enumerate(PATTERN.branches):
            attention_axes(row[i], f"head {head}:  w = {length}, r = {rate}")
            segment_lines(row[i], length, rows=True)
            squares(row[i], counts[i] > 0, BRANCHES[i])
        attention_axes(row[-1], f"head {head}:  all branches")
        draw_counts(row[-1], counts.sum(0))
        row[0].set_ylabel("query")
    for ax in grid[-1]:
        ax.set_xlabel("key")
    count_legend(figure, loc="outside lower right")
    return figure


def multiset() -> Figure:
    """The keys of one query in each branch, and how often each counts: what `show neighbours` draws."""
    return neighbours_figure(PATTERN, N, query=20)


def partial() -> Figure:
    """The causal pattern, and its keys split between two ranges of the sequence."""
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    full, causal, split = figure.subplots(1, 3)
    attention_axes(full, "full")
    draw_counts(full, multiplicity(0).sum(0))
    attention_axes(causal, "causal")
    counts = multiplicity(0, is_causal=True).sum(0)
    draw_counts(causal, counts)
    attention_axes(split, "causal, keys on two shards")
    for shard, color in enumerate(SHARDS):
        held = np.zeros_like(counts, dtype=bool)
        held[:, shard * N // 2 : (shard + 1) * N // 2] = True
        squares(split, (counts > 0) & held, color)
    split.axvline(N / 2, color=INK, linewidth=0.9)
    for ax in (full, causal, split):
        ax.set_xlabel("key")
    full.set_ylabel("query")
    count_legend(figure, loc="outside lower left")
    return figure


def cost() -> Figure:
    """Keys per query against the length of the sequence, counted by the pattern itself."""
    lengths, rates = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
    pattern = DilatedPattern(lengths, rates, num_heads=16)
    seq_lens = [1 << e for e in range(10, 21)]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.subplots()

    def mean_keys(pattern: DilatedPattern, sizes: Sequence[int]) -> list[float]:
        return [pattern.pairs(n) / (n * pattern.num_heads) for n in sizes]

    ax.plot(seq_lens, seq_lens, color=SHARDS[1], label="dense attention: N")
    ax.plot(
        seq_lens, mean_keys(pattern, seq_lens), color=BRANCHES[0], marker="o", markersize=3, label="w = 2048 ... 32768"
    )
    ax.axhline(pattern.keys_per_query, color=INK, linewidth=0.8, linestyle=":")
    note = f"sum of w/r² = {pattern.keys_per_query:,.0f}"
    ax.annotate(note, (seq_lens[-1], pattern.keys_per_query), (0, 5), textcoords="offset points", ha="right")
    ax.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel="keys per query and head (mean)")
    shown = seq_lens[::2]
    ax.set_xticks(shown, [f"{n // 1024}k" if n < 1 << 20 else "1M" for n in shown])
    ax.minorticks_off()
    ax.grid(color=GRID, linewidth=0.5)
    ax.legend(frameon=False)
    return figure


def reach() -> Figure:
    """How far back the median position reads, by layers: N is 32 of the largest segments of the fixed pattern."""
    n, layers = 16_384, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    fixed = DilatedPattern((32, 64, 128, 256, 512), (1, 2, 4, 8, 16), num_heads=16)
    lines = {
        "fixed segments": (fixed, 0),
        'fixed, segment_shift="alternate"': (fixed, "alternate"),
        "geometric": (DilatedPattern.geometric(n, 32, num_heads=16), 0),
    }
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.subplots()
    for color, (name, (pattern, shift)) in zip(BRANCHES, lines.items(), strict=False):
        far = [pattern.reach(count, n, segment_shift=shift).median / 512 for count in layers]
        ax.plot(layers, far, color=color, marker="o", markersize=3, label=name)
    ax.axhline(16, color=INK, linewidth=0.8, linestyle=":")
    ax.annotate("everything before it", (layers[-1], 16), (0, 4), textcoords="offset points", ha="right")
    ax.set(xscale="log", yscale="log", xlabel="layers", ylabel="median reach, in largest segments")
    ax.set_xticks(layers, [str(x) for x in layers])
    ax.set_ylim(0.4, 22)
    ax.set_yticks((0.5, 1, 2, 4, 8, 16), ("½", "1", "2", "4", "8", "16"))
    ax.minorticks_off()
    ax.grid(color=GRID, linewidth=0.5)
    ax.legend(frameon=False, loc=(0.46, 0.12))
    return figure


FIGURES = (membership, attention, multiset, partial, cost, reach)


def main(folder: Path = HERE / "img") -> list[Path]:
    """Draws every figure and returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(FIXED):
        for draw in FIGURES:
            path = folder / f"{draw.__name__}.svg"
            # The date is the one thing matplotlib would add that differs from run to run.
            draw().savefig(path, metadata={"Date": None})
            written.append(path)
    # The pattern of docs/concepts.md, to explore.
    pattern = DilatedPattern((8, 32), (1, 4), num_heads=4)
    return [*written, save_page(pattern, 64, folder / "pattern.html", is_causal=True)]


if __name__ == "__main__":
    for path in main(*map(Path, sys.argv[1:2])):
        print(path)
