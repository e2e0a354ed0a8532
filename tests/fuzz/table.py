"""The table of targets: each draws calls of one public function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from fuzz.judge import Call


@dataclass(frozen=True)
class Target:
    """A public function, and how its calls are drawn.

    Attributes:
        name: as reports and the command have it.
        calls: draws one.
        examples: how many `make test` makes.
        of: the public names that are called, where the name is none.
    """

    name: str
    calls: Callable[[st.DrawFn], Call]
    examples: int
    of: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {}


def target(name: str, examples: int, *of: str) -> Callable[[Callable[[st.DrawFn], Call]], Callable[[st.DrawFn], Call]]:
    """Adds a function that draws calls to the table."""

    def add(calls: Callable[[st.DrawFn], Call]) -> Callable[[st.DrawFn], Call]:
        assert name not in TARGETS
        TARGETS[name] = Target(name, calls, examples, of or (name,))
        return calls

    return add
