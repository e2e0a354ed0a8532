"""What `import dilated_attention_pytorch` costs and loads, seen from a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

PACKAGE = "dilated_attention_pytorch"
OPTIONAL = {
    "h5py",
    "hilbertsfc",
    "huggingface_hub",
    "libcst",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "rich",
    "safetensors",
    "tensorboard",
    "transformers",
    "triton",
    "typer",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(module: str) -> set[str]:
    return set(run(f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})").split())


# Seconds until torch is there, and until the package is, which loads torch first.
TIMES = f"""
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import {PACKAGE}
print(middle - start, time.perf_counter() - start)
"""


def test_import_loads_no_optional_package() -> None:
    # What torch loads by itself (numpy, where it is installed) is not ours to count.
    extra = (loaded_by(PACKAGE) - loaded_by("torch")) & OPTIONAL
    assert not extra, f"import {PACKAGE} loads {sorted(extra)}"


def test_import_works_where_no_optional_package_is_installed() -> None:
    # None in sys.modules makes an import raise ModuleNotFoundError, as if the package were absent. numpy stays:
    # torch asks for it on its own.
    absent = sorted(OPTIONAL - {"numpy"})
    run(f"import sys; sys.modules.update(dict.fromkeys({absent}))\nimport {PACKAGE}")


def test_import_takes_under_one_and_a_half_times_torch() -> None:
    run(f"import {PACKAGE}")  # reads the files and writes the byte code once
    # Both in one process, one after the other, so that a busy spell of the machine falls on both alike.
    times = [[float(x) for x in run(TIMES).split()] for _ in range(3)]
    torch_alone, ours = (statistics.median(column) for column in zip(*times, strict=True))
    assert ours < 1.5 * torch_alone, f"import {PACKAGE} takes {ours:.2f} s, import torch {torch_alone:.2f} s"
