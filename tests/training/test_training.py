"""The training loop: exact resume, signals, many processes, what it writes and what it refuses."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from dilated_attention_pytorch.models import LongNetLM, load_pretrained
from dilated_attention_pytorch.training import (
    PRESETS,
    Corpus,
    Interrupted,
    TrainConfig,
    Trainer,
    build_corpus,
    evaluate,
    preset,
    text_stream,
    validation_excerpts,
)
from dilated_attention_pytorch.training.checkpoint import Checkpoints, read_about, steps_in
from dilated_attention_pytorch.training.distributed import World, join
from dilated_attention_pytorch.training.metrics import read_metrics
from dilated_attention_pytorch.training.state import adamw, learning_rate, trained_model
from dilated_attention_pytorch.training.tokenizer import load_tokenizer

ALONE = World(0, 1, torch.device("cpu"))
TINY = TrainConfig(
    d_model=32, nhead=2, num_layers=2, dim_feedforward=64, segment_lengths=(16, 64), dilation_rates=(1, 2), context=64,
    batch_size=4, steps=6, warmup_steps=2, eval_every=3, eval_excerpts=4, log_every=1, checkpoint_every=2, dropout=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 20)
    return build_corpus(folder, val_fraction=0.3, cache=tmp_path_factory.mktemp("cache"))


class Recorder:
    """Told of each step, and can also do something after one."""

    def __init__(self, at: int = 0, action: Any = None) -> None:
        self.at, self.action, self.lines, self.steps = at, action, list[dict[str, Any]](), list[int]()

    def __call__(self, step: int, lines: list[dict[str, Any]]) -> None:
        self.steps.append(step)
        self.lines += lines
        if step == self.at and self.action is not None:
            self.action()


def curve(folder: Path) -> list[tuple[int, str, float]]:
    """Everything of a record that does not depend on the clock."""
    names = ("loss", "lr", "grad_norm", "val_loss", "val_bpb")
    return [(line["step"], n, line[n]) for line in read_metrics(folder / "metrics.jsonl") for n in names if n in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_saves_and_resume_is_exact(corpus: Corpus, tmp_path: Path) -> None:
    """Six steps straight equal three, an interruption and three more: losses and weights bit for bit."""
    straight = Trainer(TINY, corpus, tmp_path / "a", world=ALONE).run()
    with pytest.raises(Interrupted, match="interrupted after step 3, which is saved"):
        Trainer(TINY, corpus, tmp_path / "b", world=ALONE).run(Recorder(3, interrupt))
    assert steps_in(tmp_path / "b") == [3]
    assert [line["step"] for line in read_metrics(tmp_path / "b" / "metrics.jsonl") if "loss" in line] == [1, 2, 3]
    torch.manual_seed(99)  # whatever the process drew meanwhile
    torch.rand(7)
    recorder = Recorder()
    resumed = Trainer(TINY, corpus, tmp_path / "b", world=ALONE).run(recorder)
    assert recorder.steps == [4, 5, 6]
    assert curve(tmp_path / "b") == curve(tmp_path / "a")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert resumed.evaluation == straight.evaluation


def test_work_lost_after_the_last_checkpoint_is_done_again(corpus: Corpus, tmp_path: Path) -> None:
    """A crash at step 5, saved at 4: the record's later lines, one of them half-written, are replaced."""
    Trainer(TINY, corpus, tmp_path / "a", world=ALONE).run()

    def crash() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        Trainer(TINY, corpus, tmp_path / "b", world=ALONE).run(Recorder(5, crash))
    assert steps_in(tmp_path / "b") == [4]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    Trainer(TINY, corpus, tmp_path / "b", world=ALONE).run()
    assert curve(tmp_path / "b") == curve(tmp_path / "a")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_finished_run_is_not_trained_again(corpus: Corpus, tmp_path: Path) -> None:
    first = Trainer(TINY, corpus, tmp_path, world=ALONE).run()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = Trainer(TINY, corpus, tmp_path, world=ALONE).run()
    assert again.evaluation == first.evaluation
    assert (tmp_path / "metrics.jsonl").read_text() == before
    Trainer(TINY, corpus, tmp_path, world=ALONE, restart=True).run()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(before.splitlines())


class Killed(BaseException):
    """What no handler of errors takes for one."""


def test_killed_at_any_write_the_same_command_ends_as_if_never(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every moment at which a file is moved to its place, in turn; the files that a kill leaves are those of then."""
    config = replace(TINY, steps=2, warmup_steps=0, checkpoint_every=1)
    moved: list[Path] = []
    move = os.replace

    def count(source: Path, target: Path) -> None:
        moved.append(target)
        if len(moved) == at:
            raise Killed
        move(source, target)

    monkeypatch.setattr(os, "replace", count)
    at = 0
    Trainer(config, corpus, tmp_path / "straight", world=ALONE).run()
    for at in range(1, len(moved) + 1):
        moved.clear()
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            Trainer(config, corpus, folder, world=ALONE).run()
        at = 0
        Trainer(config, corpus, folder, world=ALONE).run()
        assert curve(folder) == curve(tmp_path / "straight")
        assert same(weights(folder), weights(tmp_path / "straight"))
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "straight").iterdir()}
    (folder / "model.safetensors").unlink()
    Trainer(config, corpus, folder, world=ALONE).run()
    assert same(weights(folder), weights(tmp_path / "straight"))


def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_last_state(corpus: Corpus, tmp_path: Path) -> None:
    def poison() -> None:
        next(trainer.model.parameters()).data.fill_(float("nan"))

    trainer = Trainer(TINY, corpus, tmp_path, world=ALONE)
    with pytest.raises(FloatingPointError, match="expected a finite gradient in step 4, got a norm of nan"):
        trainer.run(Recorder(3, poison))
    assert steps_in(tmp_path) == [2]
    assert all(value.isfinite().all() for value in trained_model(tmp_path)[0].state_dict().values())
    assert all(math.isfinite(value) for _, _, value in curve(tmp_path))


def test_two_runs_never_share_a_folder(corpus: Corpus, tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        with pytest.raises(ValueError, match="expected a folder that no other run is writing to, got") as raised:
            Trainer(TINY, corpus, tmp_path, world=ALONE).run()
        refused.append(raised.value)

    Trainer(TINY, corpus, tmp_path, world=ALONE).run(Recorder(3, second))
    assert refused
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_links_at_guessed_names_are_not_followed(corpus: Corpus, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".state.json.tmp", ".train.json.tmp", "metrics.tmp"):
        (tmp_path / name).symlink_to(victim)
    Trainer(replace(TINY, steps=1, warmup_steps=0), corpus, tmp_path, world=ALONE).run()
    assert victim.read_text() == "mine"


def test_restart_is_from_the_first_step_on(corpus: Corpus, tmp_path: Path) -> None:
    """Killed before its first save, it does not go on from the run that it replaces."""
    Trainer(TINY, corpus, tmp_path, world=ALONE).run()

    def crash() -> None:
        raise RuntimeError("out of luck")

    other = replace(TINY, seed=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        Trainer(other, corpus, tmp_path, world=ALONE, restart=True).run(Recorder(1, crash))
    recorder = Recorder()
    Trainer(other, corpus, tmp_path, world=ALONE).run(recorder)
    assert recorder.steps == [1, 2, 3, 4, 5, 6]


TWO_STEPS = replace(TINY, steps=2, warmup_steps=0)


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    Trainer(TWO_STEPS, corpus, folder, world=ALONE).run()
    return folder


def sealed(change: Any, path: Path) -> None:
    """Changes what a state says of itself, with a checksum that fits."""
    content = json.loads((path / "state.json").read_text())
    change(content["about"])
    content["crc32"] = zlib.crc32(json.dumps(content["about"]).encode())
    (path / "state.json").write_text(json.dumps(content))


def tensors(change: Any, path: Path) -> None:
    """Changes a state's tensors, with checksums that fit."""
    (file,) = path.glob("*.safetensors")
    with safetensors.safe_open(file, "pt") as opened:
        found, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    change(found)
    places = {name: {"saved_offsets": [0] * x.dim()} for name, x in found.items()}
    save_file(found, file, metadata | {"DCP_SHARDING_INFO": json.dumps(places)})
    sealed(lambda about: about["files"].update({file.name: zlib.crc32(file.read_bytes())}), path)


WEIGHT = "model.embed_tokens.weight"
MOMENT = "optimizer.embed_tokens.weight.exp_avg"


class TestDamagedState:
    """A state that is not what a run left is named in one line, and never taken."""

    def resume(self, corpus: Corpus, folder: Path) -> None:
        Trainer(TWO_STEPS, corpus, folder, world=ALONE)

    @pytest.fixture
    def state(self, finished: Path, tmp_path: Path) -> Path:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        return tmp_path / "step-00000002"

    @pytest.mark.parametrize("what", ["truncated", "empty", "text", "code", "absent"])
    @pytest.mark.parametrize("which", ["state.json", "*.safetensors"])
    def test_files_that_are_none(self, what: str, which: str, state: Path, corpus: Corpus) -> None:
        (file,) = state.glob(which)
        whole = file.read_bytes()
        contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"text", "code": pickle.dumps(print)}
        file.write_bytes(contents[what]) if what in contents else file.unlink()
        with pytest.raises(ValueError, match=r"expected .*step-00000002.* to hold the state of a run, got ") as raised:
            self.resume(corpus, state.parent)
        assert "start over (restart=True)" in str(raised.value)

    @pytest.mark.parametrize(
        ("of", "change", "message"),
        [
            (sealed, lambda s: s.clear(), "state.json to hold the state of a run, got KeyError"),
            (sealed, lambda s: s.update(step=10**9), r"state.json to hold the state of a run, got step 1000000000:"),
            (sealed, lambda s: s.update(step=-3), "got step -3:"),
            (sealed, lambda s: s.update(version=3), "expected a state of version 2 in .*, got 3"),
            (sealed, lambda s: s.update(step="2"), "to hold the state of a run, got step 2:"),
            (sealed, lambda s: s["files"].update({"another": 1}), "got no another"),
            (tensors, lambda s: s.pop(WEIGHT), f"got less than the run has: {WEIGHT}"),
            (tensors, lambda s: s.pop(MOMENT), f"got less than the run has: {MOMENT}"),
            (tensors, lambda s: s.update(more=torch.zeros(2)), "got more than the run has: more"),
            (tensors, lambda s: s.update({WEIGHT: torch.zeros(3)}), rf"got {WEIGHT} of shape \(3,\) and torch.float32"),
            (tensors, lambda s: s.update({MOMENT: s[MOMENT].double()}), f"got {MOMENT} of shape .* and torch.float64"),
        ],
    )
    def test_contents_that_do_not_fit(self, of: Any, change: Any, message: str, state: Path, corpus: Corpus) -> None:
        of(change, state)
        with pytest.raises(ValueError, match=message):
            self.resume(corpus, state.parent)

    @pytest.mark.parametrize("which", ["state.json", "*.safetensors"])
    def test_flipped_bits(self, which: str, state: Path, corpus: Corpus) -> None:
        """In a tensor, in a header, in JSON: noticed, or of no effect (the case of a letter, white space)."""
        (file,) = state.glob(which)
        whole = bytearray(file.read_bytes())
        wanted = read_about(state)
        for place in np.random.default_rng(0).integers(0, 8 * len(whole), 20).tolist():
            whole[place // 8] ^= 1 << place % 8
            file.write_bytes(whole)
            if which != "state.json":
                with pytest.raises(ValueError, match="to hold the state of a run, got a wrong checksum"):
                    self.resume(corpus, state.parent)
            else:
                try:
                    assert read_about(state) == wanted
                except ValueError as error:
                    assert "to hold the state of a run, got" in str(error)
            whole[place // 8] ^= 1 << place % 8

    def test_a_state_of_an_older_version_is_named(self, corpus: Corpus, tmp_path: Path) -> None:
        (tmp_path / "state.pt").write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"expected a state of version 2 in .*, got state\.pt, which is of version 1"
        ):
            self.resume(corpus, tmp_path)
        Trainer(TWO_STEPS, corpus, tmp_path, world=ALONE, restart=True).run()
        assert not (tmp_path / "state.pt").exists()
        self.resume(corpus, tmp_path)


def test_a_save_is_what_the_tensors_were_when_it_began(tmp_path: Path) -> None:
    """Steps go on while it is written; the one before ends first, and the last `keep` stay."""
    world, x = ALONE, torch.zeros(1000, 1000)
    checkpoints = Checkpoints(tmp_path, world, keep=2)
    for step in (1, 2, 3):
        x.fill_(step)
        checkpoints.save(step, {"x": x}, {})
        x.fill_(-1)
        checkpoints.best = (0.0, 1)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    for step in (1, 2, 3):
        checkpoints.load(step, {"x": x})
        assert (x == step).all()
    checkpoints.sweep(everything=True)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_does_not_stop_a_run(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=2, warmup_steps=0)
    Trainer(config, corpus, tmp_path, world=ALONE).run()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for damaged in (b'null\n[1]\n{"step": "1"}\n\xff\xfe\n' + b'{"a":' * 100_000 + b"\n" + whole, b"", bytes(9)):
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"the record of 2 steps in .*metrics\.jsonl, got damaged lines or none"):
            Trainer(config, corpus, tmp_path, world=ALONE).run()
        assert (tmp_path / "metrics.jsonl").read_bytes() == (whole if whole in damaged else b"")


def test_a_full_disk_is_named_and_leaves_the_last_state(corpus: Corpus, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(OSError, match=r"expected room and permission to write .*step-00000004, got: "):
            Trainer(TINY, corpus, tmp_path, world=ALONE).run(Recorder(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_in(tmp_path) == [2]
    assert not list(tmp_path.glob(".*.part"))
    left = tmp_path / f".model.safetensors.{'0' * 16}.part"
    left.write_bytes(b"of a process that was killed")
    Trainer(TINY, corpus, tmp_path, world=ALONE).run()
    assert not left.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_closed_terminal_saves_too(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise OSError("Input/output error")  # what writing to a terminal that is gone gives

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as raised:
            Trainer(TINY, corpus, tmp_path / "a", world=ALONE).run(Recorder(3, hang_up))
        assert raised.value.signal_number == signal.SIGHUP
        assert steps_in(tmp_path / "a") == [3]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        Trainer(TINY, corpus, tmp_path / "b", world=ALONE).run(Recorder(3, hang_up))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_refuses_another_run(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=2, warmup_steps=0)
    Trainer(config, corpus, tmp_path, world=ALONE).run()
    with pytest.raises(
        ValueError, match=r"learning_rate 0.001 \(now 0.002\), segment_lengths \[16, 64\] \(now \[32, 64\]\)"
    ):
        Trainer(replace(config, learning_rate=0.002, segment_lengths=(32, 64)), corpus, tmp_path, world=ALONE)
    with pytest.raises(ValueError, match="the text has changed"):
        Trainer(config, replace(corpus, fingerprint="other"), tmp_path, world=ALONE)
    Trainer(replace(config, log_every=7), corpus, tmp_path, world=ALONE)  # changes what is written alone


def test_what_a_run_writes(corpus: Corpus, tmp_path: Path) -> None:
    result = Trainer(TINY, corpus, tmp_path, world=ALONE).run()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000006", "model.safetensors", "config.json", "train.json", "metrics.jsonl", ".lock"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "bpb", "lr", "grad_norm", "tokens_per_s", "memory_bytes"} == set(train[0])
    assert train[0]["bpb"] == pytest.approx(train[0]["loss"] / math.log(2))
    assert [line["step"] for line in lines if "val_bpb" in line] == [3, 6]
    assert set(lines[-1]["val_loss_by_position"]) == {"0", "1", "2", "4", "8", "16", "32"}
    assert lines[-1]["val_bpb"] == result.evaluation.bits_per_byte
    settings = json.loads((tmp_path / "train.json").read_text())
    assert settings["corpus"] == corpus.fingerprint and settings["segment_lengths"] == [16, 64]
    tokens = torch.randint(256, (1, 50))
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path)(tokens), result.model.eval()(tokens))


def test_accumulation_and_checkpointing_change_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """Four sequences at once, one by one, or with activations computed again: the same gradients up to rounding."""
    config = replace(TINY, steps=2, warmup_steps=0, dropout=0.0)
    losses = {}
    for name, change in {
        "plain": {"micro_batch_size": 4},
        "accumulated": {"micro_batch_size": 1},
        "checkpointed": {"micro_batch_size": 4, "gradient_checkpointing": True},
    }.items():
        Trainer(replace(config, **change), corpus, tmp_path / name, world=ALONE).run()
        losses[name] = [value for _, key, value in curve(tmp_path / name) if key in ("loss", "grad_norm")]
    assert losses["accumulated"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)


def test_bits_per_byte_weigh_every_byte_alike(corpus: Corpus) -> None:
    """Batched, with a short last excerpt, equal to one byte after another."""
    torch.manual_seed(0)
    model = LongNetLM(TINY.model_config())
    excerpts = validation_excerpts(corpus.val[:1500], context=64)
    assert len({len(excerpt) for excerpt in excerpts}) == 2
    found = evaluate(model, excerpts, ALONE, batch_size=3)
    assert model.training
    nats, text = 0.0, 0
    model.eval()
    for excerpt in excerpts:
        tokens = torch.from_numpy(excerpt.astype(np.int64))
        with torch.no_grad():
            rows = model(tokens[None, :-1])[0].double().log_softmax(-1)
        nats -= float(rows[torch.arange(len(rows)), tokens[1:]].sum())
        text += int((tokens[1:] != 0).sum())
    assert found.num_bytes == text < 1499
    assert found.loss == pytest.approx(nats / 1499, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / text, rel=1e-6)


def test_it_learns(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=40, warmup_steps=4, learning_rate=1e-2, dropout=0.0, batch_size=8, micro_batch_size=8)
    result = Trainer(config, corpus, tmp_path, world=ALONE).run()
    assert result.evaluation.bits_per_byte < 3.0  # 8 bits at the start


def test_bf16_autocast_trains_on_a_cpu_too(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=2, warmup_steps=0, dropout=0.0)
    for precision in ("fp32", "bf16"):
        Trainer(replace(config, precision=precision), corpus, tmp_path / precision, world=ALONE).run()
    (_, _, fp32), *_ = curve(tmp_path / "fp32")
    (_, _, bf16), *_ = curve(tmp_path / "bf16")
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.02)


def test_tensorboard(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, steps=1, warmup_steps=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match=r"pip install 'dilated-attention-pytorch\[track\]'"):
            Trainer(config, corpus, tmp_path / "a", world=ALONE, tensorboard=True).run()
    pytest.importorskip("tensorboard")
    Trainer(config, corpus, tmp_path / "b", world=ALONE, tensorboard=True).run()
    assert list((tmp_path / "b" / "tensorboard").glob("events.*"))


def test_schedule_and_decay() -> None:
    config = replace(TINY, steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    decayed, plain = adamw(LongNetLM(TINY.model_config()), TINY).param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0


def test_config_is_checked() -> None:
    assert set(PRESETS) >= {"demo"} and preset("demo").context >= 4096 and len(preset("demo").segment_lengths) >= 2
    with pytest.raises(ValueError, match=r"expected preset to be one of .*'demo'.*, got 'huge'"):
        preset("huge")
    for change, message in (
        ({"steps": 0}, "expected steps to be at least 1, got 0"),
        ({"warmup_steps": 6}, "expected warmup_steps below steps, got 6 and 6"),
        ({"learning_rate": 0.0}, "expected learning_rate above 0, got 0.0"),
        ({"beta1": 1.0}, r"expected beta1 in \[0, 1\), got 1.0"),
        ({"final_rate": 2.0}, r"expected final_rate in \[0, 1\], got 2.0"),
        ({"weight_decay": -1.0}, "expected weight_decay of at least 0, got -1.0"),
        ({"precision": "fp8"}, "expected precision to be one of .* got 'fp8'"),
        ({"micro_batch_size": 3}, "expected batch_size to be a multiple of micro_batch_size, got 4 and 3"),
        ({"dilation_rates": (1,)}, "of equal length, got 2 lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    for change in ({"compile": 1}, {"grad_clip": "1"}, {"context": 64.0}):
        with pytest.raises(TypeError, match=f"expected {next(iter(change))} to be"):
            replace(TINY, **change)
    changed = TINY.changed({"steps": "9", "learning_rate": "2e-4", "segment_lengths": "8,32", "compile": "true"})
    assert changed == replace(TINY, steps=9, learning_rate=2e-4, segment_lengths=(8, 32), compile=True)
    for name, text, message in (
        ("stepz", "1", "expected a field of the training config, got 'stepz'"),
        ("steps", "many", "expected an int for steps, got 'many'"),
        ("compile", "yes", "expected true or false for compile, got 'yes'"),
        ("segment_lengths", "8;9", "expected ints with commas between them for segment_lengths, got '8;9'"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY.changed({name: text})
    with pytest.raises(ValueError, match="expected batch_size to be a multiple of 3"):
        TINY.micro_steps(3)


def test_text_comes_as_it_is_written() -> None:
    torch.manual_seed(0)
    model = LongNetLM(TINY.model_config()).eval()
    pieces = list(text_stream(model, load_tokenizer(), "dé", 40, seed=1))
    assert pieces == list(text_stream(model, load_tokenizer(), "dé", 40, seed=1))
    assert len(pieces) > 1 and all(pieces)
    assert len("".join(pieces).encode()) <= 40 * 3  # a byte that is no UTF-8 becomes three


def test_join_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a device this machine has, got 'cuda'"), join("cuda"):
        pass
    with join() as world:
        assert world == ALONE and world.is_main and world.any(True) and not world.any(False)


DISTRIBUTED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from dilated_attention_pytorch.training import TrainConfig, Trainer, Corpus
from dilated_attention_pytorch.training.distributed import join
import torch
torch.set_num_threads(1)
config, cache, out = TrainConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
with join("cpu") as world:
    Trainer(config, Corpus.load(cache, 0.3), out, world=world).run()
"""


LEAVING = """
import gc, time, weakref
import torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from dilated_attention_pytorch.training.distributed import join
with join("cpu") as world:
    # DTensor's caches of rules hold meshes, which hold the group.
    x = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    assert (x + x).sum().full_tensor() == 12
    del x
    group = weakref.ref(dist.group.WORLD)
    dist.barrier()
    start = time.perf_counter()
seconds = time.perf_counter() - start
gc.collect()
assert not dist.is_initialized()
assert group() is None, "its threads would live on"
assert seconds > 0.4, seconds
"""


def launch(processes: int, config: dict[str, Any], cache: Path, out: Path) -> None:
    start(processes, ["-c", DISTRIBUTED, json.dumps(config), str(cache), str(out)])


def start(processes: int, arguments: list[str]) -> None:
    """What torchrun sets, without its launcher's own seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, *arguments]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()


def test_a_group_ends_some_time_after_its_last_collective() -> None:
    """Its threads may still be at work: ended at once, one run of two ranks in fifteen hung."""
    start(2, ["-c", LEAVING])


def test_two_processes_equal_one_on_the_joined_batch(corpus: Corpus, tmp_path: Path) -> None:
    """Losses, gradient norms, evaluations and final weights of DDP over gloo, to fp32 rounding."""
    config = replace(TINY, steps=3, warmup_steps=0, eval_every=3, dropout=0.0)
    cache = corpus.folder
    values = asdict(config)
    launch(2, values, cache, tmp_path / "two")
    one = Trainer(config, corpus, tmp_path / "one", world=ALONE).run()
    assert curve(tmp_path / "two") == [
        (step, name, pytest.approx(value, rel=1e-4)) for step, name, value in curve(tmp_path / "one")
    ]
    found = weights(tmp_path / "two")
    for name, value in one.model.state_dict().items():
        # AdamW divides by the gradient's own size: rounding of a tiny gradient can show, at a step's length.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=config.learning_rate / 10, msg=name)


def test_a_killed_process_loses_nothing_saved(corpus: Corpus, tmp_path: Path) -> None:
    """SIGTERM to a real process: it saves the step in hand, and another process goes on from there."""
    config = replace(TINY, steps=2000, checkpoint_every=2000, eval_every=2000)
    values = asdict(config)
    cache, out = corpus.folder, tmp_path / "run"
    command = [sys.executable, "-c", DISTRIBUTED, json.dumps(values), str(cache), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) > 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Interrupted: interrupted after step" in errors
    (step,) = steps_in(out)
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, step + 1))
    assert 0 < step < 2000 and Trainer(config, corpus, out, world=ALONE).step == step
