"""Measures the code of the package: its size, signatures, names, imports, comments and the way to a launch.

    python tools/measure_code.py             # this tree
    python tools/measure_code.py ../old .    # two checkouts side by side; lists and --check are of the last
    python tools/measure_code.py --check     # exit code 1 where a limit is missed

- **lines**: newlines of every `.py` file of the package, `_old/` too, as `wc -l` counts them.
- **long signatures**: functions and methods with ten or more parameters. `self` and `cls` are not counted, `*args` and
  `**kwargs` count one each. Kernels (decorated with `triton.jit`) and public signatures are left out. Public are
  functions, and methods of classes (constructors included), that have no leading underscore, stand in a module whose
  dotted name has none, and whose own or whose class's name is in an `__all__` of the package or documented in
  `docs/api.md`; and the commands of `cli/` (functions named as their file), whose parameters are their options.
- **frames**: Python frames of the package on the stack when a kernel is launched, from `dilated_attention` on, which
  is the first; the most of any launch of a call. Counted in Triton's interpreter, so a CPU will do.
- **comments**: lines with nothing but a `#` comment, in percent of all lines; docstrings are not counted. Below them
  the lines with any comment, those behind code included.
- **class names twice**: names that two classes of the package have, nested ones included.
- **import cycles**: groups of files that import one another, wherever the import stands: at the top, inside a
  function or under `if TYPE_CHECKING`. The packages above an imported module do not count.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "dilated_attention_pytorch"
COMMENTED = ("kernels", "ring_attention", "streaming")
AT_ROOT = "files at the root"
LONG_SIGNATURE, LONG_MODULE = 10, 450
# What a measure may be at most; a share of comments is at least.
LIMITS = {
    "lines": 17_500,
    "long signatures": 8,
    "frames, first call": 6,
    **{f"comments in {part}, %": 4.0 for part in COMMENTED},
    "class names twice": 0,
    "import cycles": 0,
    f"modules over {LONG_MODULE} lines": 0,
}


class File(NamedTuple):
    """A source file: its path within the package, its dotted name, text and syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def part(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else AT_ROOT


def read(root: Path) -> list[File]:
    """Every file of the package in a checkout."""
    files = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        inner, text = path.relative_to(root / PACKAGE), path.read_text(encoding="utf-8")
        module = ".".join([PACKAGE, *inner.with_suffix("").parts]).removesuffix(".__init__")
        files.append(File(inner.as_posix(), module, text, ast.parse(text)))
    if not files:
        raise SystemExit(f"error: expected a checkout with a folder {PACKAGE}/, got {root}")
    return files


def public_names(root: Path, files: list[File]) -> set[str]:
    """Names in an `__all__`, and those that docs/api.md documents."""
    found: set[str] = set()
    for node in (node for file in files for node in file.tree.body):
        if isinstance(node, ast.Assign) and any(ast.unparse(x) == "__all__" for x in node.targets):
            found |= {str(x.value) for x in ast.walk(node.value) if isinstance(x, ast.Constant)}
    text = (root / "docs" / "api.md").read_text(encoding="utf-8")
    return found | set(re.findall(r"^::: \S+\.(\w+)", text, re.MULTILINE))


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function under a node, with the name of the class it is a method of."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, child
            yield from functions(child)
        else:
            yield from functions(child, child.name if isinstance(child, ast.ClassDef) else owner)


def long_signatures(files: list[File], public: set[str]) -> list[str]:
    found = []
    for file in files:
        hidden = any(part.startswith("_") for part in file.module.split("."))
        for owner, function in functions(file.tree):
            name, args = function.name, function.args
            given = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            count = sum(x is not None and x.arg not in {"self", "cls"} for x in given)
            kernel = any("jit" in ast.unparse(x) for x in function.decorator_list)
            command = file.path == f"cli/{name}.py"
            named = (owner or name) in public and (name == "__init__" or not name.startswith("_"))
            if count >= LONG_SIGNATURE and not (kernel or command or (named and not hidden)):
                found.append(f"{file.path}:{function.lineno} {owner and owner + '.'}{name} ({count})")
    return found


def imported(file: File, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    package = file.module.split(".") if file.path.endswith("__init__.py") else file.module.split(".")[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found |= {x.name for x in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:  # a submodule, or a name of the module itself
                found |= {f"{source}.{name.name}"} & modules or {source} & modules
    return found - {file.module}


def cycles(files: list[File]) -> list[str]:
    """Groups of files each of which reaches all others of its group."""
    modules = {file.module for file in files}
    edges = {file.module: imported(file, modules) for file in files}
    reach: dict[str, set[str]] = {}
    for start in modules:
        seen, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        reach[start] = seen
    groups = {frozenset(x for x in reach[m] if m in reach[x]) for m in modules if m in reach[m]}
    return sorted(", ".join(sorted(x.removeprefix(f"{PACKAGE}.") for x in group)) for group in groups)


def names_twice(files: list[File]) -> list[str]:
    places = defaultdict(list)
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file.path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]


def comments(files: list[File]) -> tuple[float, float]:
    """The share of comment lines, and of lines with any comment, in percent."""
    tokens = (token for file in files for token in tokenize.generate_tokens(io.StringIO(file.text).readline))
    lines = [token.line for token in tokens if token.type == tokenize.COMMENT]
    total = max(sum(file.lines for file in files), 1)
    return 100 * sum(line.lstrip().startswith("#") for line in lines) / total, 100 * len(lines) / total


# Runs in a process of its own, with the tree's package in front. Two aligned lengths, then two that do not align.
FRAMES = """
import json, os, sys
import torch
from triton.runtime.interpreter import InterpretedFunction
import dilated_attention_pytorch as package
folder, run, counts = os.path.dirname(os.path.realpath(package.__file__)), InterpretedFunction.run, []
def counted(self, *args, **kwargs):
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        depth += os.path.realpath(frame.f_code.co_filename).startswith(folder + os.sep)
        frame = frame.f_back
    counts.append(depth)
    return run(self, *args, **kwargs)
InterpretedFunction.run = counted
def most(n, lengths, gradients=False):
    counts.clear()
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=gradients) for _ in range(3))
    package.dilated_attention(q, k, v, segment_lengths=lengths, dilation_rates=[1, 2], backend="triton")
    return max(counts)
print(json.dumps([folder, {"frames, first call": most(128, [32, 64]), "frames, repeated call": most(128, [32, 64]),
    "frames, first call with gradients": most(256, [32, 64], True),
    "frames, first call, lengths that do not align": most(101, [30, 70])}]))
"""


def frames(root: Path) -> dict[str, int]:
    """Python frames from `dilated_attention` to a launch, by kind of call."""
    env = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", FRAMES], env=env, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: expected to count the frames of a call in {root}, got\n{done.stderr[-2000:]}")
    folder, counts = json.loads(done.stdout.splitlines()[-1])
    assert Path(folder) == root / PACKAGE, f"measured another installation: {folder}"
    return counts


def measure(root: Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Every measure of a tree, and what was counted for some of them."""
    files = read(root := root.resolve())
    sizes = sorted(((file.lines, file.path) for file in files), reverse=True)
    found = {
        "long signatures": long_signatures(files, public_names(root, files)),
        "class names twice": names_twice(files),
        "import cycles": cycles(files),
        f"modules over {LONG_MODULE} lines": [f"{path} ({n})" for n, path in sizes if n > LONG_MODULE],
    }
    parts = {part: [file for file in files if file.part == part] for part in {file.part for file in files}}
    by_part = Counter({part: sum(file.lines for file in its) for part, its in parts.items()})
    measured: dict[str, float] = {"lines": by_part.total(), "modules at the root": len(parts[AT_ROOT])}
    measured |= {name: len(what) for name, what in found.items()} | frames(root)
    for part in COMMENTED:
        alone, with_code = comments(parts[part])
        measured |= {f"comments in {part}, %": alone, f"lines with a comment in {part}, %": with_code}
    measured |= {f"lines of {part}": n for part, n in by_part.most_common()}
    return measured, found | {"largest modules": [f"{path} ({n})" for n, path in sizes[:8]]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures the code of the package.")
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parents[1]], help="checkouts")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the last tree misses a limit")
    options = parser.parse_args(arguments)
    results = [measure(tree) for tree in options.trees]
    measured, found = results[-1]
    print(f"| measure | {' | '.join(tree.resolve().name for tree in options.trees)} | limit |")
    print("|---" * (len(results) + 2) + "|")
    missed = []
    for name in dict.fromkeys(name for numbers, _ in results for name in numbers):
        cells = [f"{numbers.get(name, 0):,.{'1' if '%' in name else '0'}f}" for numbers, _ in results]
        limit, sign = LIMITS.get(name), ">=" if "%" in name else "<="
        print(f"| {name} | {' | '.join(cells)} | {'' if limit is None else f'{sign} {limit:,}'} |")
        if limit is not None and (measured[name] < limit if "%" in name else measured[name] > limit):
            missed.append(name)
    for name, what in found.items():
        if what:
            print(f"\n{name}:", *what, sep="\n  ")
    print(f"\nmissed: {', '.join(missed) or 'nothing'}")
    return int(bool(missed) and options.check)


if __name__ == "__main__":
    sys.exit(main())
