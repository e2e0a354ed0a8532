"""Kills, damages and starves what writes files: `PYTHONPATH=.:tests python -m chaos --kills 60 --seed 0`."""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Loaded here, so that every fork starts at once.
import dilated_attention_pytorch.cli.app
import dilated_attention_pytorch.training
import dilated_attention_pytorch.viz
from chaos import trials
from chaos.damages import damages
from chaos.kills import Kills
from chaos.programs import prepare

_LOADED = dilated_attention_pytorch.cli.app
Trial = tuple[str, str, str]  # the part, what was done, what was lost ("" for nothing)
_PARTS = ("kill", "damage", "full", "twice")
_LAUNCHERS = ((signal.SIGTERM, "launcher"), (signal.SIGKILL, "one"), (signal.SIGKILL, "all"))
# Bytes between which a disk is full in the middle of the program.
_DISKS = {("train", 1): (20_000, 250_000), ("train", 2): (20_000, 250_000), ("stream", 1): (10_000, 2_500_000),
          ("embed", 1): (4_096, 20_000)}  # fmt: skip


def main() -> int:
    """Returns how many trials lost something or did not name it."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="how many programs to kill")
    parser.add_argument("--damages", type=int, default=1000, help="how many kinds of damage, all by default")
    parser.add_argument(
        "--launchers", type=int, default=3, help="how many signals to torchrun and its ranks, 3 at most"
    )
    parser.add_argument("--disks", type=int, default=12, help="how many full disks, and runs of two in one folder")
    parser.add_argument("--seed", type=int, help="draws the moments of the kills and the sizes of the disks")
    given = parser.parse_args()
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    start, found = time.monotonic(), list[Trial]()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        root = Path(name).resolve()
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        os.chdir(root)
        prepare(root)
        kills = Kills(root, seed)
        for trial in every(kills, given, seed):
            found.append(trial)
            print(f"{'LOST' if trial[2] else 'held'}  {': '.join(filter(None, trial))}", flush=True)
    lost = [trial for trial in found if trial[2]]
    print(table(found))
    print(f"{len(found)} trials in {time.monotonic() - start:.0f} s, seed {seed}; {len(lost)} lost or not named")
    return len(lost)


def every(kills: Kills, given: argparse.Namespace, seed: int) -> Iterator[Trial]:
    """All parts, one after the other."""
    for what, lost in kills.draw(given.kills):
        yield "kill", what, lost
    for number, victim in _LAUNCHERS[: given.launchers]:
        yield "kill", *kills.launcher(number, victim)
    kinds = damages()
    random.Random(seed).shuffle(kinds)
    for kind in kinds[: given.damages]:
        yield "damage", *trials.damage(kills, kind)
    drawn = random.Random(seed)
    for number in range(given.disks):
        program, ranks = list(_DISKS)[number % len(_DISKS)]
        yield "full", *trials.full_disk(kills, program, drawn.randint(*_DISKS[program, ranks]), ranks)
    if given.disks:
        yield "full", *trials.full_terminal(kills)
    for program, ranks in list(_DISKS)[: given.disks]:
        yield "twice", *trials.two_runs(kills, program, ranks)


def table(found: list[Trial]) -> str:
    """One line per thing that was done: how often, and how often it held."""
    rows: dict[tuple[str, str], Counter[bool]] = {}
    for part, what, lost in sorted(found, key=lambda trial: (_PARTS.index(trial[0]), trial[1])):
        short = what.partition(": ")[0] if part == "damage" else what.partition(", disk")[0].partition(", files")[0]
        rows.setdefault((part, short), Counter())[not lost] += 1
    lines = [f"{'part':8}{'what':36}{'times':>6}{'held':>6}"]
    lines += [f"{part:8}{what:36}{sum(row.values()):6}{row[True]:6}" for (part, what), row in rows.items()]
    whole = sum(rows.values(), Counter())
    return "\n".join([*lines, f"{'sum':44}{sum(whole.values()):6}{whole[True]:6}"])


if __name__ == "__main__":
    sys.exit(min(main(), 100))
