"""The house rules of docs/design.md that a reader cannot be trusted to see: import arrows, sizes, lazy parts.

Imports are read with `ast`, wherever they stand: inside a function, behind TYPE_CHECKING or in
`importlib.import_module` with a literal name. A part that is loaded late still depends on what it loads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "dilated_attention_pytorch"
ROOT = Path(__file__).parents[2] / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 450

# What each part may import. A part that is missing here fails, so a new one is placed on purpose.
_OPS = {"types", "core", "kernels", "functional"}
_MODELS = _OPS | {"_deprecated", "head_groups", "modules", "ring_attention", "streaming", "models"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "core": {"types"},
    "kernels": {"types", "core"},
    "functional": {"types", "core", "kernels"},
    "_deprecated": set(),
    "head_groups": _OPS | {"_deprecated"},
    "ring_attention": _OPS | {"_deprecated"},
    "streaming": _OPS,
    "modules": _OPS | {"_deprecated", "head_groups"},
    "models": _MODELS - {"models"},
    "training": _MODELS,
    "integrations": _MODELS,
    "viz": _MODELS,
    # The past, until 0.4.0. Of the present only the package itself and the command line know it.
    "_old": _MODELS,
    "cli": _MODELS | {"training", "integrations", "viz", "testing", "_old"},
    # Helpers for tests, the users' and ours; nothing but the command line builds on them.
    "testing": _MODELS,
    # The public names; everything is below them.
    "__init__": _MODELS | {"training", "integrations", "viz", "testing", "_old"},
}

# The backends, which do not know each other.
BACKENDS = ("core.reference", "kernels.sdpa", "kernels.triton")

# Optional packages, and the only places that may name them at module level. What a bare import of the package loads is
# measured in test_import.py; this says it file by file, with the line.
HEAVY: dict[str, tuple[str, ...]] = {
    "triton": ("kernels/triton/",),
    "matplotlib": ("viz/",),
    "typer": ("cli/", "cli.py", "_old/migrate/command.py"),
    "rich": ("cli/", "cli.py", "training/"),
    "transformers": ("integrations/",),
    "tensorboard": (),
    "hilbertsfc": (),
    "libcst": ("_old/migrate/",),
    "h5py": (),
    "pandas": (),
    "pyarrow": (),
    "sklearn": (),
    "torchsurv": (),
    "huggingface_hub": ("integrations/",),
    "datasets": (),
    "tokenizers": (),
    "wandb": (),
    "yaml": (),
}


class Import(NamedTuple):
    module: str  # absolute and dotted; the imported names are part of it, as far as they may be modules
    line: int
    lazy: bool  # inside a function, so not run at import


def module_name(path: Path) -> str:
    parts = (PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in the source, relative ones resolved against `module`."""

    def resolve(name: str, dots: int) -> str:
        if dots == 0:
            return name
        # One dot is the folder the file lies in: a package's own name, a module's parent.
        names = module.split(".")
        above = names[: len(names) - dots + is_package]
        return ".".join([*above, name] if name else above)

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = resolve(base, node.level)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0] if node.args else None
            if (
                name in {"import_module", "__import__"}
                and isinstance(target, ast.Constant)
                and isinstance(target.value, str)
            ):
                dots = len(target.value) - len(target.value.lstrip("."))
                yield Import(resolve(target.value.lstrip("."), dots), node.lineno, lazy)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source), False)


def part_of(module: str) -> str:
    """The part a module of ours belongs to: the first name under the package."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] if rest else "__init__"


def imported_part(module: str) -> str | None:
    """The part an import reaches, or None when it is not ours or is the package's version."""
    if module.split(".")[0] != PACKAGE or module == f"{PACKAGE}.__version__":
        return None
    part = part_of(module)
    is_part = part == "__init__" or (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file()
    # A public name taken from the package itself depends on everything.
    return part if is_part else "__init__"


def file_imports(path: Path) -> Iterator[Import]:
    return imports(path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_arrows_point_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    assert part in MAY_IMPORT, f"{relative(path)}: place the new part {part!r} in MAY_IMPORT"
    wrong = []
    for found in file_imports(path):
        target = imported_part(found.module)
        if target is None or target == part or target in MAY_IMPORT[part]:
            continue
        wrong.append(f"line {found.line}: {part} may not import {target} ({found.module})")
    assert not wrong, f"{relative(path)}: " + "; ".join(wrong)


def test_the_root_has_six_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "__init__", "types", "functional", "modules", "head_groups", "_deprecated",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_packages_are_loaded_late(path: Path) -> None:
    wrong = []
    for found in file_imports(path):
        top = found.module.split(".")[0]
        # torch's own TensorBoard writer loads the package at once.
        top = "tensorboard" if found.module.startswith("torch.utils.tensorboard") else top
        # What the kernels support is asked before Triton is imported.
        ours = found.module.removeprefix(f"{PACKAGE}.kernels.triton")
        inside_triton = ours != found.module and not ours.startswith(".support")
        allowed = HEAVY["triton"] if inside_triton else HEAVY.get(top)
        if allowed is not None and not found.lazy and not relative(path).startswith(allowed):
            wrong.append(f"line {found.line}: {found.module}")
    assert not wrong, f"{relative(path)} imports at module level what must be loaded when asked for: {wrong}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_one_file_one_job(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines, the most is {MAX_LINES}: split it"


MAKERS = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_tensors_are_made_on_a_device_that_is_named(path: Path) -> None:
    """The default device is the user's: a table of ours on it cannot be read ("meta"), or meets tensors elsewhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            assert named, f"{path.name}:{node.lineno}: {ast.unparse(node)} names no device"


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_do_not_know_each_other(name: str) -> None:
    others = {f"{PACKAGE}.{other}" for other in BACKENDS if other != name}
    for path in (p for p in FILES if module_name(p).startswith(f"{PACKAGE}.{name}")):
        for found in file_imports(path):
            known = [o for o in others if found.module == o or found.module.startswith(o + ".")]
            assert not known, f"{relative(path)} line {found.line} imports another backend: {found.module}"


def test_ring_base_needs_no_process_group() -> None:
    base = ROOT / "ring_attention" / "base.py"
    if base.is_file():
        assert not [i for i in file_imports(base) if i.module.startswith("torch.distributed")]


class TestTheReaderItself:
    """A check that sees nothing is green as well; these hold what it sees."""

    def found(self, source: str, module: str = f"{PACKAGE}.core.x", is_package: bool = False) -> list[tuple[str, bool]]:
        return [(i.module, i.lazy) for i in imports(source, module, is_package=is_package)]

    def test_forms(self) -> None:
        assert self.found("import triton.language as tl") == [("triton.language", False)]
        assert self.found("from torch import nn, Tensor") == [("torch.nn", False), ("torch.Tensor", False)]
        assert self.found("def f():\n from rich import box") == [("rich.box", True)]
        assert self.found("if TYPE_CHECKING:\n import typer") == [("typer", False)]
        assert self.found("class A:\n import typer") == [("typer", False)]
        assert self.found("f = lambda: importlib.import_module('triton')") == [("triton", True)]

    def test_relative(self) -> None:
        assert self.found("from . import merge") == [(f"{PACKAGE}.core.merge", False)]
        assert self.found("from .merge import f") == [(f"{PACKAGE}.core.merge.f", False)]
        assert self.found("from .. import kernels") == [(f"{PACKAGE}.kernels", False)]
        assert self.found("from ..kernels import ops") == [(f"{PACKAGE}.kernels.ops", False)]
        assert self.found("from .merge import f", f"{PACKAGE}.core", True) == [(f"{PACKAGE}.core.merge.f", False)]
        assert self.found("from ..kernels import ops", f"{PACKAGE}.core", True) == [(f"{PACKAGE}.kernels.ops", False)]
        assert self.found("import_module('.merge', 'x')", f"{PACKAGE}.core", True) == [(f"{PACKAGE}.core.merge", False)]
        assert self.found("import_module('..kernels', 'x')") == [(f"{PACKAGE}.kernels", False)]

    def test_parts(self) -> None:
        assert imported_part(f"{PACKAGE}.core.merge.f") == "core"
        assert imported_part(f"{PACKAGE}.__version__") is None
        assert imported_part(f"{PACKAGE}.SomePublicName") == "__init__"
        assert imported_part("torch.nn") is None

    def test_the_table_has_no_cycle(self) -> None:
        seen: set[str] = set()
        waiting = dict(MAY_IMPORT)
        while waiting:
            ready = [part for part, below in waiting.items() if below <= seen]
            assert ready, f"parts that import each other: {sorted(waiting)}"
            seen.update(ready)
            for part in ready:
                del waiting[part]
