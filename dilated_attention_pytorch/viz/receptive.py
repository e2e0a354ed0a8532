"""Receptive fields of a LongNet through its layers, followed exactly through `DilatedPattern`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.viz.style import FAINT, INK, binned, branch_color, style


def receptive_field(
    pattern: DilatedPattern, seq_len: int, *, query: int, num_layers: int, is_causal: bool = True
) -> NDArray[np.bool_]:
    """The inputs that can change the output at one position, after each number of layers.

    A layer passes on its own position (the residual) and the keys of every head and branch; feed-forward networks mix
    heads, so each head of a layer sees what any head brought before.

    Args:
        pattern: of every layer.
        seq_len: N.
        query: the output's position.
        num_layers: L.
        is_causal: hide later positions.

    Returns:
        Bool `(num_layers + 1, N)`; row 0 is the query alone.
    """
    num_layers = check.check_positive_int("num_layers", num_layers)
    seq_len = check.check_positive_int("seq_len", seq_len)
    query = check.check_index("query", query, seq_len)
    positions = torch.arange(seq_len)
    member = pattern.membership(positions)
    reached = torch.zeros(num_layers + 1, seq_len, dtype=torch.bool)
    reached[0, query] = True
    for before, after in pairwise(reached):
        after |= before
        for branch, (length, _) in enumerate(pattern.branches):
            segment = positions // length
            for _, heads in pattern.head_groups(branch):
                rows = member[branch, heads.start]  # heads of one offset keep the same rows
                # The last reached member of each segment: it sees the members up to it (causal), or all of them.
                last = torch.full((int(segment[-1]) + 1,), -1)
                queries = positions[rows & before]
                last.scatter_reduce_(0, queries // length, queries, "amax")
                after |= rows & ((positions <= last[segment]) if is_causal else (last[segment] >= 0))
    return np.asarray(reached.numpy())


def receptive_figure(
    pattern: DilatedPattern, seq_len: int, *, query: int, num_layers: int, is_causal: bool = True
) -> Figure:
    """The receptive field, one row per number of layers, with its share of the positions.

    Arguments are those of `receptive_field`; a long sequence is drawn as shares of bins.
    """
    field = receptive_field(pattern, seq_len, query=query, num_layers=num_layers, is_causal=is_causal)
    reachable = query + 1 if is_causal else seq_len
    with style():
        figure = Figure(figsize=(8.2, 0.45 * (num_layers + 1) + 1.1), layout="constrained")
        ax = figure.subplots()
        for layer, row in enumerate(field):
            share, edges = binned(np.nonzero(row)[0], seq_len)
            ax.bar(0, 0.8, reachable, bottom=layer - 0.4, color=FAINT, align="edge", zorder=0)  # the most it could hold
            ax.stairs(layer - 0.4 + share * 0.8, edges, baseline=layer - 0.4, fill=True, color=branch_color(0))
            text = f"{int(row.sum()):,} ({row.sum() / reachable:.1%})"
            ax.annotate(text, (1.01, layer), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
        names = ["the query itself", "1 layer", *(f"{n} layers" for n in range(2, num_layers + 1))]
        ax.set_yticks(range(num_layers + 1), names[: num_layers + 1])
        ax.set(xlim=(0, seq_len), ylim=(-0.6, num_layers + 0.6), xlabel="input position")
        ax.axvline(query + 0.5, color=INK, linewidth=0.8, linestyle=":")
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        shape = ", ".join(f"{w:,}/{r}" for w, r in pattern.branches) + f"; {pattern.num_heads} heads"
        ax.set_title(f"inputs that reach position {query:,} (segment/rate: {shape})", loc="left")
    return figure
