"""Five hundred drawn calls of the public functions, the same ones every time; `make fuzz` makes more."""

import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import DilatedPattern, MultiheadDilatedAttention
from fuzz import runs, targets
from fuzz.judge import judge
from fuzz.runs import run
from fuzz.targets.commands import _COMMANDS, OPTIONS
from fuzz.targets.modules import construction
from fuzz.targets.pattern import _METHODS

# Public names that are called, and are no target.
LEFT_OUT = {
    "legacy_mode register exchange_pool": "they take nothing",
    "BaseRingAttention peak_bytes": "what they call is the caller's",
    "RangePlan Sizes plan_ranges": "dilated_attention_streamed fills them from what it is given",
    "ShardingCollator": "its batches are those of transformers' Trainer",
    "PoolStats Counts relative_norm gradient_scale": "figures of the pool and of tests",
    "TrainConfig Trainer build_corpus loss_figure": "the train command fills them from what it is given",
    "pattern_figure neighbours_figure receptive_figure save_page orders_figure neighbourhood_figure heat_figure "
    "slide_figure TileMap save_map": "show and slide map fill them from what they are given",
}


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_a_call_gives_the_right_value_or_names_the_argument(name):
    target = targets.TARGETS[name]
    outcomes = run(target, 0, target.examples)
    assert sum(outcomes.values()) >= target.examples // 2, outcomes


def test_there_are_five_hundred():
    assert sum(target.examples for target in targets.TARGETS.values()) >= 500


def test_every_public_name_is_a_target():
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    called = set()
    for path in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        is_error = inspect.isclass(found) and issubclass(found, BaseException)
        if not (hasattr(found, "_fields") or is_error or getattr(found, "_is_protocol", False)):  # what users get
            called.add(name)
    fuzzed = {name for target in targets.TARGETS.values() for name in target.of}
    assert called - fuzzed == set(" ".join(LEFT_OUT).split())
    methods = {name for name, value in vars(DilatedPattern).items() if inspect.isfunction(value) and name[0] != "_"}
    assert methods - {"offsets_of"} == set(_METHODS)  # that one looks at nothing, for graphs
    assert set(OPTIONS) == set(_COMMANDS)


def test_a_module_is_checked_at_the_width_it_was_given():
    given = {"embed_dim": np.array(8), "num_heads": 4, "segment_lengths": [4, 8], "dilation_rates": [1, 2]}
    x = torch.randn(1, 11, 16)
    assert judge(construction(MultiheadDilatedAttention, given, ["embed_dim"], (x, x, x))) == "value"


def test_every_argument_of_a_target_is_drawn(monkeypatch):
    """So that a new one is not forgotten. The pool's `runtime` is for tests."""
    drawn = defaultdict(set)

    def collect(call):
        function = call.function if inspect.isroutine(call.function) or inspect.isclass(call.function) else None
        function = function or type(call.function).forward
        if "<locals>" not in function.__qualname__:
            by_position = list(inspect.signature(function).parameters)[: len(call.args)]
            drawn[function] |= {*call.kwargs, *call.names, *by_position}
        return "value"

    monkeypatch.setattr(runs, "judge", collect)
    for target in targets.TARGETS.values():
        run(target, 0, 25)
    missing = {}
    for function, names in drawn.items():
        kinds = inspect.signature(function).parameters.values()
        wanted = {x.name for x in kinds if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)} - {"self", "runtime"}
        if wanted - names:
            missing[function.__qualname__] = sorted(wanted - names)
    assert missing == {}
