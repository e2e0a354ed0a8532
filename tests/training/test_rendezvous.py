"""Ranks that wait for one that does not come end at an interrupt, not at their timeout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos.process import world

from dilated_attention_pytorch.training.distributed import meet

RANK = """
import signal, sys, time
from pathlib import Path
from dilated_attention_pytorch.training.checkpoint import Checkpoints
from dilated_attention_pytorch.training.distributed import join
signal.signal(signal.SIGINT, signal.default_int_handler)
alone, ready = sys.argv[1], Path(sys.argv[2])
if alone == "join":
    ready.touch()
try:
    with join("cpu") as world:
        ready.touch()
        if not world.is_main:
            time.sleep(60)
        if alone == "new group":
            Checkpoints(ready.parent, world)
except KeyboardInterrupt:
    sys.exit(130)
"""


PATIENT = """
import time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from dilated_attention_pytorch.models.slide.work import Ranks
from dilated_attention_pytorch.training.distributed import join
with join("cpu") as world:
    _set_pg_timeout(timedelta(seconds=1))
    ranks = Ranks(world.rank, world.size, world.host)
    slow = lambda: time.sleep(2 if world.is_main else 0)
    world.first(slow)
    assert ranks.from_first(slow()) is None
    slow()
    assert ranks.gather(world.rank) == [0, 1]
    slow()
"""


def test_ranks_wait_for_what_one_does_alone() -> None:
    """Longer than their group waits for a collective: for a corpus, a folder's slides, a rank's last ones, its end."""
    ranks = [subprocess.Popen([sys.executable, "-c", PATIENT], env=os.environ | variables) for variables in world(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("alone", ["join", "new group", "leave"])
def test_interrupt_while_waiting(alone: str, tmp_path: Path) -> None:
    """Each rank of a rendezvous that the other never comes to; rank 0 in a group that rank 1 never makes or leaves."""
    apart = alone == "join"
    # Apart: two worlds, in which one rank is missing each. No store is to be found, and no worker comes to it.
    first = world(2)
    second = world(2) if apart else first
    ranks = []
    for rank, variables in enumerate((first[0], second[1])):
        command = [sys.executable, "-c", RANK, alone, str(tmp_path / f"ready{rank}")]
        ranks.append(subprocess.Popen(command, env=os.environ | variables))
    try:
        until = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1.0)  # until it waits
        for process in ranks if apart else ranks[:1]:
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_meet_hands_on() -> None:
    """Results and errors are those of the work."""

    def fail() -> None:
        raise ValueError("as it was")

    assert meet(lambda: 3) == 3
    with pytest.raises(ValueError, match="as it was"):
        meet(fail)
