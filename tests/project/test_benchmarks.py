"""The benchmarks' runner, the one shape of their results, and that a wrong result is never timed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_the_runner_lists_every_benchmark() -> None:
    done = run()
    assert done.returncode == 0
    for path in (ROOT / "benchmarks").glob("*.py"):
        if path.stem not in {"__main__", "common", "generation_gpu", "patterns_chart", "quality_chart", "workloads"}:
            assert f"  {path.stem} " in done.stdout
    assert run("no-such-benchmark").returncode == 2


def test_a_benchmark_runs_and_writes_the_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("cpu", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("cpu_*.json")
    outcome = json.loads(path.read_text(encoding="utf-8"))
    assert load("common", monkeypatch).problems(outcome) == []
    assert outcome["benchmark"] == "cpu" and len(outcome["rows"]) == 2
    assert outcome["versions"]["torch"] in done.stdout and outcome["machine"]["processor"] in done.stdout


def test_prompts_of_generation_are_timed_on_any_device(tmp_path: Path) -> None:
    done = run("generation", "--smoke", "--only", "prefill", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("generation_*.json")
    cases = [row["case"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    assert cases == ["prefill B=1 0k whole", "prefill B=1 1k in pieces of 64k"]


@pytest.mark.slow
def test_a_benchmark_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("ring", "--smoke", "--only", "exchange", "one", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("ring_*.json")
    outcome = json.loads(path.read_text(encoding="utf-8"))
    assert load("common", monkeypatch).problems(outcome) == []
    assert [row["case"] for row in outcome["rows"]] == ["exchange alone", "world size 1"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda p: p.stem)
def test_committed_results_have_the_one_shape(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = json.loads(path.read_text(encoding="utf-8"))
    assert load("common", monkeypatch).problems(outcome) == []
    assert path.stem.startswith(outcome["benchmark"])


@pytest.mark.slow
def test_training_against_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run("train_gpu", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("train_gpu_*.json")
    outcome = json.loads(path.read_text(encoding="utf-8"))
    assert load("common", monkeypatch).problems(outcome) == []
    built, trained = outcome["rows"]
    assert built["share_gib"] > 0 and trained["losses"][1] < trained["losses"][0] and len(trained["peak_gib"]) == 2


def test_a_wrong_result_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = load("cpu", monkeypatch)
    right = cpu.dilated_attention
    monkeypatch.setattr(
        cpu, "dilated_attention", lambda *a, **k: right(*a, **k) * (1 if k.get("backend") == "reference" else 1.001)
    )
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--smoke"])
    with pytest.raises(SystemExit, match="nothing is timed"):
        cpu.main()
    assert "sdpa s" not in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_shares_of_a_ring_are_checked(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What arrives from peers decides: a thousandth more, and no share is timed."""
    shares = load("ring_shares", monkeypatch)
    right = shares.Post.exchange

    def exchange(*given: object, **more: object) -> object:
        arrived = right(*given, **more)
        arrived.rows *= factor
        return arrived

    monkeypatch.setattr(shares.Post, "exchange", exchange)
    monkeypatch.setattr(
        sys, "argv", ["ring_shares.py", "--smoke", "--ranks", "2", "--rounds", "1", "--out", str(tmp_path)]
    )
    if factor == 1.0:
        shares.main()
        (path,) = tmp_path.glob("ring_shares_*.json")
        assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 3
    else:
        with pytest.raises(SystemExit, match="nothing is timed"):
            shares.main()
        assert "one device" not in capsys.readouterr().out


def test_a_sharded_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a world of one the run's gradient is one device's, unless it is off."""
    million = load("million", monkeypatch)
    world = million.World(0, 1, million.torch.device("cpu"))
    assert million.check(world) == []
    right, calls = million.gradient, iter([1.0, 1.0, 1.00001])  # exact, one device, sharded
    monkeypatch.setattr(million, "gradient", lambda *given: right(*given) * next(calls))
    assert "the gradient is off by 1.0e-05" in million.check(world)[0]


def test_problems_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("common", monkeypatch)
    assert common.problems({"rows": [], "more": 1})[-2:] == [
        "unknown key 'more'",
        "expected rows, each with its 'case'",
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_pairs_of_keys_taken_once(heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`patterns.py` counts them by residues; here each query's keys are put into a set."""
    patterns = load("patterns", monkeypatch)
    line = patterns.Line("nested", (16, 32, 64), (1, 2, 4), 128, heads, 16, causal)
    sets = ({j for j in set().union(*line.pattern.keys_of(i, h, 128)) if j <= i or not causal}
            for h in range(heads) for i in range(128))  # fmt: skip
    assert line.distinct() == sum(map(len, sets)) < line.pairs()


def test_the_gpu_chart_says_what_its_result_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu", monkeypatch)
    kept = ROOT / "benchmarks" / "results" / "gpu_NVIDIA_H200.json"
    result = json.loads(kept.read_text(encoding="utf-8"))
    figure = gpu.picture(result)
    title = figure.get_suptitle()
    versions = "torch 2.11.0", "triton 3.6.0", "cuDNN 9.19"
    assert all(words in title for words in ("NVIDIA H200", *versions, result["date"]))
    said = [text.get_text() for text in figure.axes[0].texts]
    rows = [r for r in result["rows"] if r["case"].endswith("N=1M")]
    ratios = {who: [f"{r['ratio']:.0%}" for r in rows if r["who"] == who] for who in ("auto", "sdpa")}
    assert said == ratios["auto"] + ratios["sdpa"] and len(said) == 16
    names = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    assert "triton" in names and "auto" not in " ".join(names)
    (tmp_path / "x.json").write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
    assert gpu.common.redraw(tmp_path / "x.json", "gpu", gpu.picture).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "y.json").write_text('{"benchmark": "cpu"}', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"expected a result of benchmarks/gpu\.py, got one of 'cpu'"):
        gpu.common.redraw(tmp_path / "y.json", "gpu", gpu.picture)


@pytest.mark.parametrize(("benchmark", "drawer"), [("gpu", "gpu"), ("patterns", "patterns_chart")])
def test_the_committed_chart_is_drawn_from_the_committed_result(
    benchmark: str, drawer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("matplotlib.image")
    results = ROOT / "benchmarks" / "results"
    charts = list(results.glob(f"{benchmark}_*.png"))
    assert charts
    for chart in charts:
        outcome = json.loads(chart.with_suffix(".json").read_text(encoding="utf-8"))
        figure = load(drawer, monkeypatch).picture(outcome)
        figure.set_dpi(150)
        canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        canvas.draw()
        drawn, kept = np.asarray(canvas.buffer_rgba())[..., :3] / 255, image.imread(chart)[..., :3]
        # Another matplotlib may move a label by a pixel; another number moves a bar.
        assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 1e-3


def test_an_interrupted_quality_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the start that runs share and in the run; and a planted line is where it is said to be, its answer last."""
    quality = load("quality", monkeypatch)
    setup = quality.replace(quality.SMOKE, start_steps=3, steps=2, width=16, step_bytes=4096, contexts=(1024, 2048))
    run, text = quality.Run("geometric+shift", 2048, 0), torch.randint(97, 122, (4000,), dtype=torch.uint8)
    whole, times, _ = quality.train(run, setup, text, tmp_path, float("inf"))
    assert len(times) == 2  # the start's are not the run's
    long = quality.Setup()
    rates = [quality.rate(step, long) / long.learning_rate for step in (0, 24, 25, 499, 599, 699)]
    assert rates == pytest.approx([0.04, 1, 1, 1, 0.55, 0.1])
    start = tmp_path / "start-geometric-seed0.pt"
    begun = start.read_bytes()

    folder = tmp_path / "interrupted"
    folder.mkdir()
    ticks = iter([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # past the deadline: the start's third step, then the run's second
    monkeypatch.setattr(quality.time, "monotonic", lambda: next(ticks, 0.0))
    assert quality.train(run, setup, text, folder, 0.5) is None
    assert [path.name for path in folder.iterdir()] == ["start-geometric-seed0.part.pt"]
    assert quality.train(run, setup, text, folder, 0.5) is None
    assert (folder / "geometric+shift-2048-seed0.part.pt").exists()
    again, times, _ = quality.train(run, setup, text, folder, 0.5)
    assert len(times) == 2 and not (folder / "geometric+shift-2048-seed0.part.pt").exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))

    # Segments from 8,192 on begin from the dense start, and are run where they are not dense themselves.
    far = [run for run in quality.runs(long, 1) if run.is_long]
    assert {(run.context, run.start(long).name) for run in far} == {(c, "start-dense-seed0") for c in (32_768, 131_072)}

    # A run with no shift and the shifted one begin from one start, which neither makes anew.
    unshifted, *_ = quality.train(quality.Run("geometric", 2048, 0), setup, text, tmp_path, float("inf"))
    assert start.read_bytes() == begun
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), unshifted.parameters(), strict=True))
    none = quality.replace(setup, steps=0)
    first, second = (quality.train(quality.Run(name, 2048, 0), none, text, tmp_path, float("inf"))[0]
                     for name in ("geometric", "geometric+shift"))  # fmt: skip
    kept = torch.load(start, weights_only=True)["masters"]["weights"]
    for a, b, c in zip(first.parameters(), second.parameters(), kept, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert first.config.segment_shift != second.config.segment_shift

    window = bytes(quality.batch(text, run, 0, setup)[0].tolist())
    asked = (window[-8:], window[-8 - 1024 : -1024])
    assert all(question.startswith(b"\n# ") and window.count(question) == 2 for question in asked)


def test_quality_is_judged_on_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows only how frequent bytes are: its bits by position and its digits are counted here."""
    quality = load("quality", monkeypatch)
    setup = quality.replace(quality.SMOKE, contexts=(512, 2048), probes=16)
    text = torch.randint(97, 122, (4096,), dtype=torch.uint8)
    logits = torch.linspace(-1, 1, 256)
    logits[ord("3")] = 9.0  # the likeliest byte, and a tenth of the digits

    class Same(torch.nn.Module):
        def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens[..., None].float()

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return logits.expand(*hidden.shape[:-1], 256)

    found = {c: quality.judge(Same(), quality.Run("dense", c, 0), text, setup) for c in setup.contexts}
    bits = -(logits.log_softmax(0) / torch.log(torch.tensor(2.0)))[text.long()].double()
    for context in setup.contexts:  # the same bytes, whatever context the run read them with
        want = bits.view(-1, context)
        for got in (row["by_position"][str(context)] for row in found.values()):
            assert got[f"{3 * context // 4}-{context}"] == pytest.approx(float(want[:, 3 * context // 4 :].mean()))
            assert got["0-256"] == pytest.approx(float(want[:, :256].mean()))
    assert found[2048]["bits_per_byte"] == pytest.approx(float(bits.mean()))
    assert found[2048]["retrieved"].keys() == {"128", "512", "2048"}
    # 192 digits of which a tenth is 3: five standard deviations.
    assert 0 < sum(found[2048]["retrieved"].values()) / 3 < 0.1 + 5 * (0.09 / 192) ** 0.5


def test_quality_writes_what_its_table_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of a smoke on drawn text, two seeds; each run's row is in the table, by context and attention."""
    pytest.importorskip("matplotlib")
    quality = load("quality", monkeypatch)
    monkeypatch.setattr(quality, "SMOKE", quality.replace(quality.SMOKE, start_steps=1, steps=1, width=16, layers=1))
    text = torch.randint(97, 122, (8192,), dtype=torch.uint8)
    monkeypatch.setattr(quality, "corpus", lambda setup: (text, text[:4096], "drawn"))
    given = ["--smoke", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path), "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *given])
    quality.main()
    (path,) = tmp_path.glob("quality_*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    kinds = {(row["context"], row["attention"]) for row in rows}
    assert kinds == {(256, "dense"), (256, "fixed"), *((1024, name) for name in quality.ATTENTIONS)}
    assert len(rows) == 2 * len(kinds)
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.quality() == "" or "bits per byte" in tables.quality()  # what is committed, if anything
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.quality().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [(int(c[0].replace(",", "")), c[1]) for c in cells] == sorted(kinds)
    mean = {kind: sum(r["bits_per_byte"] for r in rows if (r["context"], r["attention"]) == kind) / 2 for kind in kinds}
    assert [c[2] for c in cells] == [f"{mean[kind]:.3f}" for kind in sorted(kinds)]
    assert cells[0][3].endswith("(+0.000)")  # dense at the shortest context, beside itself
