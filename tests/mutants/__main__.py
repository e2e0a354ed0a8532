"""Mutants of the package against its tests: `PYTHONPATH=tests python -m mutants --count 100`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mutants.judge import copy_tree, log, run_tests
from mutants.sample import PACKAGE, areas, draw, equivalent

_OUTCOMES = ("killed", "out of time", "listed", "SURVIVED")


def main() -> int:
    """Returns how many mutants survived that are not listed as equivalent."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="mutants to draw, from the areas in turn")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of them, which an earlier run judged")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws others")
    parser.add_argument("--area", action="append", choices=sorted(areas()), help="only this one; may be repeated")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one test of a mutant")
    parser.add_argument("--match", default="", help="only those drawn whose key contains this")
    given = parser.parse_args()
    known, start = equivalent(), time.monotonic()
    drawn = [one for one in draw(given.count, given.seed, given.area or [])[given.skip :] if given.match in one[1].key]
    counts: dict[str, Counter[str]] = {area: Counter() for area, _, _ in drawn}
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        tree = Path(name).resolve()
        copy_tree(tree)
        sound: set[str] = set()
        for number, (area, mutation, tests) in enumerate(drawn, given.skip + 1):
            seconds, by = 0.0, ""
            if mutation.key in known:
                outcome = "listed"
            else:
                file = tree / PACKAGE / mutation.path
                source = file.read_text(encoding="utf-8")
                file.write_text(mutation.applied(source), encoding="utf-8")
                found, seconds, by = run_tests(tree, tests, given.limit)
                file.write_text(source, encoding="utf-8")
                outcome = {"passed": "SURVIVED", "time": "out of time", "failed": "killed"}[found]
                if found == "failed" and by not in sound:  # a test that is red anyway kills nothing
                    if run_tests(tree, [by] if "::" in by else ["--collect-only", *tests], given.limit)[0] != "passed":
                        raise RuntimeError(f"expected {by or tests} to pass without a mutant, got:\n{log(tree)}")
                    sound.add(by)
            counts[area][outcome] += 1
            survivors += [mutation.key] * (outcome == "SURVIVED")
            print(f"{number:4} {area:10} {outcome:12} {seconds:4.0f} s  {mutation.key}  {by}", flush=True)
    print(f"\n{'area':12}" + "".join(f"{outcome:>14}" for outcome in _OUTCOMES))
    for area in (*counts, "sum"):
        row = sum(counts.values(), Counter()) if area == "sum" else counts[area]
        print(f"{area:12}" + "".join(f"{row[outcome]:14}" for outcome in _OUTCOMES))
    print(f"{len(drawn)} mutants in {time.monotonic() - start:.0f} s, seed {given.seed}")
    for key in survivors:
        print(f"survived: {key}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
