"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import call, fails

from dilated_attention_pytorch import DilatedPattern, cli
from dilated_attention_pytorch.cli.app import in_options, run

TINY = [
    f"--set={setting}"
    for setting in (
        "d_model=32", "num_layers=1", "dim_feedforward=32", "segment_lengths=16,64", "dilation_rates=1,2",
        "context=64", "steps=4", "warmup_steps=1", "eval_every=2", "eval_excerpts=2", "cpu_threads=0",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"line {i} of a text\n" * 30)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("COLUMNS", "200")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, call("train", "--data", text, "--out", out, "--val-fraction", "0.3", "--sample-bytes", "20", *TINY)


def test_train_leaves_everything(trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "train.json", "step-00000004", "metrics.jsonl",
        "loss.png", "pattern.png", "sample.txt", ".lock",
    }  # fmt: skip
    sample = (out / "sample.txt").read_text()
    assert sample.startswith("def ")
    val = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]["val_bpb"]
    assert f"validation: {val:.3f} bits per byte" in printed
    assert "step      4:" in printed and "parameters, 1 layers, context 64 bytes" in printed


def test_train_again_finds_it_done_and_refuses_another_config(
    trained: tuple[Path, str], text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = trained
    same = ("train", "--data", text, "--out", out, "--val-fraction", "0.3", "--sample-bytes", "20", *TINY)
    assert "going on after step 4 of 4" in call(*same)
    message = fails(capsys, monkeypatch, *same, "--set", "seed=1")
    assert "which has seed 0 (now 1)" in message and message.endswith("start over (--restart)")
    assert "expected --set NAME=VALUE, got 'seed'" in fails(capsys, monkeypatch, *same, "--set", "seed")
    assert "got 'sede'" in fails(capsys, monkeypatch, *same, "--set", "sede=1")


def test_a_terminal_is_not_steered_by_what_a_model_writes() -> None:
    from dilated_attention_pytorch.cli.generate import printable

    assert printable("a\tb\n\x1b[2J\r\x07é漢") == "a\tb\n\\x1b[2J\\r\\x07é漢"


def test_generate(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = trained
    one = call("generate", out, "--prompt", "abc", "--bytes", "30", "--seed", "1")
    assert one.startswith("abc") and one == call("generate", out, "--prompt", "abc", "--bytes", "30", "--seed", "1")
    assert one != call("generate", out, "--prompt", "abc", "--bytes", "30", "--seed", "2")
    greedy = call("generate", out, "--bytes", "10", "--temperature", "0")
    assert greedy == call("generate", out, "--bytes", "10", "--top-k", "1")
    assert "expected --top-p in (0, 1], got 2.0" in fails(capsys, monkeypatch, "generate", out, "--top-p", "2")
    message = "expected no --top-k and no --top-p with --temperature 0, which takes the likeliest byte"
    assert message in fails(capsys, monkeypatch, "generate", out, "--temperature", "0", "--top-k", "3")
    message = "expected --temperature above 0, got -1.0; --temperature 0 takes the likeliest token"
    assert message in fails(capsys, monkeypatch, "generate", out, "--temperature", "-1")
    assert "expected config.json in" in fails(capsys, monkeypatch, "generate", out.parent)


def test_paths_may_hold_what_rich_takes_for_markup(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a[/b] :bug: [red]"
    shown = call("train", "--data", text, "--out", out, "--val-fraction", "0.3", "--sample-bytes", "2", *TINY)
    assert f"everything is in {out}" in shown
    assert f"wrote {out / 'x.png'}" in call("show", "--out", out / "x.png").replace("\n", "")


def test_messages_of_the_library_in_the_words_of_the_command() -> None:
    for command, message, wanted in (
        ("train", "expected val_fraction in (0, 1)", "expected --val-fraction in (0, 1)"),
        ("train", "expected segment_lengths and /a/val_fraction/b", "expected segment_lengths and /a/val_fraction/b"),
        ("plan", "expected segment_lengths[0] to be at least 1", "expected --segments[0] to be at least 1"),
        ("plan", "expected num_heads to be at least 1, got heads", "expected --heads to be at least 1, got heads"),
        ("generate", "expected greedy=True", "expected --temperature 0"),
        ("plan", "a pattern, segment_shift='alternate' adds", "a pattern, --shift 'alternate' adds"),
        ("plan", "known are ['num_heads', 'seq_len']", "known are ['num_heads', 'seq_len']"),
        ("plan", "expected head in [0, 4)", "expected --head in [0, 4)"),
        ("", "expected val_fraction", "expected val_fraction"),
    ):
        assert in_options(message, command) == wanted


def test_plan_counts_what_the_pattern_counts() -> None:
    options = ("plan", "-n", "1000", "-w", "64,256", "-r", "1,4", "--heads", "3", "--head-dim", "16")
    found = json.loads(call(*options, "--dtype", "fp32", "--query", "130", "--head", "2", "--json"))
    pattern = DilatedPattern((64, 256), (1, 4), 3)
    pairs = pattern.pairs(1000, is_causal=True)
    assert sum(branch["pairs"] for branch in found["branches"]) == pairs
    assert found["flops_forward"] == 64 * pairs and found["flops_backward"] == 160 * pairs
    assert found["bytes_q_k_v_out"] == 4 * 1000 * 3 * 16 * 4
    assert found["coverage"] == 1.0
    assert found["neighbours"]["branches"] == [
        {"branch": 0, "count": 3, "first": 128, "last": 130, "step": 1},
        {"branch": 1, "count": 33, "first": 2, "last": 130, "step": 4},
    ]
    shown = call(*options, "--query", "130", "--bidirectional")
    assert "branches at 1,000 positions, 3 heads, bidirectional" in shown and "keys of query 130, head 0" in shown
    no_branch = json.loads(call("plan", "-n", "16", "-w", "16", "-r", "4", "--heads", "2", "--query", "3", "--json"))
    assert no_branch["coverage"] == 0.25
    assert no_branch["neighbours"]["branches"][0] == {"branch": 0, "count": 0, "first": None, "last": None, "step": 1}


def test_plan_leads_with_reach_and_says_where_it_ends() -> None:
    options = ("plan", "-n", "1000", "-w", "64,256", "-r", "1,4", "--heads", "3", "--layers", "2")
    pattern = DilatedPattern((64, 256), (1, 4), 3)
    found = json.loads(call(*options, "--json"))["reach"]
    assert found == {"layers": 2, "segment_shift": "0"} | pattern.reach(2, 1000)._asdict()
    shown = call(*options)
    assert shown.startswith("reach at 1,000 positions, 2 layers")
    assert "The context of 1,000 positions is longer than what can reach it" in shown and "--suggest 1000" in shown
    for more in (("--shift", "alternate", "--layers", "8"), ("-w", "64,1024")):
        reached = call(*options, *more)
        assert "longer than what can reach it" not in reached, reached
    assert "shifted by 0,128" in call(*options, "--shift", "0,128")


def test_plan_suggests_patterns() -> None:
    rows = json.loads(call("plan", "--suggest", "100000", "--heads", "4", "--layers", "6", "--json"))
    assert {row["name"]: row["reach"]["out_of_reach"] == 0 for row in rows} == {
        "geometric": True, "geometric, short": True, "the paper's, shifted": False, "the paper's": False,
    }  # fmt: skip
    for row in rows:
        pattern = DilatedPattern(tuple(row["segment_lengths"]), tuple(row["dilation_rates"]), 4)
        assert row["keys_per_query"] == pattern.pairs(100_000, is_causal=True) / 400_000
        reach = pattern.reach(6, 100_000, segment_shift=row["segment_shift"] if row["segment_shift"] != "0" else 0)
        assert row["reach"] == {"layers": 6, "segment_shift": row["segment_shift"]} | reach._asdict()
    shown = call("plan", "--suggest", "100000", "--heads", "4")
    assert "C: the paper's, shifted: -w 2048,4096,8192,16384,32768 -r 1,2,4,6,12 --shift alternate" in shown


def test_plan_prints_the_bytes_of_a_ring() -> None:
    options = (
        "plan",
        "-n",
        "1048576",
        "-w",
        "2048,262144,1048576",
        "-r",
        "1,8,32",
        "--heads",
        "32",
        "--head-dim",
        "128",
    )
    options += ("--ranks", "8", "--bidirectional")
    ring = json.loads(call(*options, "--json"))["ring"]
    assert ring["bytes_closed_form"] == 640 * 2**20 and ring["closed_form_needs"] is None
    assert {(s["received"], s["sent"], s["dense"]) for s in ring["shares"]} == {(640 << 20, 640 << 20, 14336 << 20)}
    assert "640.0 MiB per rank" in call(*options)
    small = ("-n", "65536", "-w", "128,16384,65536")  # a sixteenth of it: what is missing does not depend on the length
    for more, needs in (
        (("--causal",), "--bidirectional"),
        (("--balanced",), "shards of equal length"),
        (("-n", "65537"), "shards of equal length"),
        (("--offsets", "blocked"), "modulo offsets"),
        (("-r", "1,8,12"), "rates that are multiples of the one before"),
        (("-w", "200,16384,65536"), "shards of whole segments"),
        (("-w", "128,16385,65536"), "segments of whole shards, each a multiple of the one before"),
    ):
        assert f"closed form: needs {needs}\n" in call(*options, *small, *more)
    causal = ("plan", "-n", "1048576", "-w", "2048,32768,524288,1048576", "-r", "1,2,8,16", "--ranks", "4", "--json")
    equal, even = (json.loads(call(*causal, *more))["ring"]["shares"] for more in ((), ("--balanced",)))
    assert sum(s["pairs"] for s in equal) == sum(s["pairs"] for s in even)
    assert max(s["pairs"] for s in even) < 0.9 * max(s["pairs"] for s in equal)


@pytest.mark.parametrize("what", ["pattern", "neighbours", "receptive", "orders", "neighbourhood"])
def test_show_writes_a_picture(what: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    assert f"wrote {path}" in call("show", what, "--out", path).replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_help_of_show_names_the_formats_that_it_writes(tmp_path: Path) -> None:
    help_text = call("show", "--help")
    for ending in (".png", ".svg", ".pdf", ".html"):
        assert ending in help_text
        path = tmp_path / f"x{ending.upper()}"
        assert "wrote" in call("show", "--out", path) and path.stat().st_size > 1000


def test_bench_checks_and_times() -> None:
    options = ("bench", "-n", "256", "-w", "64,256", "-r", "1,2", "--heads", "2", "--head-dim", "16", "--repeats", "1")
    found = json.loads(call(*options, "--json"))
    assert found["check_relative_error"] < 1e-6
    assert found["rows"][0].keys() == {"length", "dilated_s", "tokens_per_s", "dense_s"}
    assert "speed-up" in call(*options, "--backward") and "speed-up" not in call(*options, "--no-dense")


def test_bench_prints_nothing_when_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dilated_attention_pytorch.cli import bench

    right = bench.dilated_attention
    monkeypatch.setattr(bench, "dilated_attention", lambda *a, **k: right(*a, **k) * (1 + (k["backend"] == "auto")))
    message = fails(capsys, monkeypatch, "bench", "-n", "256", "--repeats", "1")
    assert "expected a relative error of at most" in message


def test_info() -> None:
    found = json.loads(call("info", "--json"))
    assert found["versions"]["torch"] and found["devices"][0]["device"].startswith("cpu")
    assert found["devices"][0]["backend"] == "sdpa" and found["devices"][0]["reason"]
    assert "devices" in call("info")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "-w", "1,x"), "expected --segments to be ints with commas between them, got '1,x'"),
        (("plan", "-w", "8,16", "-r", "1"), "expected --segments and --rates of equal length"),
        (("plan", "--offsets", "odd"), "expected --offsets to be one of ['modulo', 'blocked'], got 'odd'"),
        (("plan", "--dtype", "int8"), "expected --dtype to be one of ['bf16', 'fp16', 'fp32'], got 'int8'"),
        (("plan", "-n", "8", "--query", "8"), "expected --query in [0, 8), got 8"),
        (("plan", "--suggest", "0"), "expected --suggest to be at least 1, got 0"),
        (("plan", "--shift", "half"), "expected --shift to be ints with commas between them, got 'half'"),
        (("plan", "--shift", "1,2"), "expected --shift of one int per layer, 12, got 2"),
        (("plan", "--length", "0"), "expected --length to be at least 1, got 0"),
        (("show", "picture"), "expected WHAT to be one of ['pattern', 'neighbours', 'receptive', "),
        (("show", "pattern", "--grid", "4,4"), "expected no --grid with 'show pattern', got 4,4"),
        (("show", "orders", "--grid", "4"), "expected --grid of 2 or 3 sizes, got 1"),
        (("show", "orders", "--rates", "1,2"), "expected no --rates with 'show orders'"),
        (("show", "neighbourhood", "-n", "64"), "expected no --length with 'show neighbourhood'"),
        (("show", "neighbourhood", "--grid", "4,4", "--query", "16"), "expected --query in [0, 16), got 16"),
        (("show", "pattern", "--layers", "3"), "expected no --layers with 'show pattern', got 3"),
        (
            ("show", "receptive", "-w", str(2**63 - 1), "-r", "1", "--shift", str(2**63 - 2)),
            "expected --shift to leave every position below 2**63",
        ),
        (("show", "receptive", "--layers", "0"), "expected --layers to be at least 1, got 0"),
        (("show", "neighbours", "--head", "9"), "expected --head in [0, 4), got 9"),
        (("show", "pattern", "--out", "x.gif"), "expected --out to end in .png, .svg, .pdf or .html, got 'x.gif'"),
        (("show", "receptive", "--out", "x.html"), "expected --out to end in .png, .svg or .pdf, got 'x.html'"),
        (
            ("show", "--head", "0", "--head", "1", "--out", "x.html"),
            "expected one --head with an --out that ends in .html",
        ),
        (("show", "--out", "x.html", "-n", "16385"), "expected --length to be below 16385, got 16385"),
        (("show", "--out", "x.html", "--heads", "129"), "expected --heads to be below 129, got 129"),
        (("bench", "--dtype", "int8"), "expected --dtype to be one of"),
        (("bench", "--device", "tpu"), "expected --device to be cpu, cuda or cuda:N, got 'tpu'"),
        (("train", "--out", "nowhere", "--device", "cuda:99"), "expected a --device of this machine"),
        (("train", "--out", "nowhere", "--preset", "huge"), "expected --preset to be one of"),
        (("train", "--out", "nowhere", "--val-fraction", "1"), "expected --val-fraction in (0, 1), got 1.0"),
        (("plan", "--heads", "0"), "expected --heads to be at least 1, got 0"),
        (("plan", "--head", "12", "--query", "3"), "expected --head in [0, 12), got 12"),
        (("train", "--out", "nowhere", "--data", "nothing-here"), "expected a folder of text, found nothing at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in fails(capsys, monkeypatch, *arguments)


def test_without_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("dilated_attention_pytorch.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        "error: the command line needs typer, which is not installed: pip install 'dilated-attention-pytorch[cli]'\n"
    )


def process(*arguments: object, **how: Any) -> subprocess.Popen[bytes]:
    """The command as a shell starts it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | how.pop("env", {})
    command = [sys.executable, "-m", "dilated_attention_pytorch.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **how)


def test_a_reader_that_leaves_ends_no_training(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with process("train", "--data", text, "--out", out, "--sample-bytes", "5", *TINY, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline().startswith(b"corpus: ")
        run.stdout.close()
        assert run.wait(120) == 0
    assert (out / "model.safetensors").is_file() and (out / "sample.txt").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_terminal_that_closes_is_129(text: Path, tmp_path: Path) -> None:
    record, (terminal, other_end) = tmp_path / "run" / "metrics.jsonl", os.openpty()
    more = ("--set=steps=100000", "--set=eval_every=5")
    arguments = ("train", "--data", text, "--out", record.parent, *TINY, *more)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children of nohup would ignore it too
    run = process(*arguments, stdin=other_end, stdout=other_end, stderr=other_end)
    signal.signal(signal.SIGHUP, before)
    with run:
        os.close(other_end)
        while not (record.exists() and record.stat().st_size > 1000):
            assert run.poll() is None
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 1 << 16)
        os.close(terminal)
        run.send_signal(signal.SIGHUP)
        assert run.wait(120) == 129
    assert any(record.parent.glob("step-*/state.json"))


def test_text_that_the_output_cannot_show_is_escaped(trained: tuple[Path, str]) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    arguments = ("generate", trained[0], "--prompt", "ä", "--bytes", "20", "--seed", "0")
    with process(*arguments, env=ascii_only, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        printed, said = run.communicate(timeout=120)
    assert run.returncode == 0 and printed.startswith(b"\\xe4"), said


def test_a_real_process(tmp_path: Path) -> None:
    """The command as a shell runs it: an answer, and an error without a traceback."""
    command = [sys.executable, "-m", "dilated_attention_pytorch.cli"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    good = subprocess.run(
        [*command, "plan", "-n", "64", "--json"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert good.returncode == 0 and json.loads(good.stdout)["length"] == 64
    bad = subprocess.run([*command, "plan", "-r", "0"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: expected ") and bad.stderr.count("\n") == 1


def test_help_names_no_types_of_python(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags take nothing, and what may be repeated takes text."""
    for command in ("train", "plan", "show", "bench", "convert"):
        monkeypatch.setattr(sys, "argv", ["dilated-attention", command, "--help"])
        with pytest.raises(SystemExit):
            run()
        printed = capsys.readouterr().out
        assert "--help" in printed
        assert "<bool>" not in printed and "list[" not in printed, command
