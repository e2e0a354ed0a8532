"""Five hundred drawn calls of the public functions, the same ones every time; `make fuzz` makes more."""

import pytest

from fuzz import targets
from fuzz.runs import run


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_a_call_gives_the_right_value_or_names_the_argument(name):
    target = targets.TARGETS[name]
    outcomes = run(target, 0, target.examples)
    assert sum(outcomes.values()) >= target.examples // 2, outcomes


def test_there_are_five_hundred():
    assert sum(target.examples for target in targets.TARGETS.values()) >= 500
