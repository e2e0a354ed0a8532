"""Finds the names of 0.1 and 0.2 in a code base and writes the new ones in their place, with libcst.

What is rewritten means the same under the new name: the new class takes the old call. Everything else is listed, with
the reason why it is left to its author. A name that one file keeps is kept by all of them: what one makes, another may
take by its name, call with a mask, or ask `isinstance`. What is kept works, through `_deprecated.TABLE`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

try:
    import libcst as cst
    from libcst.helpers import get_full_name_for_node
    from libcst.metadata import (
        MetadataWrapper,
        PositionProvider,
        QualifiedNameProvider,
        QualifiedNameSource,
        Scope,
        ScopeProvider,
    )
except ImportError as error:
    raise ImportError(
        "expected libcst, which reads and writes the code, found none: pip install 'dilated-attention-pytorch[migrate]'"
    ) from error

from dilated_attention_pytorch._clues import MODULES, OLD, Clues, at
from dilated_attention_pytorch._deprecated import NOT_REPLACED, PACKAGE, OldName

# A module of the present as well, so nothing that is reached through it can be reached through the package instead.
_CORE = f"{PACKAGE}.core"


class Finding(NamedTuple):
    """An old name in a file.

    Attributes:
        line: where it is, from 1.
        old: the old name, dotted.
        new: the new one, dotted; empty where there is none.
        by_hand: why it is not rewritten; empty where it is.
    """

    line: int
    old: str
    new: str
    by_hand: str


class Migrated(NamedTuple):
    """One file: its old names, and the source before and after."""

    findings: list[Finding]
    before: bytes
    after: bytes


def python_files(path: Path) -> Iterator[Path]:
    """The Python files under a folder, without hidden folders and virtual environments; or the file itself.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder at {path}, found none")
    if path.is_file():
        yield path
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__pycache__")) and not Path(folder, name, "pyvenv.cfg").exists()
        )
        yield from (Path(folder, name) for name in sorted(files) if name.endswith((".py", ".pyi")))


def migrate(sources: Iterable[tuple[str, bytes]]) -> dict[str, Migrated | ValueError]:
    """The old names in files by path, and the files with those rewritten that can be; the error of one that cannot.

    Give all of a program at once: a name that one file takes from another stays, and only together do they show it.
    """
    done: dict[str, Migrated | ValueError] = {}
    clues = Clues()
    read: dict[str, tuple[bytes, MetadataWrapper, _Survey]] = {}
    for path, source in sources:
        done[path] = Migrated([], source, source)
        ours = PACKAGE.encode() in source
        try:
            clues.read(path, source)
            module = cst.parse_module(source if ours else b"")
        except (cst.ParserSyntaxError, SyntaxError, ValueError, LookupError) as error:
            reason = error.message if isinstance(error, cst.ParserSyntaxError) else str(error)
            if ours:
                done[path] = ValueError(f"expected Python source, got what does not parse: {reason}")
            continue
        if not ours:
            continue
        survey = _Survey(path)
        read[path] = source, MetadataWrapper(module, unsafe_skip_copy=True), survey
        read[path][1].visit(survey)
    _settle([survey for _, _, survey in read.values()], clues.stays())
    for path, (source, wrapper, survey) in read.items():
        rewrite = _Rewrite(survey.stuck)
        after = wrapper.visit(rewrite)
        findings = sorted({*survey.by_hand(), *rewrite.done}, key=lambda finding: (finding.line, finding.old))
        done[path] = Migrated(findings, source, after.bytes if rewrite.done else source)
    return done


def migrate_source(source: bytes) -> Migrated:
    """`migrate` of a program that is one file.

    Raises:
        ValueError: the source cannot be parsed.
    """
    (result,) = migrate([("", source)]).values()
    if isinstance(result, ValueError):
        raise result
    return result


def write_atomically(path: Path, source: bytes) -> None:
    """Puts a source in the place of a file, whole, with the file's own mode; a link stays one."""
    target = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, name)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


class _Visitor(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider, QualifiedNameProvider, ScopeProvider)

    def line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def imported(self, node: cst.CSTNode) -> str:
        """The dotted name of what an expression refers to, where that came by an import."""
        names = self.get_metadata(QualifiedNameProvider, node, set())
        found = {name.name for name in names if name.source is QualifiedNameSource.IMPORT}
        return found.pop() if len(names) == 1 and found else ""


def _from(node: cst.ImportFrom) -> str:
    """The module of `from module import ...`; empty for a relative one."""
    return "" if node.relative or node.module is None else get_full_name_for_node(node.module) or ""


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
    if module not in (PACKAGE, _CORE) or name.startswith("__"):
        return ""
    owner = sys.modules[module]
    folder = Path(owner.__path__[0])
    there = name in {*vars(owner), *getattr(owner, "__all__", ())} or (folder / name).is_dir() or dotted in OLD
    return "" if there or (folder / f"{name}.py").exists() else "there is nothing of this name since 0.3"


def _missing_import(dotted: str) -> str:
    """`_missing` of a name or of what it is in."""
    return next(filter(None, map(_missing, accumulate(dotted.split("."), "{}.{}".format))), "")


class _Survey(_Visitor):
    """Reads a file: which old names and modules it has, and what keeps one from being rewritten."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.found: list[tuple[int, str]] = []
        self.through: set[str] = set()  # names that are reached through an old module
        self.others: list[Finding] = []  # what stays where it is, without keeping the same name elsewhere
        self.reasons: dict[str, str] = {}
        self.taken: set[str] = set()  # names that the file itself gives a meaning
        self.stuck: dict[str, str] = {}  # old names and modules that stay, with the reason: from `_settle`

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
        module = _from(node)
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

    def visit_Name(self, node: cst.Name) -> None:
        self._use(node)

    def visit_Attribute(self, node: cst.Attribute) -> None:
        self._use(node)

    def _use(self, node: cst.Name | cst.Attribute) -> None:
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
            if old.rpartition(".")[0] == _CORE and not row.by_hand:
                self.others.append(Finding(self.line(node), old, _now(old), "core has other things now"))
                return
            self._note(node, old)
            if old.rpartition(".")[0] in MODULES:
                self.through.add(old)
        elif node.value == row.name:
            self._note(node, old)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if isinstance(value, str) and (value in OLD or value in MODULES):
            self.others.append(Finding(self.line(node), value, _now(value), "a string"))


def _settle(surveys: list[_Survey], stays: dict[OldName, str]) -> None:
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


class _Rewrite(_Visitor):
    """Writes the new names."""

    def __init__(self, stuck: dict[str, str]) -> None:
        super().__init__()
        self.stuck = stuck
        self.done: set[Finding] = set()

    def _new(self, old: str) -> str:
        """The new name, or nothing where the old one stays."""
        row = OLD.get(old)
        return "" if row is None or old in self.stuck else row.now

    def _did(self, node: cst.CSTNode, old: str, new: str) -> None:
        self.done.add(Finding(self.line(node), old, f"{PACKAGE}.{new}" if new else PACKAGE, ""))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        old = self.imported(original_node)
        new = self._new(old)
        if not new or original_node.value != OLD[old].name or new == original_node.value:
            return updated_node
        self._did(original_node, old, new)
        return updated_node.with_changes(value=new)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        old = self.imported(original_node)
        new = self._new(old)
        module = old.rpartition(".")[0]
        if not new or module in self.stuck or module == _CORE:
            return updated_node
        changed = updated_node.with_changes(attr=cst.Name(new))
        if get_full_name_for_node(original_node.value) == module and module in MODULES:
            # Spelled in full, as `import package.module` has it: the module goes, the package stays.
            changed = changed.with_changes(value=cst.ensure_type(updated_node.value, cst.Attribute).value)
        if changed.deep_equals(original_node):
            return updated_node
        self._did(original_node, old, new)
        return changed

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        aliases = []
        for alias in original_node.names:
            module = alias.evaluated_name
            if module in MODULES and module not in self.stuck:
                self._did(alias, module, "")
                alias = alias.with_changes(name=cst.Name(PACKAGE))
            aliases.append(alias)
        return updated_node.with_changes(names=aliases)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        lines = [updated_node]
        for i, statement in enumerate(original_node.body):
            if not isinstance(statement, cst.ImportFrom) or isinstance(statement.names, cst.ImportStar):
                continue
            stay, move = self._sorted_aliases(statement)
            if not move:
                continue
            moved = statement.with_changes(module=cst.Name(PACKAGE), names=move)
            # Where some names stay, they keep their line, and the others get one of their own before it.
            if stay:
                lines.insert(0, cst.SimpleStatementLine([moved.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)]))
                moved = statement.with_changes(names=stay)
            body = [*lines[-1].body[:i], moved, *lines[-1].body[i + 1 :]]
            lines[-1] = lines[-1].with_changes(body=body)
        if len(lines) == 1:
            return lines[0]
        lines[0] = lines[0].with_changes(leading_lines=lines[-1].leading_lines)
        lines[-1] = lines[-1].with_changes(leading_lines=[])
        return cst.FlattenSentinel(lines)

    def _sorted_aliases(self, statement: cst.ImportFrom) -> tuple[list[cst.ImportAlias], list[cst.ImportAlias]]:
        """What an import keeps, and what it takes from the package instead; each name once."""
        module = _from(statement)
        stay: list[cst.ImportAlias] = []
        move: list[cst.ImportAlias] = []
        seen: set[tuple[str, str | None]] = set()
        changed = False
        assert not isinstance(statement.names, cst.ImportStar)
        for alias in statement.names:
            new = self._new(f"{module}.{alias.evaluated_name}")
            if new:
                changed = True
                self._did(alias, f"{module}.{alias.evaluated_name}", new)
                alias = alias.with_changes(name=cst.Name(new))
            if (alias.evaluated_name, alias.evaluated_alias) not in seen:
                seen.add((alias.evaluated_name, alias.evaluated_alias))
                # An import of the package itself stays one, in its order.
                (move if new or module == PACKAGE else stay).append(alias)
        return _with_commas(stay, statement), _with_commas(move, statement) if changed else []


def _with_commas(names: list[cst.ImportAlias], statement: cst.ImportFrom) -> list[cst.ImportAlias]:
    """Commas between the names of a list from which some have gone."""
    for i, alias in enumerate(names):
        last = i == len(names) - 1
        if last and statement.rpar is None:
            names[i] = alias.with_changes(comma=cst.MaybeSentinel.DEFAULT)
        elif not last and alias.comma is cst.MaybeSentinel.DEFAULT:
            names[i] = alias.with_changes(comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))
    return names
