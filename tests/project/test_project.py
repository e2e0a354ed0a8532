"""The promises of the project's own pages: documented names, docstrings that run, one version, figures as drawn."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dilated_attention_pytorch as package

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in getattr(package, "__all__", []) if not name.startswith("__")]
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if p.is_file())


def parameters(obj: Any) -> list[str]:
    names = [n for n in inspect.signature(obj).parameters if n not in {"self", "args", "kwargs"}]
    return [n for n in names if not n.startswith("_")]


def is_documented_callable(obj: Any) -> bool:
    """Functions and classes whose constructor is ours; NamedTuples, errors and plain values describe themselves."""
    return inspect.isfunction(obj) or (
        inspect.isclass(obj) and not hasattr(obj, "_fields") and not issubclass(obj, BaseException)
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_google_docstring(name: str) -> None:
    obj = getattr(package, name)
    doc = inspect.getdoc(obj) or ""
    summary, _, rest = doc.partition("\n")
    assert summary.endswith("."), f"{name}: expected a one-line summary with a full stop, got {summary!r}"
    assert not rest or rest.startswith("\n"), f"{name}: expected a blank line after the summary"
    if not is_documented_callable(obj):
        return
    wanted = parameters(obj)
    if same := re.search(r"[Aa]rguments.* those of\s+`(\w+)`", doc):
        wanted = [n for n in wanted if n not in parameters(getattr(package, same.group(1)))]
    if wanted:
        section = re.search(r"^Args:\n((?:[ \n].*\n?|\n)*)", doc, re.MULTILINE)
        assert section, f"{name}: expected an Args section for {wanted}"
        # One entry may describe several arguments: "key, value: ...".
        entries = re.findall(r"^ +([*\w, /`]+?)(?: \([^)]*\))?:", section.group(1), re.MULTILINE)
        described = {n.strip(" *`") for entry in entries for n in re.split(r"[,/]", entry)}
        missing = [n for n in wanted if n not in described]
        assert not missing, f"{name}: arguments without a description: {missing}"
    if inspect.isfunction(obj) and inspect.signature(obj).return_annotation not in (None, "None"):
        assert re.search(r"^(Returns|Yields):", doc, re.MULTILINE), f"{name}: expected a Returns section"


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_public_docstrings_run(name: str) -> None:
    obj = getattr(package, name)
    module = inspect.getmodule(obj)
    assert module is not None
    finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    # An example may use torch and the public names without importing them.
    names = {"torch": torch, **{public: getattr(package, public) for public in PUBLIC}}
    for test in finder.find(obj, name, module=module, globs=names):
        output: list[str] = []
        runner.run(test, out=output.append)
        assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_on_the_api_page(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: dilated_attention_pytorch(\.\w+)*\.{name}$", page, re.MULTILINE), (
        f"{name} is public, and docs/api.md has no line '::: dilated_attention_pytorch...{name}'"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    """MkDocs checks the site's own links; README and links out of docs/ are checked here."""
    targets = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    made = {"img/gpu.png"}  # by docs/hooks.py
    missing = [t for t in targets if t not in made and not (page.parent / t).exists()]
    assert not missing, f"{page.name}: links to files that do not exist: {missing}"


def test_version_is_kept_in_one_place() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in metadata["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|a\d+|b\d+|rc\d+)?", package.__version__)


def load_figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_as_the_code_draws_them(tmp_path: Path) -> None:
    """The committed pictures come from DilatedPattern as it is now; `make figures` draws them anew."""
    # Another matplotlib writes other bytes for the same picture.
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    if f"matplotlib=={pytest.importorskip('matplotlib').__version__}" not in pins:
        pytest.skip("needs the matplotlib of constraints.txt")
    drawn = load_figures().main(tmp_path)
    kept = ROOT / "docs" / "img"
    assert sorted(p.name for p in drawn) == sorted(p.name for kind in ("svg", "html") for p in kept.glob(f"*.{kind}"))
    stale = [p.name for p in drawn if p.read_bytes() != (kept / p.name).read_bytes()]
    assert not stale, f"docs/img differs from what docs/figures.py draws: {stale}; run `make figures`"


def test_decisions_have_a_number_each_and_code_points_at_those_that_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    numbers = [int(x) for x in re.findall(r"^\*\*D(\d+)\. ", page, re.MULTILINE)]
    assert sorted(numbers) == list(range(1, len(numbers) + 1)), "each decision has one number, none is left out"
    for path in sorted((ROOT / "dilated_attention_pytorch").rglob("*.py")):
        pointed = {int(x) for x in re.findall(r"(?:\(|design\.md, )D(\d{1,2})\b", path.read_text(encoding="utf-8"))}
        assert pointed <= set(numbers), f"{path.name} points at decisions that docs/design.md does not have: {pointed}"
