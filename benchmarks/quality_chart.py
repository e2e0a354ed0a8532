"""The chart of `quality.py`: means of seeds, with a band from the least to the most of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLOURS = {
    "dense": "#999999",
    "fixed": "#e69f00",
    "fixed+shift": "#d55e00",
    "geometric": "#0072b2",
    "geometric+shift": "#009e73",
    "geometric from 8,192": "#cc79a7",
}


def lines(mine: list[dict[str, Any]], rows: list[dict[str, Any]]) -> tuple[list[dict[int, float]], ...]:
    """One attention's lines, each a dict per seed: its longest context's gain and retrieval, and bits by context.

    The gain at a position is over the dense model of the shortest context and the same seed, on the same bytes.
    """
    shortest, longest = min(row["context"] for row in rows), max(row["context"] for row in mine)
    base = {r["seed"]: r["by_position"] for r in rows if r["attention"] == "dense" and r["context"] == shortest}
    gains, found = [], []
    overall: dict[int, dict[int, float]] = {}
    for row in mine:
        overall.setdefault(row["seed"], {})[row["context"]] = row["bits_per_byte"]
        if row["context"] == longest > shortest:
            found.append({int(distance): share for distance, share in row["retrieved"].items()})
            if row["seed"] in base:
                here, before = (positions[str(longest)] for positions in (row["by_position"], base[row["seed"]]))
                gains.append({int(name.split("-")[1]): bits - before[name] for name, bits in here.items()})
    return gains, found, list(overall.values())


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """What the longest context gains, by position; what it retrieves, by distance; bits per byte, by context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), constrained_layout=True)
    shortest, longest = (pick(row["context"] for row in rows) for pick in (min, max))
    for attention in sorted({row["attention"] for row in rows}):
        mine = [row for row in rows if row["attention"] == attention]
        most = max(row["context"] for row in mine)
        name = attention if most == longest else f"{attention}, at most {most:,}"
        for axis, seeds in zip(axes, lines(mine, rows), strict=True):
            ends = sorted(set().union(*seeds))
            columns = [[seed[x] for seed in seeds if x in seed] for x in ends]
            means = [statistics.fmean(column) for column in columns]
            axis.semilogx(ends, means, "o-", color=COLOURS[attention], markersize=3, label=name)
            least, highest = ([pick(column) for column in columns] for pick in (min, max))
            axis.fill_between(ends, least, highest, color=COLOURS[attention], alpha=0.2, linewidth=0)
    over = f"bits per byte over dense at {shortest:,}"
    axes[0].set(xlabel="position in the context, up to", ylabel=over, title=f"context {longest:,}, the same bytes")
    axes[0].axhline(0, color="black", linewidth=0.5)
    axes[1].set(xlabel="distance of the planted line", ylabel="digits right", ylim=(-0.03, 1.03), title="retrieval")
    axes[1].axhline(0.1, color="black", linewidth=0.5, linestyle=":")  # a digit by chance
    axes[2].set(xlabel="context", ylabel="validation bits per byte", title="all positions")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
