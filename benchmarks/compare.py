"""This tree against another revision, interleaved on one machine; fails on a regression over 5 percent by ratio.

    python -m benchmarks compare HEAD~1                   # or: make bench-compare BASE=HEAD~1
    python -m benchmarks compare main --case forward training

Both run in turn on one core, in processes that are forked from one server with torch loaded, so that they differ in the
package alone. What is compared is processor time, which waiting for a busy machine does not change.

A *block* is a fresh pair of processes; in each, a case takes turns A B B A ... of about 40 ms, and the block's ratio is
the median of the quotients of neighbours, on which a busy spell falls alike. Fresh processes in every block, since
where one happens to lay its memory moves its times by a percent or two for as long as it lives.

A block votes: its ratio is over the limit, or not. A case is decided when one side is four votes ahead; that is Wald's
sequential test between "one block in ten is over" and "nine in ten are", with an error of 1/6,562 = 1/(9**4 + 1) on
either side. It asks nothing of how the noise is distributed, stops after four blocks where the answer is plain, and
goes on where it is close; after `--blocks` blocks without a decision, the median of all blocks decides. A case right
at the limit may fall on either side. Exit status: 0 no regression, 1 a regression, 2 a wrong result or a failed run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common

FOLDER = Path(__file__).resolve().parent
AHEAD = 4  # votes
TURN = 0.04  # seconds
PAIRS = 11  # quotients a block


def serve(tree: str, cases: list[str], pipe: Connection) -> None:
    """A process that has one revision: checks its cases, then times them as it is told."""
    sys.path.insert(0, tree)
    try:
        import torch

        torch.set_num_threads(1)
        import dilated_attention_pytorch

        found = Path(dilated_attention_pytorch.__file__).resolve()
        if not found.is_relative_to(Path(tree).resolve()):
            raise RuntimeError(f"expected the package of {tree}, got {found}")
        spec = importlib.util.spec_from_file_location("workloads", FOLDER / "workloads.py")
        assert spec is not None and spec.loader is not None
        workloads = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(workloads)
        made: dict[str, Any] = {name: workloads.CASES[name]() for name in cases}
        wrong = [f"{name} is off by {case.error:.1e}" for name, case in made.items() if case.error > workloads.ALLOWED]
        pipe.send("; ".join(wrong))
    except Exception:
        pipe.send(traceback.format_exc())
        return
    # What is here stays: a collection between turns then looks at what a turn left behind alone.
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(EOFError):
        while True:
            name, repeats = pipe.recv()
            run = made[name].run
            start = time.process_time_ns()
            for _ in range(repeats):
                run()
            elapsed = time.process_time_ns() - start
            gc.collect()
            pipe.send(elapsed / 1e9 / repeats)


class Side:
    """A revision's process, as long as a block lasts."""

    def __init__(self, context: Any, tree: Path, cases: list[str]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(str(tree), cases, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> str:
        """What is wrong with it, or nothing."""
        try:
            return str(self.pipe.recv())
        except EOFError:
            return "the process ended before it was ready"

    def seconds(self, case: str, repeats: int) -> float:
        """Processor time of one run."""
        self.pipe.send((case, repeats))
        return float(self.pipe.recv())

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def block(context: Any, base: Path, head: Path, cases: list[str]) -> dict[str, tuple[float, float, float]]:
    """Each case's seconds of base and head, and the median quotient head / base."""
    sides = [Side(context, tree, cases) for tree in (base, head)]
    try:
        for name, side in zip(("base", "this tree"), sides, strict=True):
            if problem := side.ready():
                raise RuntimeError(f"{name}: {problem}")
        measured = {}
        for case in cases:
            for side in sides:
                side.seconds(case, 1)  # warms up
            repeats = max(1, math.ceil(TURN / max(1e-6, sides[0].seconds(case, 2))))
            pairs = []
            for i in range(PAIRS):
                order = (0, 1) if i % 2 == 0 else (1, 0)
                times = {which: sides[which].seconds(case, repeats) for which in order}
                pairs.append((times[0], times[1]))
            slow, fast = (statistics.median(x) for x in zip(*pairs, strict=True))
            measured[case] = slow, fast, statistics.median(b / a for a, b in pairs)
        return measured
    finally:
        for side in sides:
            side.close()


def verdict(ratios: list[float], limit: float, last: bool) -> bool | None:
    """Whether the blocks so far say that head is slower than the limit allows; None to ask for another block."""
    over = sum(ratio > limit for ratio in ratios)
    if abs(2 * over - len(ratios)) >= AHEAD:
        return 2 * over > len(ratios)
    return statistics.median(ratios) > limit if last else None


@contextlib.contextmanager
def checkout(root: Path, revision: str) -> Iterator[Path]:
    """A worktree of the revision, for as long as it is needed."""
    git = ["git", "-C", str(root)]
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        tree = Path(folder) / "base"
        added = subprocess.run(
            [*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], capture_output=True, text=True
        )
        if added.returncode:
            raise RuntimeError(f"expected BASE to be a revision of this repository, got {revision!r}: {added.stderr}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], capture_output=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--case", nargs="+", default=["forward", "training", "overhead", "decoding"])
    parser.add_argument("--limit", type=float, default=1.05, help="ratio above which a case has regressed")
    parser.add_argument("--blocks", type=int, default=16, help="at most so many blocks")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    options = parser.parse_args()
    # Before the server starts, whose children inherit it.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0", CUDA_VISIBLE_DEVICES="")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    common.announce()
    ratios: dict[str, list[float]] = {case: [] for case in options.case}
    times: dict[str, list[tuple[float, float]]] = {case: [] for case in options.case}
    slower: dict[str, bool] = {}
    try:
        with checkout(common.ROOT, options.base) as base:
            for i in range(options.blocks):
                open_cases = [case for case in options.case if case not in slower]
                for case, (a, b, ratio) in block(context, base, common.ROOT, open_cases).items():
                    ratios[case].append(ratio)
                    times[case].append((a, b))
                    decided = verdict(ratios[case], options.limit, i == options.blocks - 1)
                    if decided is not None:
                        slower[case] = decided
                if len(slower) == len(options.case):
                    break
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    print(f"{'case':<10} {'base ms':>9} {'this ms':>9} {'ratio':>6} {'blocks':>15}")
    for case, found in ratios.items():
        a, b = (statistics.median(x) * 1e3 for x in zip(*times[case], strict=True))
        ratio, word = statistics.median(found), "SLOWER" if slower[case] else "ok"
        spread = f"{min(found):.3f}-{max(found):.3f}"
        print(f"{case:<10} {a:9.3f} {b:9.3f} {ratio:6.3f} {spread:>13} {word:>7} ({len(found)} blocks)")
        rows.append({"case": case, "base_ms": a, "this_ms": b, "ratio": ratio, "blocks": found, "slower": slower[case]})
    common.write(options.out, "compare", rows, check="each case against the reference, in every process")
    return int(any(slower.values()))


if __name__ == "__main__":
    sys.exit(main())
