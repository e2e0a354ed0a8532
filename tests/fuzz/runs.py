"""Draws calls of a target and judges them; a failure comes with the line that repeats it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz.judge import Call, Failure, judge
from fuzz.table import Target

REPEAT = 'PYTHONPATH=tests:tests/helpers python -m fuzz --target "{}" --seed {} --calls {}'

_SECONDS = 60  # a call of a few numbers that takes longer hangs


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside if it takes longer; in the main thread alone, where signals are heard."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"expected an end within {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(target: Target, number: int, calls: int, known: set[str] | None = None, shrink: bool = True) -> Counter[str]:
    """Makes so many calls of a target, the same ones for the same number; returns how many ended how.

    Args:
        target: of the table.
        number: the seed.
        calls: how many.
        known: failures that are counted, no more: those of this run are added, and none is raised.
        shrink: look for a smaller call that fails.

    Raises:
        Failure: with the line that repeats it.
    """
    outcomes: Counter[str] = Counter()
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @st.composite
    def calls_drawn(draw: st.DrawFn) -> Call:
        torch.manual_seed(0)
        return target.calls(draw)

    @seed(number)
    @settings(max_examples=calls, database=None, deadline=None, derandomize=False, print_blob=False, phases=phases,
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(call=calls_drawn())
    def make(call: Call) -> None:
        torch.manual_seed(0)
        try:
            with within(_SECONDS):
                outcomes[judge(call)] += 1
        except Failure as failure:
            outcomes["FAILED"] += 1
            if known is None:
                raise
            known.add(str(failure))

    try:
        make()
    except Failure as failure:
        raise Failure(f"{failure}\nrepeat it with: {REPEAT.format(target.name, number, calls)}") from failure.__cause__
    return outcomes
