"""Reads a file with libcst: which old names it has, and what keeps one from being rewritten."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import libcst as cst
from libcst.helpers import get_absolute_module_for_import
from libcst.metadata import PositionProvider, QualifiedNameProvider, QualifiedNameSource, Scope, ScopeProvider

from dilated_attention_pytorch._deprecated import PACKAGE
from dilated_attention_pytorch._old.migrate.clues import MODULES, OLD, at
from dilated_attention_pytorch._old.names import NOT_REPLACED, OldName

# A module of the present as well, so nothing that is reached through it can be reached through the package instead.
CORE = f"{PACKAGE}.core"


class Finding(NamedTuple):
    """An old name in a file."""

    line: int  # from 1
    old: str  # dotted
    new: str  # dotted; empty where there is none
    by_hand: str  # why it is not rewritten; empty where it is


class Visitor(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider, QualifiedNameProvider, ScopeProvider)

    def line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def imported(self, node: cst.CSTNode) -> str:
        """The dotted name of what an expression refers to, where that came by an import."""
        names = self.get_metadata(QualifiedNameProvider, node, set())
        found = {name.name for name in names if name.source is QualifiedNameSource.IMPORT}
        return found.pop() if len(names) == 1 and found else ""


def _now(old: str) -> str:
    """The new dotted name of an old one, or nothing."""
    return f"{PACKAGE}.{OLD[old].now}" if old in OLD else PACKAGE if old in MODULES else ""


def _missing(dotted: str) -> str:
    """Why there is nothing of a name; empty where there may be: what modules hold is not looked up."""
    module, _, name = dotted.rpartition(".")
    if module.partition(".")[0] != PACKAGE:
        return ""
    if name.startswith(NOT_REPLACED):
        return "it is not dilated attention and has no successor"
    if module not in (PACKAGE, CORE) or name.startswith("__"):
        return ""
    owner = sys.modules[module]
    there = name in {*vars(owner), *getattr(owner, "__all__", ())} or dotted in OLD or find_spec(dotted) is not None
    return "" if there else "there is nothing of this name since 0.3"


def _missing_import(dotted: str) -> str:
    """`_missing` of a name or of what it is in."""
    return next(filter(None, map(_missing, accumulate(dotted.split("."), "{}.{}".format))), "")


class Survey(Visitor):
    """Reads a file: which old names and modules it has, and what keeps one from being rewritten."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.found: list[tuple[int, str]] = []
        self.through: set[str] = set()  # names that are reached through an old module
        self.others: list[Finding] = []  # what stays where it is, without keeping the same name elsewhere
        self.reasons: dict[str, str] = {}
        self.taken: set[str] = set()  # names that the file itself gives a meaning
        self.stuck: dict[str, str] = {}  # old names and modules that stay, with the reason: from `settle`

    def by_hand(self) -> Iterator[Finding]:
        for line, old in self.found:
            if old in self.stuck:
                yield Finding(line, old, _now(old), self.stuck[old])
        yield from self.others

    def _note(self, node: cst.CSTNode, old: str, reason: str = "") -> None:
        self.found.append((self.line(node), old))
        if reason:
            self.reasons.setdefault(old, reason)

    def visit_Module(self, node: cst.Module) -> None:
        for scope in {scope for scope in self.metadata[ScopeProvider].values() if isinstance(scope, Scope)}:
            for assignment in scope.assignments:
                names = assignment.get_qualified_names_for(assignment.name)
                if not any(name.name.startswith(f"{PACKAGE}.") for name in names):
                    self.taken.add(assignment.name)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        module = get_absolute_module_for_import(None, node) or ""  # nothing for a relative one
        if module.partition(".")[0] != PACKAGE:
            return False
        if isinstance(node.names, cst.ImportStar):
            if module in MODULES:
                self._note(node, module, "what the star stands for is not known")
            return False
        for alias in node.names:
            dotted = f"{module}.{alias.evaluated_name}"
            if dotted in OLD:
                self._note(alias, dotted)
            elif dotted in MODULES and dotted != f"{PACKAGE}.dilated_attention":
                self._note(alias, dotted, "a module taken by name; take the names from the package")
            elif reason := _missing_import(dotted):
                self._note(alias, dotted, reason)
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        for alias in node.names:
            if alias.evaluated_name in MODULES:
                self._note(alias, alias.evaluated_name)
            elif reason := _missing_import(alias.evaluated_name):
                self._note(alias, alias.evaluated_name, reason)
        return False

    def visit_Name(self, node: cst.Name | cst.Attribute) -> None:
        names = {name.name for name in self.get_metadata(QualifiedNameProvider, node, set())}
        if len(names) > 1:
            for old in names & (OLD.keys() | MODULES):
                self._note(node, old, f"{at(self.path, self.line(node))} has it from one of several places")
            return
        old = self.imported(node)
        row = OLD.get(old)
        if row is None:
            if reason := _missing(old):
                self._note(node, old, reason)
            return
        if isinstance(node, cst.Attribute):
            if old.rpartition(".")[0] == CORE and not row.by_hand:
                self.others.append(Finding(self.line(node), old, _now(old), "core has other things now"))
                return
            self._note(node, old)
            if old.rpartition(".")[0] in MODULES:
                self.through.add(old)
        elif node.value == row.name:
            self._note(node, old)

    visit_Attribute = visit_Name

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if isinstance(value, str) and (value in OLD or value in MODULES):
            self.others.append(Finding(self.line(node), value, _now(value), "a string"))


def settle(surveys: list[Survey], stays: dict[OldName, str]) -> None:
    """Decides what stays in each file, given the rows that stay anyway."""
    for survey in surveys:
        for old in {old for _, old in survey.found} & OLD.keys():
            row = OLD[old]
            if row.by_hand:
                stays[row] = row.by_hand
            elif old in survey.reasons:
                stays.setdefault(row, survey.reasons[old])
            elif row.now != row.name and row.now in survey.taken:
                stays.setdefault(row, f"{survey.path or 'this file'} has a {row.now} of its own")
    before = -1
    while before != (before := len(stays) + sum(len(survey.reasons) for survey in surveys)):
        for survey in surveys:
            here = survey.path or "this file"
            rows = {old: OLD[old] for _, old in survey.found if old in OLD}
            kept = {row.name for old, row in rows.items() if row in stays and old not in survey.through}
            for old, row in rows.items():
                module = old.rpartition(".")[0]
                if row.now != row.name and row.now in kept:
                    stays.setdefault(row, f"{here} keeps the old {row.now}")
                if old in survey.through and row in stays:
                    survey.reasons.setdefault(module, f"{row.name} is reached through it")
                # Where another class stands in for it, it is not the one that the other files would take.
                if old in survey.through and module in survey.reasons and row.stand_in.startswith("_old."):
                    stays.setdefault(row, f"{here} reaches it through {module}, which stays")
    for survey in surveys:
        survey.stuck = {old: stays[OLD[old]] for _, old in survey.found if OLD.get(old) in stays}
        survey.stuck |= {old: reason for old, reason in survey.reasons.items() if old not in OLD}
