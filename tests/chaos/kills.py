"""Programs ended by signals at drawn moments; the same command again has to end as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from chaos.process import Ended, Process, torchrun, world
from chaos.programs import PROGRAMS
from chaos.results import Lost, check_between, check_curve, check_final, final

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Weights of the draw: training has most to lose. "sharded": parameters and sequences over the ranks.
KINDS = {("train", 1): 3, ("sharded", 2): 2, ("train", 2): 2, ("sharded", 4): 2, ("stream", 1): 2, ("embed", 1): 2,
         ("generate", 1): 1}  # fmt: skip
# Worlds that a killed run also goes on in; the losses are the same up to rounding.
ELSEWHERE = {("sharded", 2): ("sharded", 1), ("train", 2): ("sharded", 2), ("sharded", 4): ("sharded", 2),
             ("train", 1): ("sharded", 2)}  # fmt: skip


class Straight(NamedTuple):
    """An undisturbed run."""

    seconds: float
    writes: int  # temporary files that were seen
    left: dict[str, Any]


class Kills:
    """All kills of one command line; `root` holds the inputs."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self._straight: dict[tuple[str, int], Straight] = {}

    def straight(self, program: str, ranks: int = 1) -> Straight:
        """The undisturbed run of a program, done once."""
        if (program, ranks) not in self._straight:
            folder = self.folder(program, f"straight-{ranks}")
            start, seen = time.monotonic(), set[str]()
            started = self.start(program, folder, ranks)
            while any(process.poll() is None for process in started):
                seen |= _temporary(folder)
                time.sleep(0.001)
            ended = [process.end() for process in started]
            if any(one.code for one in ended):
                raise RuntimeError(f"expected {program} to end well, got {ended}")
            seconds = time.monotonic() - start
            self._straight[program, ranks] = Straight(seconds, len(seen), final(program, folder, ended[0].out))
        return self._straight[program, ranks]

    def folder(self, program: str, name: str) -> Path:
        """An empty folder to run in; that of a text generator holds a trained run."""
        folder = self.root / f"{program}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if program == "generate":
            self.straight("train")
            shutil.copytree(self.root / "train-straight-1" / "run", folder / "run")
        return folder

    def start(self, program: str, folder: Path, ranks: int = 1, *, tag: str = "", **options: Any) -> list[Process]:
        """Starts a program on some ranks; `tag` keeps apart what two of one folder say."""
        logs = self.root / "logs"
        logs.mkdir(exist_ok=True)
        work, more = partial(PROGRAMS[program], folder), options.pop("env", {})
        return [
            Process(logs / f"{folder.name}{tag}.{rank}", work, env=env | more, **options)
            for rank, env in enumerate(world(ranks))
        ]

    def draw(self, count: int) -> Iterator[tuple[str, str]]:
        """That many kills: what was killed and how, and what was lost ("" for nothing)."""
        deck = [kind for turn in range(max(KINDS.values())) for kind, weight in KINDS.items() if turn < weight]
        for number in range(count):
            program, ranks = deck[number % len(deck)]
            number_of_signal = SIGNALS[(number + number // len(deck)) % len(SIGNALS)]
            what = f"{program}, {ranks} rank{'s'[: ranks - 1]}, {number_of_signal.name}"
            try:
                self._kill(program, ranks, number_of_signal)
            except Lost as lost:
                yield what, str(lost)
            else:
                yield what, ""

    def _kill(self, program: str, ranks: int, number: signal.Signals) -> None:
        straight = self.straight(program, ranks)
        for _ in range(10):
            folder = self.folder(program, "killed")
            started = self.start(program, folder, ranks)
            self._wait(straight, folder, started)
            # Launchers hand a signal on to all ranks; what kills for memory or by mistake takes one.
            hit = started if number != signal.SIGKILL else [self.random.choice(started)]
            if any(process.poll() is None for process in hit):
                break
            missed = [process.end() for process in started]
            if any(one.code for one in missed):
                raise Lost(f"{program} failed by itself: {[(one.code, one.err[-2000:]) for one in missed]}")
        else:
            raise RuntimeError(f"expected to hit {program} while it runs, it ended ten times before")
        for process in hit:
            process.send(number)
        ended = [process.end(limit=60) for process in started]
        if number != signal.SIGKILL and any(one.code == -signal.SIGKILL for one in ended):
            raise Lost(
                f"a rank that did not end within 60 s of {number.name}: {[(e.code, e.err[-2000:]) for e in ended]}"
            )
        check_signal(ended, number, check_between(program, folder, ended[0].out, straight.left))
        elsewhere = self.folder(program, "elsewhere")
        shutil.copytree(folder, elsewhere, dirs_exist_ok=True)
        self.again(program, folder, ranks)
        if other := ELSEWHERE.get((program, ranks)):
            self._elsewhere(*other, elsewhere, straight.left)

    def _elsewhere(self, program: str, ranks: int, folder: Path, wanted: dict[str, Any]) -> None:
        """A killed run goes on in another world, to the same losses up to rounding."""
        ended = [process.end() for process in self.start(program, folder, ranks)]
        if any(one.code for one in ended):
            raise Lost(f"{program} on {ranks} ranks, where it is to go on: {ended[0].err.strip()[-300:]}")
        check_curve(final(program, folder, ended[0].out), wanted)

    def again(self, program: str, folder: Path, ranks: int = 1) -> None:
        """The same command once more, which has to end well and leave what an undisturbed run leaves."""
        ended = [process.end() for process in self.start(program, folder, ranks)]
        if any(one.code for one in ended):
            raise Lost(f"the same command again ends with {ended[0].code}: {ended[0].err.strip()[-300:]}")
        check_final(program, folder, ended[0].out, self.straight(program, ranks).left)

    def _wait(self, straight: Straight, folder: Path, started: list[Process]) -> None:
        """Until a drawn time, or until a drawn one of the temporary files is there: within a write."""
        start, seen = time.monotonic(), set[str]()
        until, at = self.random.uniform(0, straight.seconds), None
        if straight.writes and self.random.random() < 0.5:
            until, at = 60.0, self.random.randint(1, straight.writes)
        while time.monotonic() - start < until and any(process.poll() is None for process in started):
            seen |= _temporary(folder)
            if at is not None and len(seen) >= at:
                return
            time.sleep(0.0005)

    def launcher(self, number: signal.Signals, victim: str) -> tuple[str, str]:
        """A signal to torchrun itself ("launcher"), to one rank ("one") or to all processes ("all")."""
        folder, straight = self.folder("train", "torchrun"), self.straight("train", 2)
        what = f"train, torchrun, {number.name} to {victim}"
        with torchrun(folder / "log", "chaos.one", "train", str(folder)) as launched:
            run, stop = folder / "run", time.monotonic() + 120
            while not any(run.glob("step-*")) and launched.poll() is None and time.monotonic() < stop:
                time.sleep(0.002)
            ranks = _children(launched.pid)
            targets = {"launcher": [launched.pid], "one": ranks[-1:], "all": [launched.pid, *ranks]}[victim]
            for pid in targets:
                os.kill(pid, number)
            launched.wait(timeout=120)
        try:
            while any(Path(f"/proc/{pid}").exists() for pid in ranks):
                if time.monotonic() > stop:
                    raise Lost("ranks that outlive their launcher")
                time.sleep(0.05)
            if not check_between("train", folder, b"", straight.left):
                raise RuntimeError(f"expected torchrun to save a state, got {(folder / 'log.err').read_text()[-2000:]}")
            (folder / "log.err").unlink()
            self.again("train", folder, 2)
        except Lost as lost:
            return what, str(lost)
        return what, ""


def check_signal(ended: list[Ended], number: signal.Signals, saved: int) -> None:
    """A run that says that it was interrupted has saved the step that it names, and its code is the signal's."""
    said = [one.err for one in ended if "interrupted after step" in one.err]
    if not said:
        return
    step = int(said[0].split("interrupted after step ")[1].split(",")[0].replace("\n", ""))
    if step != saved or any(one.code != 128 + number for one in ended):
        raise Lost(f"interrupted after step {step}, but {saved} is saved, exit codes {[one.code for one in ended]}")


def _temporary(folder: Path) -> set[str]:
    return {path.name for part in (folder, folder / "run") if part.is_dir() for path in part.glob(".*.part")}


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in found)
