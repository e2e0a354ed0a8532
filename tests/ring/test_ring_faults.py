"""Nothing is silent: ranks that disagree all raise the same error, and a rank that is missing is named in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ring_pool import Lost, Pool

from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDilatedAttention


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(3, [3], "ring_tasks")
    yield pool
    pool.close()


DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shape": (3, 8, 2, 4)}, "shape of query"),
    "heads": ({"shape": (2, 8, 4, 4)}, "shape of key and value"),
    "dtype": ({"dtype": torch.float32}, "dtype"),
    "branch": ({"segment_lengths": [32]}, "segment_lengths"),
    "causal": ({"is_causal": True}, "is_causal"),
    "requires_grad": ({"grad": False}, "requires_grad"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_disagreement_is_one_error_everywhere(pool: Pool, name: str) -> None:
    change, field = DISAGREEMENTS[name]
    errors = pool.run("disagree", 3, {1: change}, "always")
    assert len(set(errors)) == 1, errors
    assert re.search(rf"disagree on .*{field}.*: .* on ranks \[0, 2\], .* on ranks \[1\]", errors[0]), errors[0]
    # The group is as good as before.
    assert set(pool.run("disagree", 3, {}, "always")) == {"no error"}


def test_disagreement_all_see_is_found_at_first_sight(pool: Pool) -> None:
    changes = {rank: {"segment_lengths": [30 + rank % 2]} for rank in range(3)}
    errors = pool.run("disagree", 3, changes, "first")
    assert len(set(errors)) == 1 and "segment_lengths: [30] on ranks [0, 2], [31] on ranks [1]" in errors[0]


@pytest.mark.parametrize("when", ["in a task", "between tasks", "while another waits"])
def test_a_worker_that_dies_is_named_and_the_next_run_has_new_ones(when: str) -> None:
    """It was a broken pipe, in this test and in all that shared the pool."""
    pool = Pool(2, [2], "ring_tasks")
    try:
        if when == "between tasks":
            pool.run("crash", None)
            os.kill(pool.processes[1].pid, signal.SIGSEGV)
            pool.processes[1].join(10)
        with pytest.raises(Lost, match="worker 1 ended with SIGSEGV"):
            if when == "while another waits":
                pool.start("crash", 1, 60.0)
                pool.results(limit=2)
            pool.run("crash", 1 if when == "in a task" else None)
        assert pool.run("crash", None) == ["no error"] * 2
    finally:
        pool.close()


@pytest.mark.slow
def test_disagreement_one_rank_sees_is_not_silent_either() -> None:
    """The others go on with what they agreed on before; all of them end in an error within the timeout."""
    pool = Pool(3, [3], "ring_tasks")
    try:
        pool.start("disagree", 3, {1: {"segment_lengths": [32]}}, "first")
        errors = pool.results(limit=30)
    finally:
        pool.close()
    assert "ranks [0, 2] did not come within 5 s" in errors[1]
    for rank in (0, 2):
        assert "the exchange of rows failed" in errors[rank] and "bytes expected" in errors[rank], errors[rank]


@pytest.mark.slow
def test_ranks_that_compare_at_different_steps_hear_of_it() -> None:
    """The second rank's first stale plan moves nothing, so it computes that call alone; they meet a step apart."""
    pool = Pool(2, [2], "ring_tasks")
    try:
        first, second = pool.run("out_of_step")
    finally:
        pool.close()
    assert first[:-1] == ["no error"] and second[:-1] == ["no error"] * 2
    for error in (first[-1], second[-1]):
        assert "ranks disagree on step: 2 on ranks [0], 3 on ranks [1]" in error


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_missing_rank_is_named_within_the_timeout(how: str) -> None:
    """Four groups at once, since all that they do is wait."""
    places = [("compare", "always"), ("compare", "first"), ("exchange", "first"), ("backward", "first")]
    pools = [Pool(3, [3], "ring_tasks") for _ in places]
    try:
        for pool, place in zip(pools, places, strict=True):
            pool.start("fail_at", 1, how, *place)
        found = [pool.results(limit=60, dead=[1] if how == "dies" else []) for pool in pools]
    finally:
        for pool in pools:
            pool.close()
    for place, results in zip(places, found, strict=True):
        for rank in (0, 2):
            message, seconds = results[rank]
            assert seconds < 5.5, (place, seconds, message)
            assert re.search(r"(forward|backward), step \d+", message), (place, message)
            assert re.search(r"anks \[1\]", message), (place, message)
            assert re.search(r"bytes", message), (place, message)
        if how == "sleeps":
            assert "no error" not in results[1][0], place


def test_the_groups_own_timeout_is_the_default(pool: Pool) -> None:
    pool.start("left_alone", 2.0)
    results = pool.results(limit=20)
    for rank in (0, 2):
        message, seconds = results[rank]
        assert "ranks [1] did not come within 2 s" in message, message
        assert seconds < 4, seconds
    assert results[1][0] == "no error"


def test_a_forward_mode_tangent_is_not_lost(pool: Pool) -> None:
    assert all("expected no forward-mode tangent" in text for text in pool.run("tangent"))


def test_bad_input() -> None:
    pattern: dict[str, Any] = {"segment_lengths": [8], "dilation_rates": [1]}
    for wrong in (
        {"mode": "dense"},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"backend": "reference"},
        {"check": True},
        {"dropout": 1.0},
    ):
        with pytest.raises(ValueError, match="expected"):
            RingAttentionConfig(**pattern, **wrong)
    with pytest.raises(TypeError, match="gradient_dtype"):
        RingAttentionConfig(**pattern, gradient_dtype=torch.int32)
    with pytest.raises(TypeError, match="expected timeout to be a number of seconds or None, got '5'"):
        RingAttentionConfig(**pattern, timeout="5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="segment_lengths to be a sequence of ints, got int 8"):
        RingAttentionConfig(segment_lengths=8, dilation_rates=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="process_group"):
        RingDilatedAttention(RingAttentionConfig(**pattern), "world")  # type: ignore[arg-type]
    attention = RingDilatedAttention(RingAttentionConfig(**pattern))
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="key_padding_mask"):
        attention(x, x, x, key_padding_mask=torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(x, x, x, q_start=8)
    with pytest.raises(ValueError, match="same positions"):
        attention(x, x[:, :4], x[:, :4])


LEAVING = """
import os, pathlib
import torch
import torch.distributed as dist
from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDilatedAttention

def threads():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
q = torch.randn(1, 8, 2, 4, requires_grad=True)
config = RingAttentionConfig(segment_lengths=[4, 8], dilation_rates=[1, 2])
RingDilatedAttention(config, dist.group.WORLD)(q, q, q).sum().backward()
import torch._dynamo
assert "pt_gloo_runloop" in threads()
dist.destroy_process_group()
print(*threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names in /proc")
def test_a_destroyed_group_leaves_no_thread() -> None:
    """One of gloo's that drops a tensor while the interpreter shuts down would abort the process."""
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout
