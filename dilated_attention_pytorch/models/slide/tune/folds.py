"""Folds by patient, and scores over them with their uncertainty."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dilated_attention_pytorch.models.slide.formats import package
from dilated_attention_pytorch.models.slide.tune.labels import Labels
from dilated_attention_pytorch.models.slide.tune.tasks import Task

_VAL_PARTS = 5  # a fifth of the patients of a training part decides when to stop


class Fold(NamedTuple):
    """Numbers of the slides that train a model, choose among its epochs, and test it."""

    train: list[int]
    val: list[int]
    test: list[int]


def make_folds(labels: Labels, count: int, seed: int) -> list[Fold]:
    """The folds that the labels give, or `count` of them, stratified, with each patient in one.

    A validation part that is not given is a fifth of the patients of the training part.

    Raises:
        ValueError: a class (of survival: events or censored slides) with too few patients for as many folds.
    """
    everything = list(range(len(labels.slides)))
    if labels.parts:
        given = [{part: [i for i in everything if p[i] == part] for part in ("train", "val", "test")}
                 for p in labels.parts]  # fmt: skip
        parts = [(part["train"], part["val"], part["test"]) for part in given]
    else:
        parts = [([*train], [], [*test]) for train, test in _split(labels, everything, count, seed)]
    folds = []
    for number, (train, val, test) in enumerate(parts):
        if not val:
            most = min(_VAL_PARTS, *(_patients(labels, train)))
            if most < 2:
                raise ValueError(
                    f"expected two patients or more of each of {', '.join(labels.task.strata)} in the training part of "
                    f"fold {number}, got {_counts(labels, train)}"
                )
            ways = _split(labels, train, most, seed)
            train, val = next((way for way in ways if all(0 not in _patients(labels, part) for part in way)), ways[0])
        for name, part in (("training", train), ("validation", val)):
            if 0 in _patients(labels, part):
                counts = _counts(labels, part)
                raise ValueError(f"expected all of {', '.join(labels.task.strata)} in the {name} part of fold "
                                 f"{number}, got {counts}; take fewer folds")  # fmt: skip
        if not test:
            raise ValueError(f"expected slides in the test part of fold {number}, got none")
        folds.append(Fold(train, val, test))
    return folds


def _split(labels: Labels, chosen: list[int], count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """`count` ways to part some slides in two, by patient and stratified."""
    if min(_patients(labels, chosen)) < count:
        raise ValueError(f"expected {count} patients or more of each, for as many folds, got {_counts(labels, chosen)}")
    split = package("sklearn.model_selection").StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    strata, cases = labels.task.stratum(labels.targets)[chosen], [labels.cases[i] for i in chosen]
    pairs = split.split(np.zeros(len(chosen)), strata.numpy(), cases)
    return [([chosen[i] for i in large], [chosen[i] for i in small]) for large, small in pairs]


def _patients(labels: Labels, chosen: list[int]) -> list[int]:
    """How many patients of each stratum there are."""
    strata = labels.task.stratum(labels.targets).tolist()
    return [len({labels.cases[i] for i in chosen if strata[i] == s}) for s in range(len(labels.task.strata))]


def _counts(labels: Labels, chosen: list[int]) -> str:
    return ", ".join(f"{n} of {s}" for n, s in zip(_patients(labels, chosen), labels.task.strata, strict=True))


class FoldResult(NamedTuple):
    """What a fold's model gave for its test part: outputs `(S, O)`, targets, and the patient of each slide."""

    outputs: Tensor
    targets: Tensor
    cases: list[str]


def summarise(task: Task, tested: list[FoldResult], samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Each score's mean over folds with a 95% interval: percentiles of a bootstrap within folds.

    The means are over folds since the outputs of different models have no common scale. Patients are drawn, with all
    their slides: slides of one patient are no independent samples.

    Returns:
        By score: `mean`, `low`, `high`; NaN where no fold defines it.
    """
    rng = np.random.default_rng(seed)
    by_case = [_by_case(one.cases) for one in tested]

    def mean(numbers: list[list[int]]) -> dict[str, float]:
        each = [task.scores(one.outputs[i], one.targets[i]) for one, i in zip(tested, numbers, strict=True)]
        return {name: _mean([scores[name] for scores in each]) for name in each[0]}

    def draw(groups: list[list[int]]) -> list[int]:
        return [i for group in rng.integers(len(groups), size=len(groups)) for i in groups[group]]

    found = mean([list(range(len(one.cases))) for one in tested])
    drawn = [mean([draw(groups) for groups in by_case]) for _ in range(samples)]
    summary: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        values = [x for one in drawn if not math.isnan(x := one[name])]
        low, high = np.quantile(values, (0.025, 0.975)).tolist() if values else (math.nan, math.nan)
        summary[name] = {"mean": value, "low": low, "high": high}
    return summary


def _by_case(cases: list[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(case, []).append(i)
    return list(groups.values())


def _mean(values: list[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan
