"""Small changes of a source text, each of which a test should notice."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

_FLIPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.FloorDiv: ast.Mult, ast.Mult: ast.FloorDiv,
}  # fmt: skip
# Swapped arguments of these are the same call, or no call at all.
_NOT_SWAPPED = {"logaddexp", "isinstance", "gcd", "promote_types"}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}


class Mutation(NamedTuple):
    """One change: the text `[start, stop)` of a file becomes `new`."""

    path: str  # from the package's folder on
    start: int
    stop: int
    old: str
    new: str
    line: str  # of the file, where the change begins

    @property
    def key(self) -> str:
        """A name that stays when lines are added elsewhere in the file."""
        return f"{self.path}: {self.line}: {self.old} -> {self.new}"

    def applied(self, source: str) -> str:
        """The changed text."""
        return source[: self.start] + self.new + source[self.stop :]


def mutations(path: str, source: str) -> list[Mutation]:
    """All changes of a file, in the order of its text."""
    tree = ast.parse(source)
    left_out = {id(x) for node in ast.walk(tree) for part in _left_out(node) for x in ast.walk(part)}
    lines = source.splitlines(keepends=True)
    found: dict[str, Mutation] = {}

    def at(row: int, column: int) -> int:  # columns count bytes
        return sum(map(len, lines[: row - 1])) + len(lines[row - 1].encode()[:column].decode())

    for node in ast.walk(tree):
        if id(node) in left_out or not isinstance(node, ast.expr | ast.stmt):
            continue
        for new in _variants(node):
            start, stop = at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)
            old, line = " ".join(source[start:stop].split()), lines[node.lineno - 1].strip()
            mutation = Mutation(path, start, stop, old, new, line)
            found.setdefault(mutation.key, mutation)  # of equal lines the first
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.new))


def _left_out(node: ast.AST) -> Iterator[ast.AST]:
    """Parts that change nothing a test could see: types, decorators (sizes of caches), the words of errors."""
    match node:
        case ast.FunctionDef():
            yield from node.decorator_list
            yield from filter(None, [node.returns])
        case ast.ClassDef():
            yield from node.decorator_list
        case ast.arg(annotation=ast.AST() as annotation):
            yield annotation
        case ast.AnnAssign():
            yield node.annotation
        case ast.Raise() | ast.JoinedStr() | ast.Assert():
            yield node
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            yield node
        case ast.keyword(arg="strict"):
            yield node.value
        case ast.Call(func=ast.Attribute(attr="static_assert" | "warn") | ast.Name(id="cast" | "TypeVar")):
            yield node


def _variants(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _FLIPS:
            yield _text(node, ops=[_FLIPS[type(op)]()])
        case ast.BoolOp(op=op) | ast.BinOp(op=op) if type(op) in _FLIPS:
            yield _text(node, op=_FLIPS[type(op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield _text(node.operand)
        case ast.Constant(value=bool(value)):
            yield repr(not value)
        case ast.Constant(value=int(value)):
            yield repr(value + 1)
            if value > 0:
                yield repr(value - 1)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _NAMES:
            function = copy.deepcopy(node.func)
            setattr(function, "id" if isinstance(function, ast.Name) else "attr", _NAMES[name])
            yield _text(node, func=function)
        case ast.Call(args=[ast.Name() as first, ast.Name() as second, *others]) if first.id != second.id:
            if ast.unparse(node.func).rpartition(".")[2] not in _NOT_SWAPPED:
                yield _text(node, args=[second, first, *others])
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break():
            yield "pass"


def _text(node: ast.AST, **changes: object) -> str:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"
