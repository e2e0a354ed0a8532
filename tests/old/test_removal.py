"""0.4.0 deletes `_old/` and the marked lines, and nothing else has to change: tried on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dilated_attention_pytorch as package

MARK = "0.4.0: goes with _old"
NAME = package.__name__
NOW = Path(package.__file__).parents[1]

USE = f"""
import importlib, torch
import {NAME} as package
for name in {package.__all__}:
    getattr(package, name)
for part in ("cli.app", "core", "integrations", "models", "ring_attention", "streaming", "testing", "training", "viz"):
    importlib.import_module(f"{NAME}.{{part}}")
pattern = dict(segment_lengths=[16, 40], dilation_rates=[1, 3])
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 100, 4, 8)
ring = package.RingDilatedAttention(package.RingAttentionConfig(**pattern))
hilbert = package.HilbertRingAttention(package.RingAttentionConfig(**pattern), grid=(10, 10))
shape = dict(d_model=32, nhead=4, dim_feedforward=32, **pattern)
models = [
    package.LongNet(num_encoder_layers=1, num_decoder_layers=1, **shape),
    package.MultiheadDilatedAttention(32, 4, **pattern),
]
x = torch.randn(1, 50, 32)
found = [
    package.dilated_attention(q, k, v, **pattern, is_causal=True),
    package.DilatedAttention(**pattern, head_groups=True)(q, k, v),
    ring(q, k, v, is_causal=True),
    hilbert(q, k, v, is_causal=True),
    models[0](x),
    models[1](x, x, x, is_causal=True)[0],
]
print(*(x.detach().numpy().tobytes().hex() for x in found), sep="\\n")
"""


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as 0.4.0 will have it."""
    folder = tmp_path_factory.mktemp("later")
    shutil.copytree(NOW / NAME, folder / NAME, ignore=shutil.ignore_patterns("__pycache__", "_old"))
    for path in (folder / NAME).rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if MARK not in line), encoding="utf-8")
    return folder


def run(code: str, folder: Path) -> str:
    """What a script prints that finds the package in a folder, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        capture_output=True, text=True, timeout=300, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_new_names_are_there_and_compute_the_same(later: Path) -> None:
    assert run(USE, later) == run(USE, NOW)


def test_old_names_and_places_are_gone(later: Path) -> None:
    code = f"""
import importlib
import {NAME} as package
assert package.__file__.startswith({str(later)!r}), package.__file__
for place in ("dilated_attention", "long_net", "ring_attention.production_hilbert", "_old"):
    try:
        importlib.import_module(f"{NAME}.{{place}}")
    except ModuleNotFoundError:
        continue
    raise AssertionError(place)
for owner, name in ((package, "RingDilatedAttentionV2"), (package.core, "create_dilated_attention")):
    assert not hasattr(owner, name), name
for make in (lambda: package.DilatedAttention([8], [1], 0.5), lambda: package.LongNet(32, 4)):
    try:
        make()
    except TypeError:
        continue
    raise AssertionError("an old call was taken")
"""
    run(code, later)


def test_what_is_left_is_tidy(later: Path) -> None:
    """No import that nothing uses, no name that is not there, no empty space where a line was."""
    pytest.importorskip("ruff")
    for arguments in (["check", "--select", "E,F,I,W"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", NOW / "pyproject.toml", later / NAME],
            capture_output=True, text=True, timeout=120, cwd=later,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    left = [path.name for path in (later / NAME).rglob("*.py") if "_old." in path.read_text(encoding="utf-8")]
    assert left == []
