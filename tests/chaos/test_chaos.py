"""A small part of `make chaos`: a few programs killed, a few files damaged, one disk full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.damages import damages
from chaos.process import Ended
from chaos.results import Lost
from chaos.trials import check_named

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and reads /proc")


@pytest.mark.slow
def test_nothing_is_lost_and_everything_is_named() -> None:
    # A process of its own: what it forks may not have computed before.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    small = ["--seed=0", "--kills=4", "--launchers=0", "--damages=8", "--disks=1"]
    done = subprocess.run([sys.executable, "-m", "chaos", *small], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 trials" in done.stdout and "0 lost or not named" in done.stdout


def test_there_are_thirty_kinds_of_damage() -> None:
    kinds = [(kind.program, kind.file, kind.name) for kind in damages()]
    assert len(set(kinds)) == len(kinds) >= 30


@pytest.mark.parametrize(
    ("code", "err"),
    [(0, ""), (1, "error: expected state.pt\n"), (2, "Traceback\nerror: state.pt\n"), (2, "error: something\n")],
    ids=["well", "another code", "a traceback", "no name"],
)
def test_an_unnamed_end_is_seen(code: int, err: str) -> None:
    check_named(Ended(2, b"", "warning: far\nerror: expected state.pt to be one\n"), "state.pt")
    with pytest.raises(Lost):
        check_named(Ended(code, b"", err), "state.pt")
