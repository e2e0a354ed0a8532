"""A pattern as a page to explore in a browser: one HTML file that loads nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.files import replace_text
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.viz.style import branch_colors, branch_label, check_format

_MOST_POSITIONS = 16_384  # cells of a few pixels
_MOST_HEADS = 128  # to choose from
_TEMPLATE = Path(__file__).with_name("page.html")


def page_data(pattern: DilatedPattern, seq_len: int, *, head: int = 0, is_causal: bool = False) -> dict[str, Any]:
    """What the page knows of a pattern; its script looks keys up and has no membership rule of its own.

    Returns:
        `branches`, each with the `groups` of the heads (index by head) and the `segments` of each group as
        `[first key, end, step]`; `query`, the position with the most keys; and the arguments.
    """
    seq_len = check.check_int("seq_len", seq_len, 1, _MOST_POSITIONS + 1)
    check.check_int("num_heads", pattern.num_heads, 1, _MOST_HEADS + 1)
    check.check_index("head", head, pattern.num_heads)
    member = pattern.membership(torch.arange(seq_len, device="cpu"))  # (branches, H, N)
    branches: list[dict[str, Any]] = []
    colors = zip(*(branch_colors(len(pattern.branches), on_dark=dark) for dark in (False, True)), strict=True)
    for i, (branch, pair) in enumerate(zip(pattern.branches, colors, strict=True)):
        groups = [0] * pattern.num_heads
        segments: list[list[list[int]]] = []
        for _, heads in pattern.head_groups(i):
            for h in range(*heads.indices(pattern.num_heads)):
                groups[h] = len(segments)
            found: list[range] = []
            for n in member[i, heads.start].nonzero().flatten().tolist():
                if not found or n >= found[-1].stop:
                    # keys_of lists only the branches that the query belongs to.
                    place = int(member[:i, heads.start, n].sum())
                    found.append(pattern.keys_of(n, heads.start, seq_len)[place])
            segments.append([[keys.start, keys.stop, keys.step] for keys in found])
        branches.append({"label": branch_label(branch), "colors": pair, "groups": groups, "segments": segments})
    counts = [sum(map(len, pattern.keys_of(n, head, seq_len, is_causal=is_causal))) for n in range(seq_len)]
    query = counts.index(max(counts))
    return {"seqLen": seq_len, "causal": is_causal, "heads": pattern.num_heads, "head": head, "query": query} | {
        "branches": branches
    }


def save_page(
    pattern: DilatedPattern, seq_len: int, path: Path | str, *, head: int = 0, is_causal: bool = False
) -> Path:
    """Write a page on which one chooses a query and sees its keys by branch, and how far layers see.

    Args:
        pattern: the branches; at most 128 heads.
        seq_len: N, at most 16,384.
        path: ends in `.html`.
        head: the key/value head shown first.
        is_causal: leave out later keys.

    Returns:
        The path written.

    Raises:
        ValueError: another ending, a number out of range.
    """
    path = Path(path)
    check_format(path, (".html",))
    text = json.dumps(page_data(pattern, seq_len, head=head, is_causal=is_causal), separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, _TEMPLATE.read_text(encoding="utf-8").replace(">DATA<", f">{text}<"))
    return path
