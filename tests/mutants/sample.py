"""What is mutated, by which tests it is judged, and which mutants are known to change nothing."""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from mutants.mutations import Mutation, mutations

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = "dilated_attention_pytorch"
Drawn = tuple[str, Mutation, list[str]]  # with area and tests


class Area(NamedTuple):
    """A part of the package."""

    share: int  # mutants per round of the draw
    files: dict[str, list[str]]  # the tests of each


def areas() -> dict[str, Area]:
    """The parts, by name."""
    found: dict[str, Area] = {}
    files = sorted(path.relative_to(ROOT / PACKAGE).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
    for area, patterns in tomllib.loads((HERE / "covering.toml").read_text()).items():
        found[area] = Area(patterns.pop("share"), {})
        for file in files:
            for pattern, tests in patterns.items():
                if fnmatch(file, pattern.replace("**/", "*")) and (
                    "**" in pattern or _folder(file) == _folder(pattern)
                ):
                    found[area].files.setdefault(file, tests)
    return found


def equivalent() -> dict[str, str]:
    """Mutants that compute the same, by key, each with the reason."""
    return {entry["key"]: entry["why"] for entry in tomllib.loads((HERE / "equivalent.toml").read_text())["mutant"]}


def of_file(file: str) -> list[Mutation]:
    """All mutants of a file."""
    return mutations(file, (ROOT / PACKAGE / file).read_text(encoding="utf-8"))


def draw(count: int, seed: int, chosen: list[str]) -> list[Drawn]:
    """Mutants of the areas in turn, with area and tests. A change of one file leaves the draws in the others alone."""
    lists = []
    for name, area in areas().items():
        if not chosen or name in chosen:
            all_of = [(name, mutation, tests) for file, tests in area.files.items() for mutation in of_file(file)]
            all_of.sort(key=lambda one: hashlib.sha256(f"{seed} {one[1].key}".encode()).digest())
            lists.append(_batches(all_of, area.share))
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*lists, fillvalue=()))
    return list(itertools.islice(itertools.chain.from_iterable(rounds), count))


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _batches(values: list[Drawn], size: int) -> Iterator[list[Drawn]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]
