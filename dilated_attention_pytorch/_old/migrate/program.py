"""Finds the names of 0.1 and 0.2 in a code base and writes the new ones in their place, with libcst.

What is rewritten means the same under the new name: the new class takes the old call. Everything else is listed, with
the reason why it is left to its author. A name that one file keeps is kept by all of them: what one makes, another may
take by its name, call with a mask, or ask `isinstance`. What is kept works, through `names.TABLE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

try:
    import libcst as cst
    from libcst.helpers import get_absolute_module_for_import, get_full_name_for_node
    from libcst.metadata import MetadataWrapper
except ImportError as error:
    raise ImportError(
        "expected libcst, which reads and writes the code, found none: pip install 'dilated-attention-pytorch[migrate]'"
    ) from error

from dilated_attention_pytorch._deprecated import PACKAGE
from dilated_attention_pytorch._old.migrate.clues import MODULES, OLD, Clues
from dilated_attention_pytorch._old.migrate.survey import CORE, Finding, Survey, Visitor, settle


class Migrated(NamedTuple):
    """One file: its old names, and the source before and after."""

    findings: list[Finding]
    before: bytes
    after: bytes


def migrate(sources: Iterable[tuple[str, bytes]]) -> dict[str, Migrated | ValueError]:
    """The old names in files by path, and the files with those rewritten that can be; the error of one that cannot.

    Give all of a program at once: a name that one file takes from another stays, and only together do they show it.
    """
    done: dict[str, Migrated | ValueError] = {}
    clues = Clues()
    read: dict[str, tuple[bytes, MetadataWrapper, Survey]] = {}
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
        survey = Survey(path)
        read[path] = source, MetadataWrapper(module, unsafe_skip_copy=True), survey
        read[path][1].visit(survey)
    settle([survey for _, _, survey in read.values()], clues.stays())
    for path, (source, wrapper, survey) in read.items():
        after = wrapper.visit(rewrite := Rewrite(survey.stuck))
        findings = sorted({*survey.by_hand(), *rewrite.done}, key=lambda finding: (finding.line, finding.old))
        done[path] = Migrated(findings, source, after.bytes if rewrite.done else source)
    return done


class Rewrite(Visitor):
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

    def visit_ImportFrom(self, node: cst.ImportFrom | cst.Import) -> bool:
        return False

    visit_Import = visit_ImportFrom

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
        if not new or module in self.stuck or module == CORE:
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
        aliases = list(original_node.names)
        for i, alias in enumerate(aliases):
            if (module := alias.evaluated_name) in MODULES and module not in self.stuck:
                self._did(alias, module, "")
                aliases[i] = alias.with_changes(name=cst.Name(PACKAGE))
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
        module = get_absolute_module_for_import(None, statement)
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
        for names in (stay, move):
            if names and statement.rpar is None:  # without brackets nothing may follow the last name
                names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return stay, move if changed else []
