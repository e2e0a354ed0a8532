"""Fuzzes for a time, or repeats one run: `PYTHONPATH=tests:tests/helpers python -m fuzz --seconds 600`."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections import Counter, defaultdict

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fuzz.judge import Failure
from fuzz.runs import REPEAT, run
from fuzz.targets import TARGETS

_OUTCOMES = ("value", "ValueError", "TypeError", "NotImplementedError", "FAILED")


def main() -> int:
    """Returns how many targets failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to draw calls")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="repeats one run of a target instead")
    parser.add_argument("--calls", type=int, default=50, help="calls a run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.target or sorted(TARGETS)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failed: dict[str, str] = {}
    first = secrets.randbelow(2**31) if given.seed is None else given.seed
    print(f"seed {first}, {len(names)} targets", flush=True)
    start, rounds = time.monotonic(), 0
    while rounds == 0 or (given.seed is None and time.monotonic() - start < given.seconds):
        for name in names:
            if given.seed is None and rounds and time.monotonic() - start > given.seconds:
                break
            known: set[str] = set()
            counts[name] += run(TARGETS[name], first + rounds, given.calls, known, shrink=False)
            for text in known:
                what = " ".join([name, *text.split()[:8]])  # the same line and error, of other values
                if what not in failed:
                    failed[what] = f"{text}\nrepeat it with: {REPEAT.format(name, first + rounds, given.calls)}\n"
                    print(f"\n{name}: {failed[what]}", flush=True)
        rounds += 1
    print(f"\n{'target':32}" + "".join(f"{x:>20}" for x in _OUTCOMES))
    for name in (*names, "sum"):
        row = sum(counts.values(), Counter()) if name == "sum" else counts[name]
        print(f"{name:32}" + "".join(f"{row[x]:20,}" for x in _OUTCOMES))
    print(f"{sum(sum(c.values()) for c in counts.values()):,} calls in {time.monotonic() - start:.0f} s, seed {first}")
    return len(failed)


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 100))
    except Failure as failure:
        sys.exit(str(failure))
