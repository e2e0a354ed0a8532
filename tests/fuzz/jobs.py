"""What one process of a run does: rounds over targets, each call on the run's device."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import NamedTuple

import torch

# Without a GPU the kernels run in Triton's interpreter; the switch is read when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fuzz import values
from fuzz.runs import REPEAT, run
from fuzz.targets import TARGETS


class Job(NamedTuple):
    """What one process does."""

    names: list[str]
    seed: int
    calls: int  # of each target per round
    seconds: float | None  # None: one round
    device: str


def fuzz(job: Job) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """What came of each target's calls, and a text per kind of failure, which is printed too."""
    torch.set_num_threads(1)
    values.PLACE = torch.device(job.device)
    counts: dict[str, Counter[str]] = {name: Counter() for name in job.names}
    failed: dict[str, str] = {}
    start, rounds = time.monotonic(), 0
    while rounds == 0 or (job.seconds is not None and time.monotonic() - start < job.seconds):
        for i, name in enumerate(job.names):
            if rounds and job.seconds is not None and time.monotonic() - start > job.seconds:
                break
            known: set[str] = set()
            seed = job.seed + rounds + 1000 * i  # targets that draw alike draw others
            counts[name] += run(TARGETS[name], seed, job.calls, known, shrink=False)
            for text in known:
                what = " ".join([name, *text.split()[:8]])  # the same line and error, of other values
                if what not in failed:
                    repeat = REPEAT.format(name, seed, job.calls)
                    repeat += "" if job.device == "cpu" else f" --device {job.device}"
                    failed[what] = f"{text}\nrepeat it with: {repeat}\n"
                    print(f"\n{name}: {failed[what]}", flush=True)
        rounds += 1
    return counts, failed
