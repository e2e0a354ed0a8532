"""`make bench-compare`: a planted slowdown fails, no change passes; the votes that decide are tested without noise."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# Every call of the op takes a fifth more processor time than it would.
SLOWDOWN = """

import time as _time
_as_it_was = dilated_attention_with_lse


def dilated_attention_with_lse(*args, **kwargs):
    start = _time.process_time_ns()
    out = _as_it_was(*args, **kwargs)
    end = _time.process_time_ns()
    while _time.process_time_ns() < end + (end - start) * 0.2:
        pass
    return out
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with the package and its benchmarks as they are now, all committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("repository")
    for name in ("dilated_attention_pytorch", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "compare", "HEAD", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.timing
def test_no_change_passes_three_times_and_a_planted_slowdown_fails(repository: Path) -> None:
    for _ in range(3):
        done = run(repository, "--case", "forward")
        assert done.returncode == 0, done.stdout + done.stderr
    functional = repository / "dilated_attention_pytorch" / "functional.py"
    before = functional.read_text(encoding="utf-8")
    functional.write_text(before + SLOWDOWN, encoding="utf-8")
    try:
        done = run(repository, "--case", "forward")
    finally:
        functional.write_text(before, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SLOWER" in done.stdout
    left = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(left.stdout.splitlines()) == 1, "the worktree of BASE must be gone"


def test_a_wrong_result_is_never_timed(repository: Path) -> None:
    functional = repository / "dilated_attention_pytorch" / "functional.py"
    before = functional.read_text(encoding="utf-8")
    planted = "\n_right = dilated_attention\n\n\ndef dilated_attention(*a, **k):\n    return _right(*a, **k) * 1.001\n"
    functional.write_text(before + planted, encoding="utf-8")
    # The reference would be wrong alike; it is told apart by its backend.
    functional.write_text(
        functional.read_text(encoding="utf-8").replace("* 1.001", "* (1 if k.get('backend') else 1.001)"),
        encoding="utf-8",
    )
    try:
        done = run(repository, "--case", "forward")
    finally:
        functional.write_text(before, encoding="utf-8")
    assert done.returncode == 2
    assert "this tree: forward is off by 1.0e-03" in done.stderr
    assert "ratio" not in done.stdout


def test_an_unknown_revision_is_refused(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "compare", "no-such-revision"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "expected BASE to be a revision" in done.stderr


class TestVerdict:
    def test_four_votes_ahead_decide(self, compare: ModuleType) -> None:
        assert compare.verdict([1.2] * 3, 1.05, False) is None
        assert compare.verdict([1.2] * 4, 1.05, False) is True
        assert compare.verdict([1.0] * 4, 1.05, False) is False
        assert compare.verdict([1.0, 1.2, 1.0, 1.0, 1.0], 1.05, False) is None
        assert compare.verdict([1.0, 1.2, 1.0, 1.0, 1.0, 1.0], 1.05, False) is False

    def test_without_a_decision_the_median_decides(self, compare: ModuleType) -> None:
        assert compare.verdict([1.0, 1.2] * 3, 1.05, False) is None
        assert compare.verdict([1.0, 1.2, 1.2], 1.05, True) is True
        assert compare.verdict([1.0, 1.2, 1.0], 1.05, True) is False

    @pytest.mark.parametrize(("true_ratio", "slower"), [(1.0, False), (1.2, True)])
    def test_error_rate(self, compare: ModuleType, true_ratio: float, slower: bool) -> None:
        """With blocks that scatter by 3 percent, which a loaded machine does, not one of 2,000 runs errs."""
        draw = random.Random(0)
        for _ in range(2000):
            ratios: list[float] = []
            decided = None
            while decided is None:
                ratios.append(draw.gauss(true_ratio, 0.03))
                decided = compare.verdict(ratios, 1.05, len(ratios) == 16)
            assert decided is slower, ratios
