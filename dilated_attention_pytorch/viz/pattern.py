"""Attention patterns and receptive fields, followed exactly through `DilatedPattern`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.members import ceil_div
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.reach import MOST_POSITIONS
from dilated_attention_pytorch.core.shift import check_room, layer_shifts
from dilated_attention_pytorch.viz.style import (
    FAINT,
    INK,
    binned,
    branch_colors,
    branch_label,
    label_positions,
    mark_query,
    style,
)

_EXACT = 256  # a matrix of more positions would be drawn finer than pixels
_MOST_CELLS = 1 << 30  # of a receptive field, a byte each
_MOST_LAYERS = 512  # in one picture: PNG has 65,535 rows of pixels
_TIMES = {1: "once", 2: "twice"}


def multiplicity(pattern: DilatedPattern, seq_len: int, *, head: int, is_causal: bool = False) -> NDArray[np.bool_]:
    """The keys of each query in each branch.

    Args:
        pattern, seq_len, is_causal: as in `pattern_figure`.
        head: key/value head.

    Returns:
        Bool `(num_branches, N, N)`, queries before keys; summed over branches, the multiplicity of a key.
    """
    seq_len = _check_length(seq_len)
    if (cells := len(pattern.branches) * seq_len**2) > _MOST_CELLS:
        raise ValueError(f"expected seq_len with at most {_MOST_CELLS:,} pairs in all branches, got {cells:,}")
    check.check_index("head", head, pattern.num_heads)
    positions = torch.arange(seq_len, device="cpu")
    member = pattern.membership(positions)[:, head]
    segment = torch.stack([positions // length for length, _ in pattern.branches])
    seen = (member[:, :, None] & member[:, None, :]) & (segment[:, :, None] == segment[:, None, :])
    if is_causal:
        seen &= positions[None, :] <= positions[:, None]
    return np.asarray(seen.numpy())


def shares(
    pattern: DilatedPattern, span: tuple[int, int], *, size: int, head: int, is_causal: bool = False
) -> NDArray[np.float64]:
    """The share of (query, key) pairs that attend, per branch and pair of bins: `(num_branches, bins, bins)`.

    The positions `[start, stop)` of `span` are cut into bins of `size`, the last one perhaps shorter. With bins of one
    position this is `multiplicity`, of a span alone.
    """
    start, stop = span
    positions = torch.arange(start, stop, device="cpu")
    bin_of = (positions - start) // size
    sizes = torch.bincount(bin_of).double()
    found = []
    for i, (length, _) in enumerate(pattern.branches):
        member = pattern.members(i, pattern.offset(i, head)).of(positions)
        segment = positions // length - start // length
        # (bins, segments): members
        held = torch.zeros(len(sizes), int(segment[-1]) + 1, dtype=torch.float64, device="cpu")
        held.index_put_((bin_of[member], segment[member]), held.new_ones(int(member.sum())), True)
        pairs = held @ held.T
        if is_causal:  # k members of one bin and segment make k (k + 1) / 2 pairs
            pairs = pairs.tril()
            pairs.diagonal().add_(held.sum(1)).div_(2)
        found.append(pairs / (sizes[:, None] * sizes))
    return torch.stack(found).numpy()


def bin_size(pattern: DilatedPattern, length: int) -> int:
    """The positions that one picture cell of a long span stands for.

    A multiple of all rates if that costs no more than half of the cells: then each cell holds its true share.
    """
    size, together = ceil_div(length, _EXACT), math.lcm(*pattern.dilation_rates)
    return ceil_div(size, together) * together if together <= size else size


def pattern_figure(
    pattern: DilatedPattern,
    seq_len: int,
    *,
    heads: Sequence[int] = (0,),
    spans: Sequence[tuple[int, int]] | None = None,
    is_causal: bool = False,
) -> Figure:
    """The attention matrix of each branch, and the multiplicity of each key over all of them.

    A span of up to 256 positions is drawn pair by pair. A longer one is drawn in cells of many pairs, shaded by how
    often a pair counts on average: 1/16 in a branch of rate 4. All long spans and branches share one logarithmic scale.

    Args:
        pattern: the branches.
        seq_len: N.
        is_causal: leave out later keys.
        heads: key/value heads; one row of pictures per head and span.
        spans: ranges of positions `[start, stop)`; the whole sequence by default.

    Raises:
        ValueError: a head or span out of range, a sequence too long to be drawn.
    """
    seq_len = _check_length(seq_len)
    chosen = list(spans) if spans is not None else [(0, seq_len)]
    for start, stop in chosen:
        if not 0 <= start < stop <= seq_len:
            raise ValueError(f"expected spans within [0, {seq_len}), got ({start}, {stop})")
    for head in heads:
        check.check_index("head", head, pattern.num_heads)
    rows = [(head, span) for head in heads for span in chosen]
    columns, most = len(pattern.branches) + 1, 0
    with style():
        figure = Figure(figsize=(2.4 * columns + 0.8, 2.75 * len(rows) + 0.5), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes, (head, span) in zip(grid, rows, strict=True):
            for ax, branch in zip(axes, pattern.branches, strict=False):
                ax.set_title(f"head {head}:  {branch_label(branch)}")
                _segment_lines(ax, branch[0], span)
            axes[-1].set_title(f"head {head}:  all branches")
            if span[1] - span[0] <= _EXACT:
                most = max(most, _draw_pairs(axes, pattern, span, head, is_causal))
            else:
                _draw_shares(axes, pattern, span, head, is_causal)
            axes[0].set_ylabel("query")
            for ax in axes:
                ax.tick_params(length=2, labelleft=ax is axes[0])
                label_positions(ax.xaxis, 4)
                label_positions(ax.yaxis, 4)
        for ax in grid[-1]:
            ax.set_xlabel("key")
        if most:
            names = [_TIMES.get(n, f"{n} times") for n in range(1, most + 1)]
            shades = _shades(len(pattern.branches))
            handles = [Patch(facecolor=c, label=f"counts {n}") for c, n in zip(shades, names, strict=False)]
            where = "all branches, pair by pair:"
            figure.legend(handles=handles, title=where, frameon=False, ncols=len(handles), loc="outside lower right")
    return figure


def neighbours_figure(
    pattern: DilatedPattern, seq_len: int, *, query: int, head: int = 0, is_causal: bool = False
) -> Figure:
    """The keys of one query, one row per branch, and the multiplicity of each in the one softmax.

    Args:
        pattern, seq_len, is_causal: as in `pattern_figure`; long sequences are drawn as shares of bins.
        query: its position.
        head: key/value head.
    """
    seq_len = _check_length(seq_len)
    query = check.check_index("query", query, seq_len)
    check.check_index("head", head, pattern.num_heads)
    with style():
        count = len(pattern.branches)
        colors = branch_colors(count)
        figure = Figure(figsize=(8.2, 0.42 * count + 1.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(count, 2.2))
        stacked, edges = binned(np.zeros(0, dtype=np.int64), seq_len)
        for i, keys in keys_by_branch(pattern, query, head, seq_len, is_causal=is_causal):
            counts, _ = binned(np.asarray(keys), seq_len)
            # The axis points down, so that the first branch is the top row; its bars grow up.
            top.stairs(i + 0.4 - counts * 0.8, edges, baseline=i + 0.4, fill=True, color=colors[i])
            bottom.stairs(stacked + counts, edges, baseline=stacked.copy(), fill=True, color=colors[i])
            stacked += counts
        for i in range(count):
            top.axhline(i + 0.4, color=FAINT, linewidth=0.8, zorder=0)
        top.set_yticks(range(count), map(branch_label, pattern.branches))
        top.set(ylim=(count - 0.5, -0.5), xlim=(0, seq_len))
        causal = ", causal" if is_causal else ""
        top.set_title(f"keys of query {query:,}, head {head}, of {seq_len:,} positions{causal}", loc="left")
        top.tick_params(labelbottom=False, length=0)
        times = "times" if len(stacked) == seq_len else "times (mean)"
        bottom.set(xlabel="key", ylabel=times, ylim=(0, max(1.0, float(stacked.max())) * 1.15))
        label_positions(bottom.xaxis)
        mark_query(top, query)
        mark_query(bottom, query)
    return figure


def receptive_field(
    pattern: DilatedPattern,
    seq_len: int,
    *,
    query: int,
    num_layers: int,
    is_causal: bool = True,
    segment_shift: object = 0,
) -> NDArray[np.bool_]:
    """The inputs that can change the output at one position, after each number of layers.

    A layer passes on its own position (the residual) and the keys of every head and branch; feed-forward networks mix
    heads, so each head of a layer sees what any head brought before.

    Args:
        pattern, seq_len, is_causal: as in `pattern_figure`, of every layer.
        query: the output's position.
        num_layers: L.
        segment_shift: of all layers, one per layer, or `"alternate"`.

    Returns:
        Bool `(num_layers + 1, N)`; row 0 is the query alone.

    Raises:
        ValueError: a query out of range, more layers and positions than there is memory for.
    """
    num_layers, seq_len = check.check_depth("num_layers", num_layers), _check_length(seq_len)
    if (num_layers + 1) * seq_len > _MOST_CELLS:
        raise ValueError(
            f"expected num_layers + 1 times seq_len of at most {_MOST_CELLS:,}, got {num_layers + 1:,} x {seq_len:,}"
        )
    query = check.check_index("query", query, seq_len)
    shifts = layer_shifts(segment_shift, pattern.segment_lengths, num_layers)
    check_room(shifts, seq_len)
    reached = torch.zeros(num_layers + 1, seq_len, dtype=torch.bool, device="cpu")
    reached[0, query] = True
    # From the output down: the last layer is the first step.
    for (before, after), shift in zip(pairwise(reached), reversed(shifts), strict=True):
        positions = torch.arange(shift, shift + seq_len, device="cpu")
        member = pattern.membership(positions)
        after |= before
        for branch, (length, _) in enumerate(pattern.branches):
            segment = positions // length - shift // length
            for _, heads in pattern.head_groups(branch):
                rows = member[branch, heads.start]  # heads of one offset keep the same rows
                # The last reached member of each segment: it sees the members up to it (causal), or all of them.
                last = torch.full((int(segment[-1]) + 1,), -1, device="cpu")
                queries = positions[rows & before]
                last.scatter_reduce_(0, segment[rows & before], queries, "amax")
                after |= rows & ((positions <= last[segment]) if is_causal else (last[segment] >= 0))
    return np.asarray(reached.numpy())


def receptive_figure(
    pattern: DilatedPattern,
    seq_len: int,
    *,
    query: int,
    num_layers: int,
    is_causal: bool = True,
    segment_shift: object = 0,
) -> Figure:
    """The receptive field, one row per number of layers, with its share of the positions.

    Arguments are those of `receptive_field`, with at most 512 layers; a long sequence is drawn as shares of bins.
    """
    num_layers = check.check_int("num_layers", num_layers, 1, _MOST_LAYERS + 1)
    how: dict[str, Any] = {"num_layers": num_layers, "is_causal": is_causal, "segment_shift": segment_shift}
    field = receptive_field(pattern, seq_len, query=query, **how)
    reachable = query + 1 if is_causal else seq_len
    with style():
        figure = Figure(figsize=(8.2, 0.45 * (num_layers + 1) + 1.1), layout="constrained")
        ax = figure.subplots()
        for layer, row in enumerate(field):
            share, edges = binned(np.nonzero(row)[0], seq_len)
            ax.bar(0, 0.8, reachable, bottom=layer - 0.4, color=FAINT, align="edge", zorder=0)  # the most it could hold
            ax.stairs(layer - 0.4 + share * 0.8, edges, baseline=layer - 0.4, fill=True, color=branch_colors(1)[0])
            text = f"{int(row.sum()):,} ({row.sum() / reachable:.1%})"
            ax.annotate(text, (1.01, layer), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
        names = ["the query itself", "1 layer", *(f"{n} layers" for n in range(2, num_layers + 1))]
        ax.set_yticks(range(num_layers + 1), names[: num_layers + 1])
        ax.set(xlim=(0, seq_len), ylim=(-0.6, num_layers + 0.6), xlabel="input position")
        label_positions(ax.xaxis)
        mark_query(ax, query)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        shape = ", ".join(f"{w:,}/{r}" for w, r in pattern.branches) + f"; {pattern.num_heads} heads"
        ax.set_title(f"inputs that reach position {query:,} (segment/rate: {shape})", loc="left")
    return figure


def _check_length(seq_len: object) -> int:
    """N, at least 1 and no more than can be drawn: each position is looked at."""
    return check.check_int("seq_len", seq_len, 1, MOST_POSITIONS + 1)


def keys_by_branch(
    pattern: DilatedPattern, query: int, head: int, seq_len: int, *, is_causal: bool = False
) -> list[tuple[int, range]]:
    """The keys of a query in each branch it belongs to."""
    branches = pattern.membership(torch.tensor(query, device="cpu"))[:, head].nonzero().flatten().tolist()
    return list(zip(branches, pattern.keys_of(query, head, seq_len, is_causal=is_causal), strict=True))


def _draw_pairs(axes: NDArray[Any], pattern: DilatedPattern, span: tuple[int, int], head: int, is_causal: bool) -> int:
    """Draw a span pair by pair and return the largest multiplicity of a pair, at least 1."""
    start, stop = span
    found = shares(pattern, span, size=1, head=head, is_causal=is_causal)
    total = found.sum(0)
    colors = [*([c] for c in branch_colors(len(found))), _shades(len(found))]
    for ax, values, shades in zip(axes, [*found, total], colors, strict=True):
        cmap = ListedColormap(["white", *shades])
        extent = (start, stop, stop, start)
        ax.imshow(values, cmap=cmap, vmin=-0.5, vmax=len(shades) + 0.5, interpolation="nearest", extent=extent)
    return max(1, int(total.max()))


def _draw_shares(
    axes: NDArray[Any], pattern: DilatedPattern, span: tuple[int, int], head: int, is_causal: bool
) -> None:
    """Draw a long span as shares of pairs, with the scale that all long spans of a pattern share."""
    start, stop = span
    size = bin_size(pattern, stop - start)
    found = shares(pattern, span, size=size, head=head, is_causal=is_causal)
    # From half of the thinnest branch's share, as on the diagonal of a causal one, to a key that every branch shows.
    most, rates = len(found), sorted({r for r in pattern.dilation_rates if r < stop - start} or {1})
    scale = LogNorm(0.5 / rates[-1] ** 2, most + 0.01)
    cmap = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.13, 1, 256)))
    end = start + found.shape[-1] * size
    for ax, values in zip(axes, [*found, found.sum(0)], strict=True):
        values = np.where(values > 0, values.clip(scale.vmin), np.nan)  # what no pair attends stays white
        image = ax.imshow(values, cmap=cmap, norm=scale, interpolation="nearest", extent=(start, end, end, start))
        ax.set(xlim=(start, stop), ylim=(stop, start))
    bar = axes[0].figure.colorbar(image, ax=axes, pad=0.01, shrink=0.9, label="times a pair counts (mean)")
    marks = {1.0 * most: str(most)} | {r**-2.0: f"1/{r**2}" if r > 1 else "1" for r in rates}
    bar.minorticks_off()
    bar.set_ticks(list(marks), labels=list(marks.values()))


def _segment_lines(ax: Axes, length: int, span: tuple[int, int]) -> None:
    start, stop = span
    if length * 17 < stop - start:
        return  # more lines than picture
    for edge in range(-(-(start + 1) // length) * length, stop, length):
        ax.axvline(edge, color=INK, linewidth=0.4)
        ax.axhline(edge, color=INK, linewidth=0.4)


def _shades(count: int) -> list[str]:
    """Colours from light to dark, one per branch."""
    light, dark = np.array([0.78, 0.80, 0.92]), np.array([0.10, 0.14, 0.50])
    steps = np.linspace(0, 1, max(2, count))[:count]
    return ["#" + "".join(f"{round(255 * c):02x}" for c in light + (dark - light) * s) for s in steps]
