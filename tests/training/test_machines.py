"""docs/machines.md: its commands as they stand there, with two agents of torchrun on one machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_training import ALONE, TINY, curve

from dilated_attention_pytorch.training import Trainer, build_corpus

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
CONFIG = replace(TINY, dropout=0.0, steps=4, warmup_steps=1, eval_every=2, cpu_threads=1)


def block(language: str) -> str:
    """The page's only block of a language, for machines of one CPU process each, a small model and this folder."""
    (source,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {name: value for name, value in CONFIG.to_dict().items() if name != "shard_parameters"}
    lists = {name: ",".join(map(str, value)) for name, value in values.items() if isinstance(value, list)}
    small = " ".join(f"--set {name}={value}" for name, value in (values | lists).items())
    for old, new in (
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        (":29500", f":{port}"),
        ("--preset base", f"--preset base --device cpu --val-fraction 0.3 --sample-bytes 5 {small}"),
        ("torchrun ", f"{sys.executable} -m torch.distributed.run "),
    ):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source.replace("node0", "127.0.0.1")  # the Slurm script asks for its name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "books").mkdir()
    for i in range(40):
        (tmp_path / "books" / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 20)
    return tmp_path


def run(scripts: list[str], folder: Path) -> None:
    """Shell scripts at the same time, each of which has to end well."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "nodes", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
    }  # fmt: skip
    started = [
        subprocess.Popen(["bash", "-e", "-c", script], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
        for script in scripts
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def check(folder: Path) -> None:
    """One process gives the same losses."""
    corpus = build_corpus(folder / "books", val_fraction=0.3, cache=folder / "cache" / "alone")
    Trainer(CONFIG, corpus, folder / "alone", world=ALONE).run()
    found, wanted = curve(folder / "runs" / "books"), curve(folder / "alone")
    assert found == [(step, name, pytest.approx(value, rel=1e-4)) for step, name, value in wanted]
    assert len(list((folder / "runs" / "books").glob("step-*/shard-*"))) == 2


@pytest.mark.slow
def test_two_agents(folder: Path) -> None:
    run([block("sh")] * 2, folder)
    check(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_slurm_job_of_two_nodes(folder: Path) -> None:
    """`srun` starts its command once per node, as Slurm's does; `scontrol` names the nodes."""
    programs = {"srun": '"$@" & first=$!\n"$@"\nwait $first\n', "scontrol": "echo 127.0.0.1\necho 127.0.0.1\n"}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash -e\n{text}")
        (folder / "bin" / name).chmod(0o755)
    run([block("slurm")], folder)
    check(folder)
