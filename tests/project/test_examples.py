"""Every example runs, small, on the CPU, and its loss falls."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
        [
            "--tiny",
            "--context=256",
            "--shortest=64",
            "--steps=20",
            "--learning-rate=0.01",
            "--recipe=every other layer",
        ],
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
        (row,) = re.findall(r"before ([\d.]+) .*, after ([\d.]+) .*, [\d,]+ tokens/s", done.stdout)
        assert float(row[1]) < 4.5 < 5.5 < float(row[0]) < 5.6, done.stdout
    else:
        losses = [float(x) for x in re.findall(r"^step \d+ loss ([\d.]+)", done.stdout, re.MULTILINE)]
        # A model that knows nothing has log 256 = 5.55; one that knows the letters' frequencies about 3.3.
        assert len(losses) == 3 and losses[-1] < 3.6 and losses[0] > 5.0, done.stdout


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ["--tiny", "--context", "64", "128", "--steps", "3", "2", "--shortest", "16"]
TINY += ["--characters", "30000", "--windows", "2"]


class TestSmolLM:
    """examples/convert_smollm.py: its file survives interruptions, and is what the page's table is made of."""

    @pytest.fixture
    def example(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        pytest.importorskip("transformers")
        module = load(EXAMPLES / "convert_smollm.py")
        monkeypatch.setattr(module, "DEVICE", "cpu")
        return module

    @staticmethod
    def losses(path: Path) -> list[dict[str, Any]]:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [{name: row[name] for name in row if not name.endswith("per_second")} for row in rows]

    def test_interrupted_is_as_in_one_go(
        self, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, parts = tmp_path / "whole" / "smollm_X.json", tmp_path / "parts.json"
        example.main([*TINY, "--out", str(whole)])
        expected = self.losses(whole)
        assert [(row["context"], row["recipe"]) for row in expected] == [
            (context, recipe) for context in (64, 128) for recipe in example.RECIPES
        ]
        # Every recipe computes something else, and learns.
        assert len({row["after"]["mean"] for row in expected}) == len(expected)
        assert all(row["after"]["mean"] < row["before"]["mean"] for row in expected)

        # One recipe out of turn, then killed in the fourth of the others.
        example.main([*TINY, "--out", str(parts), "--recipe", "every other layer"])
        tune, calls = example.tune, iter(range(100))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(example, "tune", lambda *a: tune(*a) if next(calls) < 3 else signal())
            example.main([*TINY, "--out", str(parts)])
        assert len(self.losses(parts)) == 5
        example.main([*TINY, "--out", str(parts), "--seconds", "0"])
        assert (
            "finished: 5; not yet: three of four layers at 64; dense at 128; all layers at 128;"
            in capsys.readouterr().out
        )
        example.main([*TINY, "--out", str(parts)])
        assert self.losses(parts) == expected
        assert {path.name for path in tmp_path.rglob("*.*")} == {whole.name, parts.name}  # nothing half-written

        tables = load(EXAMPLES.parent / "docs" / "tables.py")
        assert tables.smollm().startswith(("Not measured yet.", "NVIDIA"))
        monkeypatch.setattr(tables, "EXAMPLES", whole.parent)
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        lines = tables.smollm().splitlines()
        assert len(lines) == 4 + len(expected) and "convert_smollm.py --tiny" in lines[0]
        gap = expected[3]["after"]["mean"] - expected[0]["after"]["mean"]
        assert f"| 64, 3 | every other layer (2 of 4) | {expected[3]['before']['mean']:.3f} |" in lines[7]
        assert f"| {gap:+.3f} |" in lines[7]

    def test_the_file_of_other_settings_is_refused(
        self, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "x.json"
        call = [*TINY, "--out", str(path), "--recipe", "dense"]
        example.main(call)
        before = path.read_bytes()
        with pytest.raises(SystemExit, match=r"x.json.*: it has learning_rate 0.0001, not 0.5$"):
            example.main([*call, "--learning-rate", "0.5"])
        with pytest.raises(SystemExit, match=r"it has text \w+, not \w+; characters 30000, not 40000$"):
            example.main([*call, "--characters", "40000"])
        assert path.read_bytes() == before
        path.write_text('{"rows": []}', encoding="utf-8")
        with pytest.raises(SystemExit, match=r"a file of this example, or none yet, got .*x\.json"):
            example.main(call)
        with pytest.raises(SystemExit):
            example.main([*call, "--steps", "3"])
        assert "as many --steps as --context, got [3] and [64, 128]" in capsys.readouterr().err
        with pytest.raises(SystemExit, match=r"expected at most [\d,]+ tokens .*, got 2 of 1,000,000"):
            example.main([*call, "--context", "64", "1000000"])

    def test_the_learning_rate_warms_up_and_falls(self, example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        torch = pytest.importorskip("torch")
        rates: list[float] = []
        step = torch.optim.AdamW.step
        monkeypatch.setattr(
            torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))
        )
        given = example.load(example.arguments(TINY))
        assert example.tune(given.model, given.training[:640].split(16), 1.0) > 0
        assert rates[0] == pytest.approx(0.1) and rates[:10] == sorted(rates[:10])
        # From the tenth step on a line that meets 0 where a 41st step would be.
        assert rates[9:] == pytest.approx([1 - i / 40 for i in range(9, 40)])

    def test_angles_turn_more_slowly_beyond_the_context_of_the_model(self, example: ModuleType) -> None:
        options = example.arguments(TINY)
        model, own = example.load(options).model, 256
        angles = model.model.rotary_emb.inv_freq.clone()
        example.switch(model, "dense", own, options)
        assert model.model.rotary_emb.inv_freq.equal(angles)
        example.switch(model, "dense", 4 * own, options)
        got = (angles / model.model.rotary_emb.inv_freq).tolist()
        assert got[0] == 1 and got[-1] == pytest.approx(4) and got == sorted(got)
        # The base that makes it so, as the method is usually given: theta s^(d / (d - 2)).
        theta = model.config.rope_parameters["rope_theta"] * 4 ** (8 / 6)
        assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx([theta ** (-i / 4) for i in range(4)])


def signal() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt
