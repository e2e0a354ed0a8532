"""Makes the table of tile shapes, `kernels/triton/tuned.py`, from what `benchmarks/kernels.py` measured.

    python3 benchmarks/kernels.py                      # on the GPU: checks, times, leaves kernels.json
    python3 benchmarks/tune.py RUN.json [RUN.json ...]  # anywhere: prints the table; --write puts it in place

A configuration that several runs timed counts by their mean, after each run's times are scaled to the first run's on
the configurations that both have: one run's time for one configuration moves by up to 15 % on identical machine code.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "dilated_attention_pytorch/kernels/triton/tuned.py"
LABEL = re.compile(r"(\w+) d(\d+) (full|causal) (\d+)x(\d+) w(\d+) s(\d+)( early)?$")
# The general kernels' full rows for widths up to 64 are measured on the slide pattern (D = 48): 64 is mostly aligned.
MEASURED_AT = {("forward", 64, False): 48, ("dq", 64, False): 48, ("dkv", 64, False): 48}
# Registers of these go to memory, which tests/kernels/test_triton_compile.py refuses; some were measured up to a
# tenth faster.
SPILLING = {
    ("aligned_dkv", 128): {(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3), (64, 128, 8, 3, "early")},
    ("dkv", 128): {(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3), (64, 128, 8, 3, "early"), (32, 64, 4, 3)},
}
HEADER = '''"""Tile shapes that `benchmarks/kernels.py` measured and `benchmarks/tune.py` wrote, for `configs.py`.

(architecture, kernel, head_dim up to, causal) -> (rows of queries, rows of keys, warps, stages) for 16-bit inputs, the
best first; later ones fit shorter segments. "early" takes dO V^T before the exponentials in dK/dV.
"""

from typing import Any

TABLE: dict[tuple[str, str, int, bool], tuple[tuple[Any, ...], ...]] = {
'''


def timings(files: list[Path]) -> dict[tuple[str, int, bool], dict[tuple, float]]:
    """Milliseconds of each configuration of each (kernel, head_dim, causal)."""
    runs = []
    for file in files:
        runs.append(
            {label: x["ms"] for label, x in json.loads(file.read_text()).items() if isinstance(x, dict) and "ms" in x}
        )
    found: dict[tuple[str, int, bool], dict[tuple, list[float]]] = {}
    for run in runs:
        both = [runs[0][label] / run[label] for label in run if label in runs[0]]
        scale = statistics.median(both) if both else 1.0
        for label, ms in run.items():
            match = LABEL.match(label)
            if match is None:  # without the copy engine: for comparison only
                continue
            kernel, width, mode, *shape, early = match.groups()
            config = (*map(int, shape), *(("early",) if early else ()))
            found.setdefault((kernel, int(width), mode == "causal"), {}).setdefault(config, []).append(ms * scale)
    return {key: {c: statistics.mean(ms) for c, ms in rows.items()} for key, rows in found.items()}


def ranked(rows: dict[tuple, float]) -> list[tuple]:
    """The best configuration, then the best among ever smaller tiles."""
    chosen: list[tuple] = []
    for config in sorted(rows, key=lambda c: rows[c]):
        if not chosen or max(config[:2]) < max(chosen[-1][:2]):
            chosen.append(config)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    measured = timings(options.files)
    text = HEADER
    for kernel in ("aligned_forward", "aligned_dq", "aligned_dkv", "forward", "dq", "dkv"):
        for causal in (False, True):
            for width in (64, 128):
                rows = measured.get((kernel, MEASURED_AT.get((kernel, width, causal), width), causal))
                if rows is None:  # the general kernels at D = 128 are measured causal
                    rows = measured.get((kernel, width, True), {})
                kept = {c: ms for c, ms in rows.items() if c not in SPILLING.get((kernel, width), ())}
                if kernel == "aligned_forward" and causal:  # only short sequences: tiles of few rows fill the chip
                    chosen = [(64, 64, 4, 3)]
                else:
                    chosen = ranked(kept)
                if chosen and not kernel.startswith("aligned"):
                    chosen = chosen[:1]
                if chosen:
                    row = str(tuple(chosen)).replace("'", '"')
                    text += f'    ("{options.architecture}", "{kernel}", {width}, {causal}): {row},\n'
    text += "}\n"
    TABLE.write_text(text) if options.write else print(text)


if __name__ == "__main__":
    main()
