"""The table of labels, read and held to the folder of features: every mistake is one line, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.validation import listed, quoted
from dilated_attention_pytorch.models.slide.files import find_slides
from dilated_attention_pytorch.models.slide.formats import package
from dilated_attention_pytorch.models.slide.tune.tasks import Classification, Survival, Task

# As CLAM and Patho-Bench, prov-gigapath, and STAMP name them.
_SLIDE, _CASE = ("slide_id", "slide", "FILENAME"), ("case_id", "pat_id", "PATIENT", "patient_id", "patient")
_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Labels(NamedTuple):
    """Slides with what is known of them; S slides, in the table's order.

    Attributes:
        slides: the name of each, as the table has it.
        cases: the patient of each; the slide's own name where the table has none.
        paths: the feature file of each.
        targets: as the task takes them, first dimension S.
        task: what is learned.
        parts: for each fold that the table gives, the part of each slide: train, val, test or "" for none.
    """

    slides: list[str]
    cases: list[str]
    paths: list[Path]
    targets: Tensor
    task: Task
    parts: list[list[str]]


def read_labels(
    file: Path,
    features: Path,
    *,
    label: str = "label",
    time: str | None = None,
    event: str | None = None,
    skip_missing: bool = False,
) -> Labels:
    """Read a table of labels.

    Args:
        file: `.csv` or `.tsv`, a row per slide. Columns: the slide's name (slide_id, slide, FILENAME), the patient
            (case_id, pat_id, PATIENT, patient_id, patient; may be missing), the label, and folds if they are given:
            `fold` with the number of the fold that tests a slide, or `fold_0`, `fold_1`, ... with train, val or test.
        features: folder of feature files, named as slides are, with or without the ending.
        label: the column of classes; not used with `time`.
        time: the column of times, for survival.
        event: the column that has 1 where the event happened. Of a column whose name begins with "censor" 0 is.
        skip_missing: leave out slides without features.

    Returns:
        The labels.

    Raises:
        ValueError: columns that are not there, slides twice, values missing or of the wrong kind, slides without
            features, one class alone, a patient in two parts of a fold.
        ImportError: pandas is not installed.
    """
    if (time is None) != (event is None):
        raise ValueError(
            f"expected {'time' if time is None else 'event'}, which {quoted(event or time)} needs, got none"
        )
    table = _read(file)
    slide, case = _column(table, _SLIDE, file), next((name for name in _CASE if name in table), None)
    wanted = [label] if time is None or event is None else [time, event]
    for name in wanted:
        _column(table, (name,), file)
    for name in [slide, *([] if case is None else [case]), *wanted]:
        empty = table[table[name].isna()]
        if len(empty):
            rows = [f"{row[slide]} (line {i + 2})" for i, row in empty.iterrows()]
            raise ValueError(f"expected a value in every row of column {name}, got none for {listed(rows)}")
    twice = table[slide][table[slide].duplicated()].unique()
    if len(twice):
        raise ValueError(f"expected a row per slide, got several for {listed(twice)}")
    known = {path.stem: path for path in find_slides(features)}
    found = [known.get(name, known.get(Path(name).stem)) for name in table[slide]]
    missing = [name for name, path in zip(table[slide], found, strict=True) if path is None]
    if missing and not (skip_missing and len(missing) < len(table)):
        raise ValueError(
            f"expected a feature file of every slide in {features}, got none of {len(missing):,}: {listed(missing)}; "
            "skip_missing=True leaves them out"
        )
    table = table[[path is not None for path in found]]
    paths = [path for path in found if path is not None]
    task, targets = _classes(table[label]) if time is None or event is None else _survival(table, slide, time, event)
    cases = table[slide if case is None else case].tolist()
    return Labels(table[slide].tolist(), cases, paths, targets, task, _parts(table, cases))


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"expected a file of labels, got {file}")
    try:
        table = package("pandas").read_csv(file, dtype=str, sep="\t" if file.suffix == ".tsv" else ",")
    except ValueError as error:  # pandas' own errors, and bytes that are no text
        raise ValueError(f"expected {file} to hold a table, got: {str(error).strip().splitlines()[0]}") from error
    if table.empty:
        raise ValueError(f"expected rows of slides in {file}, got none")
    return table.apply(lambda column: column.str.strip().replace("", None))


def _column(table: Any, names: tuple[str, ...], file: Path) -> str:
    for name in names:
        if name in table:
            return name
    raise ValueError(f"expected a column {listed(names, ' or ')} in {file}, got {listed(table.columns, most=20)}")


def _classes(column: Any) -> tuple[Task, Tensor]:
    names = sorted(column.unique(), key=lambda text: (0, float(text), "") if _is_number(text) else (1, 0.0, text))
    if len(names) < 2:
        raise ValueError(f"expected at least two classes in column {column.name}, got {names[0]} alone")
    if len(names) > max(2, len(column) // 2):
        raise ValueError(
            f"expected classes in column {column.name}, got {len(names)} values of {len(column)} slides; of times, "
            "give time and event"
        )
    return Classification(tuple(names)), torch.tensor([names.index(text) for text in column], device="cpu")


def _survival(table: Any, slide: str, time: str, event: str) -> tuple[Task, Tensor]:
    values = []
    for name, fits, words in (
        (time, lambda x: 0 < x < 1e9, "numbers above 0"),
        (event, lambda x: x in (0.0, 1.0), "0 or 1"),
    ):
        wrong = [f"{t} for {s}" for s, t in zip(table[slide], table[name], strict=True) if not _is_number(t, fits)]
        if wrong:
            raise ValueError(f"expected {words} in column {name}, got {listed(wrong)}")
        values.append(torch.tensor([float(text) for text in table[name]], device="cpu"))
    happened = 1.0 - values[1] if event.lower().startswith("censor") else values[1]
    if not 0 < float(happened.sum()) < len(happened):
        state = "events" if bool(happened.all()) else "censored slides"
        raise ValueError(f"expected events and censored slides in column {event}, got {state} alone")
    return Survival(), torch.stack((values[0], happened), 1)


def _is_number(text: str, fits: Any = lambda _: True) -> bool:
    try:
        return bool(fits(float(text)))
    except ValueError:
        return False


def _parts(table: Any, cases: list[str]) -> list[list[str]]:
    """The folds that the table gives."""
    names = sorted((n for n in table if re.fullmatch(r"fold_?\d+", n)), key=lambda n: int(re.sub(r"\D", "", n)))
    folds: list[tuple[str, list[str]]] = []
    if "fold" in table and not names:
        numbers = table["fold"].fillna("").tolist()
        if len(set(numbers)) < 2 or "" in numbers:
            raise ValueError(f"expected several folds in column fold, one for each slide, got {listed(set(numbers))}")
        _check_apart("fold", cases, numbers)
        each = sorted(set(numbers))
        folds = [(one, ["test" if number == one else "train" for number in numbers]) for one in each]
    for name in names:
        words = table[name].fillna("").str.lower().tolist()
        unknown = sorted(set(words) - {*_PARTS, ""})
        if unknown:
            raise ValueError(f"expected train, val or test in column {name}, got {listed(unknown)}")
        part = [_PARTS.get(word, "") for word in words]
        _check_apart(name, cases, part)
        folds.append((name, part))
    return [part for _, part in folds]


def _check_apart(name: str, cases: list[str], parts: list[str]) -> None:
    first: dict[str, str] = {}
    for case, part in zip(cases, parts, strict=True):
        if part and first.setdefault(case, part) != part:
            raise ValueError(f"expected each patient in one part of {name}, got {case} in {first[case]} and {part}")
