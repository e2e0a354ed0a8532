"""Recordings of a pool: what `benchmarks/record_pool.py` writes, `benchmarks/replay_pool.py` plays again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dilated_attention_pytorch import UnifiedMemoryPool

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("record_pool")


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("replay_pool")


class TestRecordings:
    def test_a_replay_is_what_was(self, strategy: str, tmp_path: Path, record: ModuleType, replay: ModuleType) -> None:
        pool = UnifiedMemoryPool(strategy)
        with record.recording(pool, tmp_path / "events.jsonl"):
            with pytest.raises(ValueError, match="no recording under way"), record.recording(pool, tmp_path / "other"):
                pass
            held = []
            for i in range(400):
                held.append(pool.borrow(100 + 997 * (i * 31 % 17), torch.uint8, "cpu", purpose=f"p{i % 3}"))
                if i % 3:
                    held.pop(i * 7 % len(held)).release()
                if i == 200:
                    pool.trim()
        want = pool.stats()
        pool.borrow(1, torch.uint8, "cpu", purpose="not recorded").release()
        events = replay.read_events(tmp_path / "events.jsonl")
        for device in ("meta", "cpu"):
            again = replay.replay(events, strategy, device).stats
            assert (again.hits, again.misses, again.requested) == (want.hits, want.misses, want.requested)
            assert (again.current, again.peak, again.live) == (want.current, want.peak, want.live)
            assert again.peak_reserved == want.peak_reserved
        assert [e.kind for e in events].count("trim") == 1

    def test_the_command_line(self, tmp_path: Path, record: ModuleType) -> None:
        pool = UnifiedMemoryPool("simple")
        with record.recording(pool, tmp_path / "events.jsonl"):
            pool.borrow(2 << 20, torch.uint8, "cpu", purpose="x").release()
        command = [sys.executable, str(BENCHMARKS / "replay_pool.py"), str(tmp_path / "events.jsonl")]
        done = subprocess.run(
            [*command, "--strategy", "simple", "bucketed"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["strategy", "simple", "bucketed"] and "2.0 MiB" in lines[1]

    @pytest.mark.parametrize("text", ['{"event":"borrow"}', "no json", '{"event":"begin","version":9}'])
    def test_another_file_is_refused(self, tmp_path: Path, text: str, replay: ModuleType) -> None:
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match=r"other, line 1: not a line of a pool's recording"):
            replay.read_events(tmp_path / "other")
