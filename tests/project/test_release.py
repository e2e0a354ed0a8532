"""What users get: the archives, an installation in a clean environment, and no code that runs from a weights file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.metadata import Metadata

import dilated_attention_pytorch as package

ROOT = Path(__file__).parents[2]
NAME = "dilated_attention_pytorch"


def run(*command: object, cwd: Path) -> str:
    # The checkout must not be found by accident.
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` builds."""
    folder = tmp_path_factory.mktemp("dist")
    recipe = re.search(r"^dist:.*\n(?:\t.*\n)*?\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe, "Makefile has no target dist that builds with python"
    run(sys.executable, *recipe.group(1).split(), "-d", folder, cwd=ROOT)
    return folder


@pytest.mark.slow
class TestArchives:
    def test_wheel_holds_the_package_and_nothing_else(self, dist: Path) -> None:
        (wheel,) = dist.glob("*.whl")
        assert wheel.name == f"{NAME}-{package.__version__}-py3-none-any.whl"
        names = set(zipfile.ZipFile(wheel).namelist())
        info = f"{NAME}-{package.__version__}.dist-info/"
        source = {path.relative_to(ROOT).as_posix() for path in (ROOT / NAME).rglob("*.py")}
        assert {name for name in names if not name.startswith(info)} == source | {
            f"{NAME}/py.typed",
            f"{NAME}/viz/page.html",
            f"{NAME}/viz/slide_map.html",
        }
        assert f"{info}licenses/LICENSE" in names

    def test_metadata_is_valid(self, dist: Path) -> None:
        (wheel,) = dist.glob("*.whl")
        text = zipfile.ZipFile(wheel).read(f"{NAME}-{package.__version__}.dist-info/METADATA")
        metadata = Metadata.from_email(text)  # raises for what an index would refuse
        assert metadata.name == "dilated-attention-pytorch" and str(metadata.version) == package.__version__
        assert metadata.license_expression == "MIT" and metadata.description_content_type == "text/markdown"
        assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
        always = {r.name for r in metadata.requires_dist or [] if r.marker is None}
        assert always == {"torch"}
        assert {"cli", "viz", "hf", "track", "hilbert", "migrate", "all"} <= set(metadata.provides_extra or [])

    def test_source_archive_can_be_worked_with(self, dist: Path) -> None:
        (archive,) = dist.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            names = {name.partition("/")[2] for name in opened.getnames()}
        wanted = {
            "tools/measure_code.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "Makefile",
            "constraints.txt",
            "mkdocs.yml",
            "CHANGELOG.md",
        }
        assert wanted <= names
        assert {"tests/project/test_release.py", "docs/index.md", f"{NAME}/py.typed"} <= names
        assert not [name for name in names if name.startswith((".venv", "dist", "runs", "site"))]


def test_the_floors_in_words_are_the_metadata_s() -> None:
    """Where pages and the Makefile name the lowest Python, torch and transformers."""
    metadata = tomllib.loads(read("pyproject.toml"))["project"]
    requirements = [*metadata["dependencies"], *metadata["optional-dependencies"]["hf"]]
    floors = {"Python": metadata["requires-python"].removeprefix(">=")} | {
        name: floor for name, floor in (re.match(r"(\w+)>=([\d.]+)", r).groups() for r in requirements)
    }
    pages = ["README.md", "CONTRIBUTING.md", "docs/install.md", "docs/slides.md", "docs/huggingface.md", "Makefile"]
    said = " ".join(" ".join(read(page).split()) for page in pages)
    named = re.findall(r"\b(Python|torch|transformers),? (?:from )?(\d\.\d+) (?:or later|on\b)", said)
    rows = re.findall(r"^\| (Python|torch|transformers)[^|]*\| (\d\.\d+) \|", read("docs/install.md"), re.MULTILINE)
    assert {name for name, _ in named} == {name for name, _ in rows} == {"Python", "torch", "transformers"}
    assert {(name, floors[name]) for name, _ in [*named, *rows]} == {*named, *rows}
    # What `make test-floor` installs.
    found = re.search(r"FLOOR \?= \$\(shell (sed .*)\)$", read("Makefile"), re.MULTILINE)
    assert found and run("sh", "-c", found.group(1), cwd=ROOT).strip() == floors["torch"]


@pytest.mark.slow
def test_a_clean_environment_runs_the_readme(dist: Path, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "-q", "--python", python, "--disable-pip-version-check", "install", "--no-deps",
        "--no-index", wheel, cwd=tmp_path)  # fmt: skip
    # The requirements come from where the tests run: their folder behind the environment's own. A path line adds the
    # folder alone and not what its .pth files name, so the editable checkout stays out of sight.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(purelib) / "requirements.pth").write_text(
        "\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})) + "\n"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert example
    where = f"import {NAME} as package, importlib.metadata as m\nprint(package.__file__, m.version('{NAME}'))\n"
    (tmp_path / "example.py").write_text(f"{example.group(1)}\nprint(tuple(out.shape), q.grad.norm() > 0)\n{where}")
    first, second = run(python, "example.py", cwd=tmp_path).splitlines()
    assert first == "(1, 10007, 8, 64) tensor(True)"
    assert second == f"{Path(purelib) / NAME / '__init__.py'} {package.__version__}"
    printed = run(folder / "bin" / "dilated-attention", "info", "--json", cwd=tmp_path)
    assert f'"version": "{package.__version__}"' in printed and torch.__version__.split("+")[0] in printed


SOURCES = sorted(
    path
    for folder in (NAME, "benchmarks", "docs", "examples", "tests", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "test_release.py"
)


def unsafe_loads(source: str) -> list[int]:
    """Lines that unpickle a file, which runs whatever it says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, name = getattr(node.func.value, "id", ""), node.func.attr
        safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
        if (module == "torch" and name == "load" and not safe) or (
            module == "pickle" and name in {"load", "Unpickler"}
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_from_a_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert unsafe_loads(source) == []
    # The functions by another name would pass unseen.
    assert not re.search(r"^\s*from (torch import .*\bload\b|pickle import)", source, re.MULTILINE)


def test_unsafe_loads_are_seen() -> None:
    assert unsafe_loads("torch.load(f, weights_only=True)\nsafetensors.torch.load_file(f)\npickle.loads(b)") == []
    lines = ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=w)", "pickle.load(f)"]
    assert unsafe_loads("\n".join(lines)) == [1, 2, 3, 4]
