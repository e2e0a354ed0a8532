"""Why text should stay in its order: how far apart attended tokens are in the text, unfolded and folded.

python examples/slide/text.py
"""

from __future__ import annotations

import torch
from locality import locality

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.kernels.hilbert import CurveOrder, hilbert_order


def main(side: int = 64) -> list[tuple[str, float, float]]:
    """A text of `side ** 2` tokens as it stands, and folded into a square whose Hilbert order is attended along."""
    pattern = DilatedPattern((64, 256, 1024), (1, 2, 4), num_heads=4)
    line = torch.arange(side * side)
    rows = []
    orders = {"as it stands": CurveOrder(line, line), "folded, Hilbert": hilbert_order(grid=(side, side))}
    for name, order in orders.items():
        found = locality(pattern, order, line[:, None])
        rows.append((name, found.distance, found.neighbours))
    return rows


if __name__ == "__main__":
    print("| text of 4,096 tokens | mean distance of a key, in tokens | tokens next to it in reach |")
    print("| --- | --- | --- |")
    for name, distance, share in main():
        print(f"| {name} | {distance:.1f} | {share:.1%} |")
