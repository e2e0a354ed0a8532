"""The chart of `patterns.py`: each line's rate in percent of dense cuDNN attention's, and its speed over `sdpa`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASSES = {"fwd": ("forward", "#0072b2"), "fwd+bwd": ("forward and backward", "#e69f00")}


def picture(outcome: dict[str, Any]) -> Figure:
    """A bar for each pass of each line, from what a result's JSON holds."""
    from matplotlib.figure import Figure

    machine, versions = outcome["machine"], outcome["versions"]
    rows = [row for row in outcome["rows"] if "ratio" in row]
    titles = list(dict.fromkeys(row["case"].rpartition(" ")[0] for row in rows))
    figure = Figure(figsize=(10, 1.3 + 0.5 * len(titles)), layout="constrained")
    figure.suptitle(
        f"{machine['gpu']}, bf16, torch {versions['torch']}, triton {versions['triton']}, {outcome['date']}", fontsize=9
    )
    axis = figure.subplots()
    for i, (name, (words, colour)) in enumerate(PASSES.items()):
        mine = {(row["case"], row["who"]): row for row in rows if row["case"].endswith(f" {name}")}
        ours = [row for (_, who), row in mine.items() if who == "auto"]
        heights = [titles.index(row["case"].rpartition(" ")[0]) + 0.38 * (i - 0.5) for row in ours]
        bars = axis.barh(heights, [100 * row["ratio"] for row in ours], 0.36, color=colour, label=words)
        over = [mine[row["case"], "sdpa"]["ms"] / row["ms"] for row in ours]
        labels = [f"{row['ratio']:.0%}, {row['ms']:.1f} ms, {x:.1f}x sdpa" for row, x in zip(ours, over, strict=True)]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
    axis.set_yticks(range(len(titles)), titles, fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.axvline(100, color="#b0bec5", linewidth=0.8, zorder=0)
    axis.set_xlim(0, 40 + max(100, *(100 * row["ratio"] for row in rows if row["who"] == "auto")))
    axis.set_xlabel("pattern's TFLOP/s in percent of dense cuDNN attention's at 65,536 tokens", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
