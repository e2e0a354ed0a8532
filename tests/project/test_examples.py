"""Every example runs, small, on the CPU, and its loss falls."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Each example: what starts it, what makes it small, the package it needs.
RUNS: dict[str, tuple[list[str], list[str], str]] = {
    "accelerate_lm.py": ([], ["--cpu", "--steps", "21", "--context", "256"], "accelerate"),
    "lightning_lm.py": ([], ["--accelerator", "cpu", "--steps", "21", "--context", "256"], "pytorch_lightning"),
    "fsdp2_lm.py": (TORCHRUN, ["--steps", "21", "--context", "256"], "torch"),
    "context_parallel_llama.py": (TORCHRUN, ["--device", "cpu", "--steps", "21", "--context", "256"], "transformers"),
    "convert_llama.py": (
        [],
        ["--context", "64", "--width", "64", "--steps", "30", "--fine-tune-steps", "15"],
        "transformers",
    ),
    "finetune_trainer.py": (
        [],
        ["--longest", "256", "--width", "64", "--text", "100000", "--steps", "30", "--fine-tune-steps", "20"],
        "peft",
    ),
    "convert_smollm.py": (
        ["-W", "ignore"],
        ["--tiny", "--context", "256", "--shortest", "64", "--steps", "3", "--recipe", "every other layer"],
        "transformers",
    ),
}
PARTS = {"text.py", "slide_demo.py"}  # the second has test_slide_demo.py


# What a rank of an example does at its end: the threads of a process group that outlives Python may abort it.
LEAVES = """
import gc, glob, pathlib, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
gc.collect()
threads = [pathlib.Path(path).read_text().strip() for path in glob.glob("/proc/self/task/*/comm")]
assert not [name for name in threads if "gloo" in name], f"threads of a group are left: {threads}"
"""


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, *PARTS}


@pytest.mark.parametrize("name", RUNS)
def test_example_runs_and_learns(name: str, tmp_path: Path) -> None:
    launcher, arguments, package = RUNS[name]
    path = tmp_path / "leaves.py"
    path.write_text(LEAVES, encoding="utf-8")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, *launcher, str(path), str(EXAMPLES / name), *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if name in ("convert_llama.py", "finetune_trainer.py"):
        before, after = (
            float(x) for x in re.findall(r"^dilated, \w+ fine-tuning: ([\d.]+)", done.stdout, re.MULTILINE)
        )
        # Nothing but the attention changed at the switch; it may cost something, not undo the training.
        assert after < before < 4.5
    elif name == "convert_smollm.py":
        (row,) = re.findall(r"before ([\d.]+) .*, after ([\d.]+), [\d,]+ tokens/s", done.stdout)
        assert float(row[1]) < float(row[0]) < 5.6, done.stdout
    else:
        losses = [float(x) for x in re.findall(r"^step \d+ loss ([\d.]+)", done.stdout, re.MULTILINE)]
        # A model that knows nothing has log 256 = 5.55; one that knows the letters' frequencies about 3.3.
        assert len(losses) == 3 and losses[-1] < 3.6 and losses[0] > 5.0, done.stdout
