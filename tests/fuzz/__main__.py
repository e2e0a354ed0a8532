"""Fuzzes for a time, or repeats one run: `PYTHONPATH=tests:tests/helpers python -m fuzz --seconds 600`.

With `--device cuda` the op, its merge, streaming and the pool, on a GPU.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from fuzz.jobs import Job, fuzz
from fuzz.judge import Failure
from fuzz.targets import TARGETS

_OUTCOMES = ("value", "ValueError", "TypeError", "NotImplementedError", "FAILED")
# What `values.placed` puts on the device.
_ON_DEVICE = ("dilated_attention", "dilated_attention_with_lse", "merge_attention", "UnifiedMemoryPool",
              "dilated_attention_streamed")  # fmt: skip


def main() -> int:
    """Returns how many kinds of failure there were."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to draw calls")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="makes one round instead, the same one for the same seed")
    parser.add_argument("--calls", type=int, default=50, help="calls of each target per round")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with seeds of its own")
    given = parser.parse_args()
    names = given.target or sorted(TARGETS if given.device == "cpu" else _ON_DEVICE)
    first = secrets.randbelow(2**31) if given.seed is None else given.seed
    print(f"seed {first}, {len(names)} targets", flush=True)
    start, seconds = time.monotonic(), given.seconds if given.seed is None else None
    jobs = [Job(names, first + 10_000 * i, given.calls, seconds, given.device) for i in range(given.jobs)]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failed: dict[str, str] = {}
    if len(jobs) == 1:
        results = [fuzz(jobs[0])]
    else:
        with ProcessPoolExecutor(len(jobs), get_context("spawn")) as pool:
            results = list(pool.map(fuzz, jobs))
    for made, found in results:
        failed = found | failed
        for name, count in made.items():
            counts[name] += count
    print(f"\n{'target':32}" + "".join(f"{x:>20}" for x in _OUTCOMES))
    for name in (*names, "sum"):
        row = sum(counts.values(), Counter()) if name == "sum" else counts[name]
        print(f"{name:32}" + "".join(f"{row[x]:20,}" for x in _OUTCOMES))
    where = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    calls, spent = sum(sum(c.values()) for c in counts.values()), time.monotonic() - start
    print(f"{calls:,} calls on {where} in {spent:.0f} s, seed {first}, {len(failed)} kinds of failure")
    return len(failed)


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 100))
    except Failure as failure:
        sys.exit(str(failure))
