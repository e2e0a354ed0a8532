"""The loss curve of a run, from its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dilated_attention_pytorch.core.files import parse_json
from dilated_attention_pytorch.viz.style import GRID, INK, branch_colors, style

TRAINING, _, _, VALIDATION = branch_colors(4)


def loss_figure(metrics: Path | str) -> Figure:
    """Bits per byte by step: each logged step, their running mean, and the validation text.

    Args:
        metrics: a run's `metrics.jsonl`.

    Raises:
        ValueError: a line that is not a JSON object, a file without a line of training; both name the file.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(Path(metrics).read_bytes().splitlines(), 1):
        try:
            lines.append(dict(parse_json(text.decode())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected a JSON object in line {number} of {metrics}, got: {error}") from error
    train = [(line["step"], line["bpb"]) for line in lines if "bpb" in line]
    val = [(line["step"], line["val_bpb"]) for line in lines if "val_bpb" in line]
    if not train:
        raise ValueError(f"expected lines with 'bpb' in {metrics}, found none in {len(lines)} lines")
    steps, losses = (np.array(column, dtype=float) for column in zip(*train, strict=True))
    with style():
        figure = Figure(figsize=(6.8, 3.8), layout="constrained")
        ax = figure.subplots()
        ax.plot(steps, losses, color=TRAINING, alpha=0.25, linewidth=0.8, label="training, each step")
        width = max(1, len(losses) // 20)
        if width > 1:
            means = [losses[max(0, end - width) : end].mean() for end in range(1, len(losses) + 1)]
            ax.plot(steps, means, color=TRAINING, label=f"training, mean of {width}")
        if val:
            x, y = zip(*val, strict=True)
            ax.plot(x, y, color=VALIDATION, marker="o", markersize=4, label="validation files")
            ax.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), (0, 7), textcoords="offset points", ha="center", color=INK)
        # The first steps, near 8 bits, would flatten all the rest.
        top = float(np.quantile(losses, 0.98)) if len(losses) > 50 else float(losses.max())
        ax.set(xlabel="step", ylabel="bits per byte", xlim=(0, steps[-1] * 1.03))
        ax.set_ylim(min(losses.min(), *(v for _, v in val), top) * 0.9, top * 1.05)
        ax.grid(color=GRID, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return figure
