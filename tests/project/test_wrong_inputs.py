"""More than a hundred wrong inputs to commands: one line in the command's own words, exit code 2, nothing written."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import slide_files as write
import torch
from command import call, fails
from typer.main import get_command

from dilated_attention_pytorch.cli.app import app, run
from dilated_attention_pytorch.models import LongNetLM, reach, save_pretrained

EMBED = "slide embed {slides} --checkpoint {encoder} --out {out}"
MAP = "slide map {slides}/s0.h5 --checkpoint {encoder} --out {out}.png"
TUNE = "slide tune {table} --features {slides} --checkpoint {encoder} --out {out} --folds 2"
TABLE = Path(__file__).with_suffix("").with_name("wrong_inputs.txt")


class Inputs(dict[str, Path]):
    """Right and wrong things to give to commands, in a folder of their own."""

    def __init__(self, root: Path) -> None:
        folders = ["text", "latin", "binary", "empty", "run", "words", "encoder", "slides", "flat", "no_weights"]
        super().__init__({name: root / name for name in (*folders, "bad_config")})
        for folder in self.values():
            folder.mkdir()
        files = {"table": "csv", "gone": "csv", "junk": "pth", "weights": "pth", "list": "json", "program": "py"}
        self.update({name: root / f"{name}.{ending}" for name, ending in (files | {"h5": "h5", "pt": "pt"}).items()})
        for i in range(30):
            (self["text"] / f"{i}.txt").write_text(f"line {i} of a text\n" * 30)
            (self["latin"] / f"{i}.txt").write_bytes(f"café {i}\n".encode("latin-1") * 30)
            (self["binary"] / f"{i}.bin").write_bytes(bytes(range(256)) * 4)
        shape = {"d_model": 32, "num_decoder_layers": 1, "nhead": 2, "dim_feedforward": 32}
        pattern = {"segment_lengths": (16, 64), "dilation_rates": (1, 2)}
        for name, vocabulary in (("run", 256), ("words", 300)):
            save_pretrained(LongNetLM(vocab_size=vocabulary, **shape, **pattern), self[name])
        write.checkpoint(self["encoder"])
        rows = ["slide_id,label,one,days,dead"]
        for i in range(8):
            x = write.features(12 + i)
            write.trident(self["slides"] / f"s{i}.h5", x, write.tissue(12 + i) * 512, magnification=40)
            torch.save(torch.from_numpy(x), self["flat"] / f"s{i}.pt")
            rows.append(f"s{i},{'ab'[i % 2]},same,{i - 1},{i % 2}")
        self["table"].write_text("\n".join(rows) + "\n")
        self["gone"].write_text("slide_id,label\ns0,a\ns9,b\n")
        for name in ("junk", "h5", "pt"):
            self[name].write_bytes(b"not such a file\n")
        torch.save({"a.weight": torch.zeros(3)}, self["weights"])
        self["list"].write_text("[1, 2]")
        (self["no_weights"] / "config.json").write_text((self["run"] / "config.json").read_text())
        (self["bad_config"] / "config.json").write_text("{")
        self["program"].write_text("import math\n")


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrong")


@pytest.fixture(scope="module")
def inputs(root: Path) -> Inputs:
    for name in ("in", "here"):
        (root / name).mkdir()
    return Inputs(root / "in")


def cases() -> list[tuple[str, str]]:
    """Command lines, and how what each says begins. {names} are the inputs, {out} is a place where nothing is."""
    shared = {"EMBED": EMBED, "MAP": MAP, "TUNE": TUNE}
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    split = ((command.split(" "), says.strip()) for command, says in zip(lines[::2], lines[1::2], strict=True))
    return [(" ".join([shared.get(first, first), *rest]), says) for (first, *rest), says in split]


@pytest.mark.parametrize(("command", "says"), cases(), ids=lambda text: text[:60])
def test_one_line_and_nothing_written(
    command: str,
    says: str,
    root: Path,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # matplotlib's fonts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {**inputs, "out": root / "out"}
    before = files(root)
    line = fails(capsys, monkeypatch, *(word.format_map(names) for word in shlex.split(command)))
    assert files(root) == before, "it left something"
    assert line.removeprefix("error: ").startswith(says.format_map(names)), line
    # No words of Python: none with an underscore outside paths, quotes and what was given; no values of its own.
    assert not re.search(r"\w_\w", re.sub(r"'[^']*'|\S*/\S*", "", line.partition(", got")[0])), line
    assert not re.search(r"=True|=False|\bNone\b|torch\.\w+\d", line), line


def commands() -> list[str]:
    top = get_command(app).commands  # type: ignore[attr-defined]
    return [name for name in top if name != "slide"] + [f"slide {name}" for name in top["slide"].commands]


@pytest.mark.parametrize("command", commands())
def test_every_command_refuses_an_option_that_it_has_not(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fails(capsys, monkeypatch, *command.split(), "--no-such-option")
    assert line.startswith(f"error: expected an option of 'dilated-attention {command}', got '--no-such-option'")


def test_there_are_a_hundred() -> None:
    assert len({command for command, _ in cases()}) >= 100


def test_nothing_reaches_stdout_before_a_refusal(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("generate {run} --top-k 0", "show receptive --query 64", f"{MAP} --layer 9"):
        names = {**inputs, "out": inputs["text"] / "out"}
        monkeypatch.setattr("sys.argv", ["dilated-attention", *shlex.split(command.format_map(names))])
        with pytest.raises(SystemExit):
            run()
        assert capsys.readouterr().out == "", command


def test_torchrun_ends_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report on the process that failed first, made by torch's own code from the file it names to each process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    line = fails(capsys, monkeypatch, "train", "--out", tmp_path / "out", "--device", "tpu")
    report = str(ChildFailedError("cli", {0: ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))}))
    assert f"traceback : {line}" in report and "error: expected --device" in line
    assert list(tmp_path.iterdir()) == [file]


def test_a_warning_is_a_line_too(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["dilated-attention", "generate", str(inputs["run"]), "--bytes", "300"])
    monkeypatch.setattr(reach, "_warned", set())
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        warnings.simplefilter("always")
        run()
    assert not stop.value.code
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("warning: the context of 305 positions is longer than what can reach it")


def test_convert_replaces_a_model_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = write.checkpoint(tmp_path / "out")
    torch.save(encoder.state_dict(), tmp_path / "slide.pth")
    before = files(tmp_path / "out")
    command = ("convert", tmp_path / "slide.pth", tmp_path / "out", "--heads", 4, "-w", "16,45,300", "-r", "1,2,5")
    assert "with model.safetensors; --overwrite replaces it" in fails(capsys, monkeypatch, *command)
    assert files(tmp_path / "out") == before
    call(*command, "--overwrite")
    assert files(tmp_path / "out") != before
