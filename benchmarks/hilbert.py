"""Times the Hilbert curve in torch against a plain loop over bits, and checks that both give the same.

python benchmarks/hilbert.py [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import announce, refuse, write
from torch import Tensor

from dilated_attention_pytorch.kernels import hilbert_tables
from dilated_attention_pytorch.kernels.hilbert import curve_order, grid_coords, hilbert_decode


def bit_loop(coords: Tensor, num_bits: int) -> Tensor:
    """Skilling's algorithm as he wrote it, on whole tensors."""
    x = list(coords.unbind(-1))
    for bit in range(num_bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(x)):
            is_set = (x[i] >> bit) & 1 == 1
            swap = (x[0] ^ x[i]) & low
            first = torch.where(is_set, x[0] ^ low, x[0] ^ swap)
            x[i] = torch.where(is_set, x[i], x[i] ^ swap) if i else first
            x[0] = first
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    flips = torch.zeros_like(x[0])
    for bit in range(num_bits - 1, 0, -1):
        flips = torch.where((x[-1] >> bit) & 1 == 1, flips ^ ((1 << bit) - 1), flips)
    index = torch.zeros_like(x[0])
    for bit in range(num_bits - 1, -1, -1):
        for axis in x:
            index = (index << 1) | ((axis ^ flips) >> bit & 1)
    return index


def best(call: Callable[[], object], repeats: int = 7) -> float:
    """The least of several times, in milliseconds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args()
    rows = []
    announce()
    print("262,144 points, ms\n")
    print("| grid | tables: encode | decode | bit loop: encode | whole order of the grid |")
    print("| --- | --- | --- | --- | --- |")
    for grid, bits in (((512, 512), 9), ((64, 64, 64), 6)):
        coords = grid_coords(grid)
        index = hilbert_tables.encode(coords.unbind(-1), bits)
        if not torch.equal(index, bit_loop(coords, bits)):
            refuse([f"tables and bit loop differ on a grid of {grid}"])
        times = (
            best(lambda c=coords, b=bits: hilbert_tables.encode(c.unbind(-1), b)),
            best(lambda i=index, g=grid, b=bits: hilbert_decode(i, len(g), b)),
            best(lambda c=coords, b=bits: bit_loop(c, b)),
            best(lambda c=coords: curve_order("hilbert", c)),
        )
        case = " x ".join(map(str, grid))
        print(f"| {case} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
        rows.append(dict(zip(("case", "encode_ms", "decode_ms", "loop_ms", "order_ms"), (case, *times), strict=True)))
    write(options.out, "hilbert", rows, check="the tables' indices equal the bit loop's on every point")


if __name__ == "__main__":
    main()
