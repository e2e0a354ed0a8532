"""`slide embed`: what it writes, that it goes on after a kill, over ranks, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import slide_files as write
import torch
from command import call, fails
from ring_pool import Pool
from slide_embed_tasks import embed as embed_folder
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app
from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.slide.files import SlideReader, find_slides
from dilated_attention_pytorch.models.slide.results import Embedding, ResultFolder
from dilated_attention_pytorch.models.slide.work import batches_of, deal
from dilated_attention_pytorch.testing import relative_norm

COUNTS = (5, 61, 62, 90, 150, 333)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SlideEncoder]:
    """A folder of slides, a checkpoint, and the encoder in it."""
    folder, checkpoint = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("checkpoint")
    for count in COUNTS:
        corners = write.tissue(count) * 512
        write.trident(folder / f"s{count}.h5", write.features(count), corners, magnification=40)
    return folder, checkpoint, write.checkpoint(checkpoint)


def embed(made: tuple[Path, Path, Any], out: Path, *more: object, folder: Path | None = None) -> str:
    return call("slide", "embed", folder or made[0], "--checkpoint", made[1], "--out", out, "--device", "cpu", *more)


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every result."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".h5", ".pt", ".npz")}


def arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {key: file[key][()] for key in file} | {"settings": json.loads(file.attrs["settings"])}
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files} | json.loads(str(archive["about"]))


@pytest.mark.parametrize("form", ["h5", "pt", "npz"])
def test_a_file_per_slide(made: tuple[Path, Path, SlideEncoder], tmp_path: Path, form: str) -> None:
    folder, _, encoder = made
    printed = embed(made, tmp_path, "--format", form, "--layers", "0,2", "--tiles", "--batch-tokens", "200")
    assert "6 slides written" in printed and "0 have no result" in printed
    assert "6 slides: TRIDENT: 256 pixels at 20x, level 0 at 40x; divided by 512" in printed
    reader = SlideReader.of(encoder.config)
    for path in find_slides(folder):
        slide, found = reader.read(path), arrays(tmp_path / f"{path.stem}.{form}")
        with torch.inference_mode():
            want = encoder(slide.tiles, slide.coords)
        assert relative_norm(torch.as_tensor(found["features"]), want.pooled[0]) <= CLOSE
        assert relative_norm(torch.as_tensor(found["layers"]), want.layers[[0, 2], 0]) <= CLOSE
        assert relative_norm(torch.as_tensor(found["tiles"]), want.tiles[0]) <= CLOSE
        assert torch.equal(torch.as_tensor(found["coords"]), slide.corners)
        settings = found["settings"]
        assert settings["layers"] == [0, 2] and settings["config"] == encoder.config.to_dict()
        assert settings["versions"]["torch"] == torch.__version__ and settings["dtype"] == "float32"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table(made: tuple[Path, Path, SlideEncoder], tmp_path: Path, form: str) -> None:
    embed(made, tmp_path / "files", "--format", "npz", "--layers", "all")
    embed(made, tmp_path / "table", "--format", form, "--layers", "all")
    path = tmp_path / "table" / f"embeddings.{form}"
    if form == "csv":
        settings = json.loads(path.read_text().splitlines()[0].removeprefix("# "))
        table = pd.read_csv(path, comment="#", dtype={"layer": str})
    else:
        import pyarrow.parquet

        settings = json.loads(pyarrow.parquet.read_schema(path).metadata[b"dilated_attention"])
        table = pd.read_parquet(path)
    assert settings["layers"] == [0, 1, 2] and list(table["layer"][:4]) == ["pooled", "0", "1", "2"]
    assert len(table) == 4 * len(COUNTS)
    for count in COUNTS:
        mine = table[table["slide"] == f"s{count}"]
        assert set(mine["num_tiles"]) == {count}
        found = arrays(tmp_path / "files" / f"s{count}.npz")
        rows = mine.filter(regex=r"^f\d+$").to_numpy(np.float32)
        assert np.array_equal(rows, np.concatenate((found["features"][None], found["layers"])))


def test_half_precision_and_pooling(made: tuple[Path, Path, SlideEncoder], tmp_path: Path) -> None:
    """bf16 differs by its own rounding; pooled over tiles is another embedding."""
    embed(made, tmp_path / "full")
    embed(made, tmp_path / "half", "--dtype", "bf16")
    embed(made, tmp_path / "mean", "--global-pool")
    full, half, mean = (torch.as_tensor(arrays(tmp_path / x / "s333.h5")["features"]) for x in ("full", "half", "mean"))
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < relative_norm(half, full) <= 8 * eps  # as many roundings as the two layers' products add up to
    assert relative_norm(mean, full) > 0.1


def test_again_it_does_nothing_and_other_settings_are_refused(
    made: tuple[Path, Path, SlideEncoder], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    embed(made, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    assert "0 slides written" in (printed := embed(made, tmp_path)) and "6 were there" in printed
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    same = ("slide", "embed", made[0], "--checkpoint", made[1], "--out", tmp_path, "--device", "cpu")
    message = fails(capsys, monkeypatch, *same, "--dtype", "bf16")
    assert "expected the settings that" in message and "dtype 'float32' (now 'bfloat16')" in message
    other = tmp_path / "other"
    write.checkpoint(other, global_pool=True)
    message = fails(capsys, monkeypatch, *(other if word == made[1] else word for word in same))
    assert "which has config" in message
    # A source that has changed since is embedded again, alone or not.
    os.utime(made[0] / "s90.h5")
    assert "1 slides written" in embed(made, tmp_path)


def test_other_coordinates_are_another_embedding(
    made: tuple[Path, Path, SlideEncoder], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Coordinates that were mended leave no embedding of the old ones, beside features and in a folder of their own."""
    x, at = write.features(60), write.tissue(60)
    for base, factor in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        write.clam(base, "a", x, at * 256 * factor, downsample=1)
    out, folder, beside = tmp_path / "out", tmp_path / "one" / "pt_files", tmp_path / "one" / "patches"
    embed(made, out, folder=folder)
    old = arrays(out / "a.h5")["features"]
    write.clam(tmp_path / "one", "a", x, at * 512, downsample=1)
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # the features stayed
    assert "1 slides written" in embed(made, out, folder=folder)
    assert (arrays(out / "a.h5")["features"] != old).any()
    embed(made, tmp_path / "named", "--coords", beside, folder=folder)
    same = ("slide", "embed", folder, "--checkpoint", made[1], "--out", tmp_path / "named", "--device", "cpu")
    message = fails(capsys, monkeypatch, *same, "--coords", tmp_path / "two" / "patches")
    assert "which has --coords" in message


def test_mistakes(
    made: tuple[Path, Path, SlideEncoder], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    same = ("slide", "embed", made[0], "--checkpoint", made[1], "--out", tmp_path / "out", "--device", "cpu")
    for more, message in (
        (("--format", "doc"), "expected --format to be one of ['h5', 'pt', 'npz', 'csv', 'parquet'], got 'doc'"),
        (("--format", "csv", "--tiles"), "expected --format h5, pt or npz with --tiles, got csv"),
        (("--layers", "3"), "expected --layers to be below 3, got 3"),
        (("--layers", "a"), "expected --layers to be ints with commas between them, got 'a'"),
        (("--grid", "hex"), "expected --grid to be one of ['tile', 'stride'], got 'hex'"),
        (("--coords", "nowhere"), "expected --coords to be a folder, got nowhere"),
        (("--patch-size-level0", "0"), "expected --patch-size-level0 above 0"),
        (("--dtype", "int8"), "expected --dtype to be one of"),
        (("--device", "tpu"), "expected --device to be cpu, cuda or cuda:N"),
    ):
        assert message in fails(capsys, monkeypatch, *same, *more)
        assert not (tmp_path / "out").exists()
    message = fails(capsys, monkeypatch, *same, "--out", made[0])
    assert "expected --out to be another folder than that of the feature files" in message
    assert "expected a folder of feature files, got" in fails(
        capsys, monkeypatch, "slide", "embed", tmp_path / "none", "--checkpoint", made[1], "--out", tmp_path / "out"
    )


def test_forty_odd_files_beside_good_ones(made: tuple[Path, Path, SlideEncoder], tmp_path: Path) -> None:
    """Each is named, no good one is lost, no bad one is written; the numbers of the good ones do not change."""
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    odd = write.odd_files(folder)
    for source in made[0].iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "s5.npz").write_bytes(b"the same slide once more")
    (folder / "s5.h5").unlink()
    (folder / "twice.h5").write_bytes((made[0] / "s90.h5").read_bytes())
    (folder / "twice.npz").write_bytes(b"")
    arguments = ("slide", "embed", folder, "--checkpoint", made[1], "--out", out, "--device", "cpu", "--strict")
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    for name, (message, _) in odd.items():
        (mine,) = [line for line in lines if line.startswith(f"{name}: ")]
        assert mine.startswith(f"{name}: no result: ") and message in mine, mine
    assert any("twice: no result: expected one file of this slide, got twice.h5, twice.npz" in line for line in lines)
    assert {path.stem for path in out.glob("*.h5")} == {f"s{count}" for count in COUNTS[1:]}
    assert not list(out.glob(".*.part"))
    listed = pd.read_csv(out / "problems.csv", keep_default_na=False)  # a slide is called nan
    assert set(listed["slide"]) == {*odd, "twice", "s5"} and len(lines) == len(listed)
    assert f"(0 with doubts), 0 were there, {len(listed)} have no result" in result.stdout
    for count in COUNTS[1:]:
        want = torch.as_tensor(arrays(out / f"s{count}.h5")["features"])
        slide = SlideReader.of(made[2].config).read(made[0] / f"s{count}.h5")
        assert relative_norm(want, made[2](slide.tiles, slide.coords).pooled[0]) <= CLOSE
    # Without --strict, doubts are lines and their slides are written.
    result = CliRunner().invoke(app, [str(a) for a in arguments[:-1]] + ["--out", str(tmp_path / "out2")])
    assert {path.stem for path in (tmp_path / "out2").glob("*.h5")} >= {"copies", "shared", "stride", "outside"}
    # Mended, the same command goes on, and the list of problems goes.
    for path in folder.iterdir():
        if path.stem in listed["slide"].to_numpy():
            path.rmdir() if path.is_dir() else path.unlink()
    assert "5 were there, 0 have no result" in call(*arguments)
    assert not (out / "problems.csv").exists()


@pytest.mark.parametrize("form", ["h5", "pt", "npz"])
def test_equal_results_are_equal_bytes(tmp_path: Path, form: Any) -> None:
    result = Embedding(torch.randn(8), torch.randn(2, 8), None, None, {"slide": "a", "num_tiles": 3})
    folders = [ResultFolder(tmp_path / name, form, {"layers": [0, 1]}) for name in ("one", "two")]
    for folder in folders:
        with folder.held():
            folder.write("a", result)
        time.sleep(1.1)  # a time inside the file would show
    assert folders[0].file("a").read_bytes() == folders[1].file("a").read_bytes()


@pytest.mark.slow
def test_killed_three_times_it_leaves_the_same_files(made: tuple[Path, Path, SlideEncoder], tmp_path: Path) -> None:
    more = ("--batch-tokens", "200", "--layers", "1")
    embed(made, tmp_path / "whole", *more)
    want, out = contents(tmp_path / "whole"), tmp_path / "killed"
    command = [sys.executable, Path(__file__).parents[1] / "helpers" / "slow_embed.py", "slide", "embed", made[0],
               "--checkpoint", made[1], "--out", out, "--device", "cpu", *more]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for goal in (1, 3, 4):
        process = subprocess.Popen([str(word) for word in command], env=env, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while len(contents(out) if out.is_dir() else ()) < goal and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert goal <= len(contents(out)) < len(COUNTS)
        assert all(want[name] == content for name, content in contents(out).items())
    (out / ".s5.h5.0123456789abcdef.part").write_bytes(b"half")  # what a kill within a write leaves
    assert "6 slides" not in embed(made, out, *more)
    assert contents(out) == want and not list(out.glob("*.part"))


def test_batches() -> None:
    sizes = {Path(f"{n}"): n for n in (100, 50, 49, 9, 8, 7, 1)}
    # With the cls token and padding to the longest: 2 x 51 = 102, 4 x 10 = 40.
    assert [[int(p.name) for p in batch] for batch in batches_of(sizes, 102)] == [[100], [50, 49], [9, 8, 7, 1]]
    assert [len(batch) for batch in batches_of(sizes, 1)] == [1] * 7
    hands = deal(batches_of(sizes, 1), sizes, 2)
    assert [[int(batch[0].name) for batch in hand] for hand in hands] == [[100, 8, 7], [50, 49, 9, 1]]
    assert batches_of({}, 5) == []


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2, [2], "slide_embed_tasks")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rates divide its segment lengths, which zero keys over ranks ask for."""
    folder = tmp_path_factory.mktemp("plain")
    write.checkpoint(folder, segment_lengths=(16, 44, 300))
    return folder


@pytest.mark.parametrize("ring_above", [None, 100])
def test_two_ranks_share_the_work(
    made: tuple[Path, Path, SlideEncoder], plain: Path, tmp_path: Path, pool: Pool, ring_above: int | None
) -> None:
    """Slides are dealt out; those above a size are shared, so that no rank holds one."""
    one = embed_folder(None, str(made[0]), str(plain), str(tmp_path / "one"), ring_above)
    assert {outcome.name for outcome in one} == {f"s{count}" for count in COUNTS}
    parts = pool.run("embed", str(made[0]), str(plain), str(tmp_path / "two"), ring_above)
    names = [[outcome.name for outcome in part] for part in parts]
    assert sorted(names[0] + names[1]) == sorted(f"s{count}" for count in COUNTS)
    assert all(len(part) for part in names) and all(outcome.problem is None for part in parts for outcome in part)
    mine, theirs = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert set(mine) == set(theirs)
    for count in COUNTS:
        if ring_above is None:  # the same batches, whoever computes them
            assert mine[f"s{count}.npz"] == theirs[f"s{count}.npz"]
        a, b = (arrays(tmp_path / which / f"s{count}.npz") for which in ("one", "two"))
        for key in ("features", "layers", "tiles", "coords"):
            assert relative_norm(torch.as_tensor(b[key]).double(), torch.as_tensor(a[key]).double()) <= CLOSE


def test_a_damaged_slide_that_ranks_share(
    made: tuple[Path, Path, SlideEncoder], plain: Path, tmp_path: Path, pool: Pool
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    spoiled = write.features(120)
    spoiled[3] = np.nan
    write.trident(folder / "bad.h5", spoiled, write.tissue(120) * 256, magnification=20)
    write.trident(folder / "good.h5", write.features(130), write.tissue(130) * 256, magnification=20)
    first, second = pool.run("embed", str(folder), str(plain), str(tmp_path / "out"), 50)
    assert second == [] and [(x.name, x.problem) for x in first] == [
        ("good", None), ("bad", "expected finite features, got NaN or inf in 1 of 120 tiles"),
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").glob("*.npz")} == {"good.npz"}
    # What ranks cannot compute together is said of the slide, on every rank alike.
    first, second = pool.run("embed", str(folder), str(made[1]), str(tmp_path / "out2"), 50)
    assert second == [] and "expected segments of a multiple of the rate" in str(first[0].problem)


@pytest.mark.slow
def test_under_torchrun(made: tuple[Path, Path, SlideEncoder], plain: Path, tmp_path: Path) -> None:
    """The command as it is, on two processes: a table of all slides, some of them shared."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "dilated_attention_pytorch.cli", "slide", "embed", made[0], "--checkpoint", plain,
               "--out", tmp_path / "two", "--device", "cpu", "--ring-above", "100", "--format", "parquet"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 slides written" in done.stdout and done.stdout.count("slides written") == 1
    embed((made[0], plain, None), tmp_path / "one", "--format", "parquet")
    one, two = (pd.read_parquet(tmp_path / which / "embeddings.parquet") for which in ("one", "two"))
    assert list(one["slide"]) == list(two["slide"])
    numbers = [torch.tensor(table.filter(regex=r"^f\d+$").to_numpy()) for table in (one, two)]
    assert relative_norm(numbers[1], numbers[0]) <= CLOSE
