"""Training with `context_parallel`: sequences and parameters sharded over real processes equal one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import ALONE, TINY, Recorder, curve, interrupt, same, weights
from torch.distributed.checkpoint import HuggingFaceStorageReader

from dilated_attention_pytorch.cli.app import run
from dilated_attention_pytorch.cli.export import export
from dilated_attention_pytorch.models import LongNetConfig, LongNetLM
from dilated_attention_pytorch.models.sharding import ContextShards, ring_config
from dilated_attention_pytorch.training import Corpus, Interrupted, TrainConfig, Trainer, build_corpus
from dilated_attention_pytorch.training.checkpoint import path_of, read_about, steps_in
from dilated_attention_pytorch.training.distributed import RankLayout

# Runs jobs one after another: [config, folder, step after which a signal comes, or 0].
WORKER = """
import functools, json, os, signal, sys
from pathlib import Path
from dilated_attention_pytorch.training import Corpus, Interrupted, TrainConfig, Trainer
from dilated_attention_pytorch.training.distributed import join
from torch.distributed.tensor import DTensor
import torch
torch.set_num_threads(1)
# Inductor takes minutes here; graphs, their breaks and sharded parameters are the same.
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")

def stop(at, step, lines):
    if step == at:
        os.kill(os.getpid(), signal.SIGINT)

with join("cpu") as world:
    for values, out, at in json.loads(sys.argv[1]):
        corpus = Corpus.load(Path(sys.argv[2]), 0.1)
        trainer = Trainer(TrainConfig(**values), corpus, Path(out), world=world)
        assert all(isinstance(p, DTensor) and p.device_mesh.size() == world.size for p in trainer.model.parameters())
        try:
            result = trainer.run(functools.partial(stop, at))
            assert at == 0 and (type(result.model).__name__ == "LongNetLM") == world.is_main
        except Interrupted:
            assert at != 0
"""

Job = tuple[TrainConfig, Path, int]
PLAIN = replace(TINY, dropout=0.0, eval_every=6, eval_excerpts=0)
# Shards of 32 and 31; borders differ from layer to layer; dropped weights are a function of positions; two forwards
# accumulate.
UNEVEN = replace(
    PLAIN,
    context=63,
    segment_shift="alternate",
    attention_dropout=0.2,
    gradient_checkpointing=True,
    micro_batch_size=2,
    steps=3,
    tie_weights=False,
)


def start(processes: int, command: list[str]) -> list[subprocess.Popen[str]]:
    """What torchrun sets, without its launcher's own seconds."""
    port = free_port()
    return [start_rank(rank, processes, port, command) for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(rank: int, processes: int, port: int, command: list[str]) -> subprocess.Popen[str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    env = os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)


def finish(started: list[subprocess.Popen[str]]) -> list[str]:
    """What each process said on stderr, once all have ended."""
    try:
        return [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def launch(processes: int, jobs: list[Job], corpus: Corpus, *, context_parallel: int = 2) -> None:
    changed = [(replace(config, context_parallel=context_parallel), out, at) for config, out, at in jobs]
    work = json.dumps([(asdict(config), str(out), at) for config, out, at in changed])
    started = start(processes, ["-c", WORKER, work, str(corpus.folder)])
    errors = finish(started)
    # All of them: where one fails, the others only say that it is gone.
    assert not any(process.returncode for process in started), "\n".join(errors)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        last = "#" * (0 if i else 360)  # so that the last validation excerpt is one byte short
        (folder / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 10 + last)
    return build_corpus(folder, val_fraction=0.1, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def two(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes, in one launch."""
    runs = tmp_path_factory.mktemp("two")
    with pytest.raises(Interrupted):
        Trainer(PLAIN, corpus, runs / "from_one", world=ALONE).run(Recorder(3, interrupt))
    jobs = [(PLAIN, "plain", 0), (UNEVEN, "uneven", 0), (PLAIN, "again", 3), (PLAIN, "again", 0), (PLAIN, "to_one", 3)]
    launch(2, [(config, runs / name, at) for config, name, at in [*jobs, (PLAIN, "from_one", 0)]], corpus)
    return runs


@pytest.fixture(scope="module")
def one(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    for name, config in (("plain", PLAIN), ("uneven", UNEVEN)):
        Trainer(config, corpus, runs / name, world=ALONE).run()
    return runs


def check_equal(found: Path, wanted: Path) -> None:
    """Losses, gradient norms, evaluations and final weights, to fp32 rounding."""
    assert curve(found) == [(step, name, pytest.approx(value, rel=1e-5)) for step, name, value in curve(wanted)]
    theirs = weights(wanted)
    for name, value in weights(found).items():
        # AdamW divides by the gradient's own size: rounding of a tiny gradient can show, at a step's length.
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=TINY.learning_rate / 10, msg=name)


@pytest.mark.parametrize("name", ["plain", "uneven"])
def test_two_shards_of_a_sequence_equal_the_whole(one: Path, two: Path, corpus: Corpus, name: str) -> None:
    # The last excerpt of an evaluation is shorter, which one of two ranks alone can tell by its shard.
    assert (corpus.val.size - 1) % 64 == 63
    check_equal(two / name, one / name)


def test_a_state_says_the_same_however_it_is_sharded(one: Path, two: Path, tmp_path: Path) -> None:
    found, wanted = (read_about(path_of(runs / "plain", 6)) for runs in (two, one))
    assert len(found.pop("files")) == 2 and len(wanted.pop("files")) == 1
    assert found == wanted | {"config": wanted["config"] | {"context_parallel": 2}}
    kinds = [HuggingFaceStorageReader(str(path_of(runs / "plain", 6))).read_metadata() for runs in (two, one)]
    found, wanted = ({name: (x.size, x.properties.dtype) for name, x in k.state_dict_metadata.items()} for k in kinds)
    assert found == wanted
    assert {path.name for path in (two / "plain").iterdir()} == {path.name for path in (one / "plain").iterdir()}


def test_a_state_becomes_a_model_by_a_command(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(two / "plain", out=tmp_path / "model")
    assert same(weights(tmp_path / "model"), weights(two / "plain"))
    export(two / "plain", out=tmp_path / "half", dtype="bf16", step=6)
    assert {x.dtype for x in weights(tmp_path / "half").values()} == {torch.bfloat16}
    assert "after step 6" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"expected step to be one that is saved in .*plain, got 3, where there are \[6\]"
    ):
        export(two / "plain", step=3)
    with pytest.raises(ValueError, match=r"got a run without saved steps"):
        export(tmp_path)


def test_resume_is_exact_and_takes_another_number_of_shards(one: Path, two: Path, corpus: Corpus) -> None:
    assert curve(two / "again") == curve(two / "plain")
    assert same(weights(two / "again"), weights(two / "plain"))
    check_equal(two / "from_one", one / "plain")
    assert steps_in(two / "to_one") == [3]
    Trainer(PLAIN, corpus, two / "to_one", world=ALONE).run()
    check_equal(two / "to_one", one / "plain")


def test_two_readers_of_two_shards_equal_one_process(corpus: Corpus, tmp_path: Path) -> None:
    # No dropout: two readers' draws are not those of one. Five excerpts, so that one reader's last is none.
    config = replace(UNEVEN, attention_dropout=0.0, steps=2, warmup_steps=0, micro_batch_size=1, eval_excerpts=5)
    launch(4, [(config, tmp_path / "four", 0)], corpus)
    Trainer(config, corpus, tmp_path / "one", world=ALONE).run()
    check_equal(tmp_path / "four", tmp_path / "one")


def test_parameters_alone_can_be_sharded(corpus: Corpus, one: Path, tmp_path: Path) -> None:
    """FSDP2 without context parallelism, interrupted once; and with weights gathered in bf16."""
    sharded = replace(PLAIN, shard_parameters=True)
    short = replace(sharded, steps=2, warmup_steps=0, eval_every=2, precision="bf16", gradient_checkpointing=True)
    jobs = [(sharded, tmp_path / "run", 3), (sharded, tmp_path / "run", 0), (short, tmp_path / "half", 0)]
    launch(2, jobs, corpus, context_parallel=1)
    check_equal(tmp_path / "run", one / "plain")
    Trainer(replace(short, shard_parameters=False), corpus, tmp_path / "half_one", world=ALONE).run()
    # Weights of two ranks and of one are rounded alike; sums over ranks are not.
    wanted = curve(tmp_path / "half_one")
    assert curve(tmp_path / "half") == [(step, name, pytest.approx(value, rel=0.02)) for step, name, value in wanted]


def test_compiled_layers_around_a_ring_equal_eager_ones(corpus: Corpus, one: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, compile=True)
    launch(
        2,
        [(config, tmp_path / "run", 0), (replace(config, gradient_checkpointing=True), tmp_path / "again", 0)],
        corpus,
    )
    check_equal(tmp_path / "run", one / "plain")
    check_equal(tmp_path / "again", one / "plain")


def test_labels_are_shifted_before_the_cut() -> None:
    excerpt = torch.arange(12)[None]
    mesh: Any = object()
    parts = [RankLayout(0, 1, rank, 3, mesh).shard(excerpt) for rank in range(3)]
    assert [inputs.tolist()[0] for inputs, _, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [labels.tolist()[0] for _, labels, _ in parts] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert all(more == {"seq_len": 11} for *_, more in parts)
    seeds = {RankLayout(data, 3, context, 2, mesh).seed for data in range(3) for context in range(2)}
    assert len(seeds) == 6 and RankLayout(2, 3, 0, 2, mesh).seed == RankLayout(2, 3).seed == 2


def test_what_does_not_fit_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    for change, message in (
        ({"context_parallel": 0}, "expected context_parallel to be at least 1, got 0"),
        ({"context_parallel": 65}, "expected context of at least context_parallel, got 64 and 65"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    config = replace(TINY, context_parallel=2)
    with pytest.raises(ValueError, match="multiple of context_parallel 2, got 1; torchrun --nproc-per-node sets it"):
        Trainer(config, corpus, tmp_path, world=ALONE)
    assert config.micro_steps(4) == 2
    with pytest.raises(ValueError, match=r"multiple of 3 \(3 groups of 2 ranks of micro_batch_size 1\), got 4"):
        config.micro_steps(6)
    assert ring_config(TINY.model_config(), mode="ring").mode == "ring"
    with pytest.raises(ValueError, match="expected mixing_gradient='exact' for a sequence over several ranks"):
        ring_config(LongNetConfig(mixing_gradient="detached"))
    with pytest.raises(ValueError, match=r"expected 6 tokens on rank 1 of 2, its shard \[7, 13\) .* of 13, got 7"):
        ContextShards(1, 2, "").start(7, 13)
    model = LongNetLM(TINY.model_config())
    tokens = torch.randint(256, (1, 8))
    with pytest.raises(ValueError, match="expected no seq_len without shard_context, got 8"):
        model(tokens, seq_len=8)
    model._shards = ContextShards(0, 1, "")
    with pytest.raises(ValueError, match="expected no row_start, cu_seqlens or cache after shard_context"):
        model(tokens, row_start=torch.tensor([1]))


def test_the_command_line_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["dilated-attention", "train", "--context-parallel", "2", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2 and not out.exists()
    assert "a multiple of --context-parallel 2, got 1" in capsys.readouterr().err
    out.touch()
    with pytest.raises(SystemExit):
        run()
    assert f"error: expected --out to be a folder, got the file {out}" in capsys.readouterr().err


def test_processes_that_see_different_folders_are_told(corpus: Corpus, tmp_path: Path) -> None:
    config = asdict(replace(PLAIN, shard_parameters=True))
    work = [json.dumps([(config, str(tmp_path / name), 0)]) for name in "ab"]
    cache, port = str(corpus.folder), free_port()
    first, second = finish([start_rank(i, 2, port, ["-c", WORKER, work[i], cache]) for i in range(2)])
    assert "no shard-00002-model-00001-of-00001.safetensors: all processes have to see one folder" in first
    assert "rank 1 ends: rank 0 failed, and says why" in second


def test_where_the_first_rank_fails_the_others_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below a file: rank 0 alone writes, so it alone knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"line {i} of a file that is all its own\n" * 20)
    out.touch()
    small = {"context": 64, "steps": 2, "warmup_steps": 1, "num_layers": 1, "eval_excerpts": 1}
    command = ["-m", "dilated_attention_pytorch.cli", "train", "--context-parallel", "2", "--device", "cpu"]
    command += [
        "--data",
        str(text),
        "--out",
        str(out / "run"),
        *(f"--set={name}={value}" for name, value in small.items()),
    ]
    started = start(2, command)
    first, second = finish(started)
    assert [process.returncode for process in started] == [2, 2], first + second
    assert "error: [Errno 20] Not a directory" in first and "Traceback" not in first
    assert "error: rank 1 ends: rank 0 failed, and says why" in second and "Traceback" not in second
    assert out.read_bytes() == b""
