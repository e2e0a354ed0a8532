"""Finds uses of old names that a rename would break: strings, star imports, `isinstance`, masks.

With `ast`, which is fast: also files that never name the package are read. It takes what may be a use for one, since a
name that is left alone works.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

from dilated_attention_pytorch._deprecated import PACKAGE
from dilated_attention_pytorch._old.names import BY_PLACE, OLD_MODULES, OldName

# Dotted old name to its row.
OLD: dict[str, OldName] = {
    f"{PACKAGE}.{place}.{name}" if place else f"{PACKAGE}.{name}": row
    for place, names in BY_PLACE.items()
    for name, row in names.items()
}
MODULES = {f"{PACKAGE}.{place}" for place in OLD_MODULES}
# Names that are rewritten to another one, so that whoever knows the old one by heart loses it.
_RENAMED = {row.name for row in OLD.values() if not row.by_hand and row.now != row.name}
# Their old `forward` took an `attention_mask`, after `is_causal`.
_TOOK_MASK = {"DilatedAttention", "RingDilatedAttention"}
_ASKS = {"isinstance", "issubclass", "register"}
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def at(path: str, line: int) -> str:
    """A place, in words."""
    return f"{path}:{line}" if path else f"line {line}"


class Clues:
    """What the files that were read know."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # bare old names that have to stay, with the reason
        self.masked = ""  # where an old `forward` may be given its mask
        self.apart: dict[str, str] = {}  # dotted names that are told from other classes, and where
        self.present: set[str] = set()  # all dotted names

    def stays(self) -> dict[OldName, str]:
        """Rows whose name stays, with the reason."""
        stays = {row: self.names[row.name] for row in OLD.values() if row.name in self.names}
        for row in OLD.values():
            if self.masked and row.now in _TOOK_MASK:
                stays.setdefault(row, f"{self.masked} passes attention_mask or a fifth argument, which it refuses now")
        for old, place in self.apart.items():
            row = OLD[old]
            if any(OLD[name] != row if name in OLD else True for name in self.present if _becomes(name) == row.now):
                stays.setdefault(row, f"{place} tells it from what will be the same class")
        return stays

    def read(self, path: str, source: bytes) -> None:
        """Adds a file.

        Raises:
            SyntaxError, ValueError: it does not parse.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            nodes = list(ast.walk(ast.parse(source)))
        imports = dict(_imports(nodes))
        self.present |= set(imports.values())
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        bound |= {node.name for node in nodes if isinstance(node, _DEFINITIONS)}
        bound |= {node.arg for node in nodes if isinstance(node, ast.arg)} | set(imports)

        def dotted(node: ast.AST) -> str:
            if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
                return f"{owner}.{node.attr}"
            return imports.get(node.id, "") if isinstance(node, ast.Name) else ""

        def stays(name: str, node: ast.AST, reason: str) -> None:
            if name in _RENAMED:
                self.names.setdefault(name, f"{at(path, getattr(node, 'lineno', 0))} {reason}")

        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                ours = not node.level and (node.module or "").partition(".")[0] == PACKAGE
                for alias in node.names:
                    if not ours:
                        stays(alias.name, node, "takes it from another module, by this name")
                    elif alias.asname is None and alias.name not in used:
                        stays(alias.name, node, "imports it and does not use it: others may take it from there")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in _names_in(node.value):
                    stays(name, node, "has it in a string")
            elif isinstance(node, ast.Name) and node.id not in bound:
                stays(node.id, node, "has it from a star import")
            elif isinstance(node, ast.Attribute) and dotted(node).partition(".")[0] != PACKAGE:
                stays(node.attr, node, "takes it from another module, by this name")
            elif isinstance(node, ast.Call) and not self.masked and _gives_mask(node):
                self.masked = at(path, node.lineno)
            if isinstance(node, ast.Name | ast.Attribute):
                self.present.add(dotted(node))
            for inner in (name for one in _told_apart(node) for name in ast.walk(one)):
                if (name := dotted(inner)) in OLD:
                    self.apart.setdefault(name, at(path, getattr(inner, "lineno", 0)))


def _imports(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Names that imports bind, with the dotted name of what they stand for."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def _becomes(dotted: str) -> str:
    """The new name of something of the package, whether it has it already or not."""
    if dotted in OLD:
        return OLD[dotted].now
    return dotted.rpartition(".")[2] if dotted.startswith(f"{PACKAGE}.") else ""


def _names_in(text: str) -> set[str]:
    """Old names in a string that is code: an annotation, an entry of `__all__`, what is patched, a doctest."""
    if not any(name in text for name in _RENAMED):
        return set()
    if ">>>" in text:
        return set(re.findall(r"\w+", text))
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError):
        return set()
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _called(call: ast.Call) -> str:
    """The last part of what a call calls."""
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _gives_mask(call: ast.Call) -> bool:
    """Whether a call may be one of an old `forward`, with its `attention_mask`: `(q, k, v, is_causal, mask)`."""
    args, keywords, last = call.args, {keyword.arg for keyword in call.keywords}, _called(call)
    tensors = [*args[:3], *(keywords & {"query", "key", "value"})]
    data = (ast.Constant, ast.List, ast.Tuple, ast.Dict)
    if len(tensors) < 3 or last == "__init__" or last[:1].isupper() or any(isinstance(x, data) for x in tensors):
        return False
    if "attention_mask" in keywords or len(args) != 5:
        return "attention_mask" in keywords
    flag, mask = (ast.unparse(arg).lower() for arg in args[3:])
    return "causal" in flag or flag in {"true", "false"} or "mask" in mask or mask == "none"


def _told_apart(node: ast.AST) -> list[ast.expr]:
    """The parts of a node whose meaning changes where two classes become one."""
    match node:
        case ast.Call() if _called(node) in _ASKS:
            return node.args
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.Dict():
            return [key for key in node.keys if key is not None]
        case ast.Set() | ast.List() | ast.Tuple():
            return [one for one in node.elts if isinstance(one, ast.Name | ast.Attribute)]
        case ast.MatchClass():
            return [node.cls]
        case ast.ClassDef(bases=[_, _, *_]):
            return node.bases
    return []
