"""Attention patterns and receptive fields, followed exactly through `DilatedPattern`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import layer_shifts
from dilated_attention_pytorch.viz.style import FAINT, INK, binned, branch_color, branch_label, mark_query, style

_EXACT = 256  # a matrix of more positions would be drawn finer than pixels
_TIMES = {1: "once", 2: "twice"}


def multiplicity(pattern: DilatedPattern, seq_len: int, *, head: int, is_causal: bool = False) -> NDArray[np.bool_]:
    """The keys of each query in each branch.

    Args:
        pattern, seq_len, is_causal: as in `pattern_figure`.
        head: key/value head.

    Returns:
        Bool `(num_branches, N, N)`, queries before keys; summed over branches, the multiplicity of a key.
    """
    seq_len = check.check_positive_int("seq_len", seq_len)
    check.check_index("head", head, pattern.num_heads)
    positions = torch.arange(seq_len)
    member = pattern.membership(positions)[:, head]
    segment = torch.stack([positions // length for length, _ in pattern.branches])
    seen = (member[:, :, None] & member[:, None, :]) & (segment[:, :, None] == segment[:, None, :])
    if is_causal:
        seen &= positions[None, :] <= positions[:, None]
    return np.asarray(seen.numpy())


def shares(
    pattern: DilatedPattern, span: tuple[int, int], *, bins: int, head: int, is_causal: bool = False
) -> NDArray[np.float64]:
    """The share of (query, key) pairs that attend, per branch and pair of bins: `(num_branches, bins, bins)`.

    Positions `[start, stop)` of `span` are cut into bins, none of them empty. Causality halves the pairs of a bin with
    itself.
    """
    start, stop = span
    positions = torch.arange(start, stop)
    bin_of = (positions - start) * bins // (stop - start)
    sizes = torch.bincount(bin_of, minlength=bins).double()
    result = np.zeros((len(pattern.branches), bins, bins))
    for i, (length, _) in enumerate(pattern.branches):
        member = pattern.membership(positions)[i, head]
        segment = positions // length - start // length
        held = torch.zeros(bins, int(segment[-1]) + 1, dtype=torch.float64)
        held.index_put_((bin_of[member], segment[member]), torch.ones(int(member.sum()), dtype=torch.float64), True)
        result[i] = (held @ held.T / (sizes[:, None] * sizes[None, :])).numpy()
    if is_causal:
        result *= np.tri(bins) - 0.5 * np.eye(bins)
    return result


def pattern_figure(
    pattern: DilatedPattern,
    seq_len: int,
    *,
    heads: Sequence[int] = (0,),
    spans: Sequence[tuple[int, int]] | None = None,
    is_causal: bool = False,
) -> Figure:
    """The attention matrix of each branch, and the multiplicity of each key over all of them.

    A span of up to 256 positions is drawn pair by pair; a longer one as the share of pairs in bins of positions.

    Args:
        pattern: the branches.
        seq_len: N.
        is_causal: leave out later keys.
        heads: key/value heads; one row of pictures per head and span.
        spans: ranges of positions `[start, stop)`; the whole sequence by default.

    Raises:
        ValueError: a head or span out of range.
    """
    seq_len = check.check_positive_int("seq_len", seq_len)
    chosen = list(spans) if spans is not None else [(0, seq_len)]
    for start, stop in chosen:
        if not 0 <= start < stop <= seq_len:
            raise ValueError(f"expected spans within [0, {seq_len}), got ({start}, {stop})")
    for head in heads:
        check.check_index("heads", head, pattern.num_heads)
    rows = [(head, span) for head in heads for span in chosen]
    columns = len(pattern.branches) + 1
    most, long = 1, False
    with style():
        figure = Figure(figsize=(2.4 * columns + 0.3, 2.85 * len(rows) + 0.6), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes, (head, span) in zip(grid, rows, strict=True):
            drawn = _draw_row(axes, pattern, span, head, is_causal)
            most, long = max(most, drawn), long or drawn == 0
            for ax, branch in zip(axes, pattern.branches, strict=False):
                ax.set_title(f"head {head}:  {branch_label(branch)}")
                _segment_lines(ax, branch[0], span)
            axes[-1].set_title(f"head {head}:  all branches")
            axes[0].set_ylabel("query")
            for ax in axes[1:]:
                ax.tick_params(labelleft=False)
        for ax in grid[-1]:
            ax.set_xlabel("key")
        shades = _shades(len(pattern.branches))
        names = [_TIMES.get(n, f"{n} times") for n in range(1, most + 1)]
        handles = [Patch(facecolor=c, label=f"counts {n}") for c, n in zip(shades[:most], names, strict=True)]
        title = "long spans: darker where a larger share of pairs attends" if long else None
        figure.legend(handles=handles, title=title, frameon=False, ncols=len(handles), loc="outside lower right")
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
    seq_len = check.check_positive_int("seq_len", seq_len)
    query = check.check_index("query", query, seq_len)
    check.check_index("head", head, pattern.num_heads)
    with style():
        count = len(pattern.branches)
        figure = Figure(figsize=(8.2, 0.42 * count + 1.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(count, 2.2))
        stacked, edges = binned(np.zeros(0, dtype=np.int64), seq_len)
        for i, keys in keys_by_branch(pattern, query, head, seq_len, is_causal=is_causal):
            counts, _ = binned(np.asarray(keys), seq_len)
            top.stairs(i - 0.4 + counts * 0.8, edges, baseline=i - 0.4, fill=True, color=branch_color(i))
            bottom.stairs(stacked + counts, edges, baseline=stacked.copy(), fill=True, color=branch_color(i))
            stacked += counts
        for i in range(count):
            top.axhline(i - 0.4, color=FAINT, linewidth=0.8, zorder=0)
        top.set_yticks(range(count), map(branch_label, pattern.branches))
        top.set(ylim=(-0.5, count - 0.5), xlim=(0, seq_len))
        causal = ", causal" if is_causal else ""
        top.set_title(f"keys of query {query:,}, head {head}, of {seq_len:,} positions{causal}", loc="left")
        top.tick_params(labelbottom=False, length=0)
        times = "times" if len(stacked) == seq_len else "times (mean)"
        bottom.set(xlabel="key", ylabel=times, ylim=(0, max(1.0, float(stacked.max())) * 1.15))
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
    """
    num_layers = check.check_positive_int("num_layers", num_layers)
    seq_len = check.check_positive_int("seq_len", seq_len)
    query = check.check_index("query", query, seq_len)
    shifts = layer_shifts(segment_shift, pattern.segment_lengths, num_layers)
    reached = torch.zeros(num_layers + 1, seq_len, dtype=torch.bool)
    reached[0, query] = True
    # From the output down: the last layer is the first step.
    for (before, after), shift in zip(pairwise(reached), reversed(shifts), strict=True):
        positions = torch.arange(shift, shift + seq_len)
        member = pattern.membership(positions)
        after |= before
        for branch, (length, _) in enumerate(pattern.branches):
            segment = positions // length - shift // length
            for _, heads in pattern.head_groups(branch):
                rows = member[branch, heads.start]  # heads of one offset keep the same rows
                # The last reached member of each segment: it sees the members up to it (causal), or all of them.
                last = torch.full((int(segment[-1]) + 1,), -1)
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

    Arguments are those of `receptive_field`; a long sequence is drawn as shares of bins.
    """
    how: dict[str, Any] = {"num_layers": num_layers, "is_causal": is_causal, "segment_shift": segment_shift}
    field = receptive_field(pattern, seq_len, query=query, **how)
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
        mark_query(ax, query)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        shape = ", ".join(f"{w:,}/{r}" for w, r in pattern.branches) + f"; {pattern.num_heads} heads"
        ax.set_title(f"inputs that reach position {query:,} (segment/rate: {shape})", loc="left")
    return figure


def keys_by_branch(
    pattern: DilatedPattern, query: int, head: int, seq_len: int, *, is_causal: bool = False
) -> list[tuple[int, range]]:
    """The keys of a query in each branch it belongs to."""
    branches = pattern.membership(torch.tensor(query))[:, head].nonzero().flatten().tolist()
    return list(zip(branches, pattern.keys_of(query, head, seq_len, is_causal=is_causal), strict=True))


def _draw_row(axes: NDArray[Any], pattern: DilatedPattern, span: tuple[int, int], head: int, is_causal: bool) -> int:
    """Draw a span, pair by pair or as shares, and return the largest multiplicity of a pair, 0 for shares."""
    start, stop = span
    exact, count = stop - start <= _EXACT, len(pattern.branches)
    if exact:
        found = multiplicity(pattern, stop, head=head, is_causal=is_causal)[:, start:, start:].astype(int)
    else:
        found = shares(pattern, span, bins=_EXACT, head=head, is_causal=is_causal)
    total = found.sum(0)
    colors = [*([branch_color(i)] for i in range(count)), _shades(count if exact else 2)]
    for ax, values, shades in zip(axes, [*found, total], colors, strict=True):
        cmap: Colormap = ListedColormap(["white", *shades])
        low, high = -0.5, len(shades) + 0.5
        if not exact:
            # Branches differ by orders of magnitude (1 / r^2): each picture has a scale of its own; roots keep the
            # faint seen.
            values = np.sqrt(values / values.max()) if values.max() > 0 else values
            cmap, low, high = LinearSegmentedColormap.from_list("share", ["white", shades[-1]]), 0, 1
        ax.imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="nearest", extent=(start, stop, stop, start))
        ax.tick_params(length=2)
        ax.locator_params(integer=True, nbins=4)
    return max(1, int(total.max())) if exact else 0


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
