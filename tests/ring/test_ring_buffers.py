"""The ring's exchange buffers come from the pool, go back to it, and nothing that lives longer is among them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ring_pool import Pool
from ring_tasks import SPREAD, TOLERANCE, RingCase

SIZE = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(SIZE, [SIZE], "ring_buffer_tasks")
    yield pool
    pool.close()


@pytest.mark.parametrize("wire", [None, torch.float32], ids=str)
@pytest.mark.parametrize("remote_rows", ["keep", "refetch"])
@pytest.mark.parametrize("mode", ["sparse", "ring", "gather"])
def test_a_second_step_takes_no_new_memory(pool: Pool, mode: str, remote_rows: str, wire: torch.dtype | None) -> None:
    options = {"remote_rows": remote_rows, "gradient_dtype": wire}
    case = RingCase(64, 2, 4, 2, 4, SPREAD, masked=True, seed=2, options=options)
    for first, second, third in pool.run("steps", case, SIZE, mode, 3):
        assert first["live"] == second["live"] == third["live"] == 0
        assert third["dropped"] == first["dropped"] and third["flying"] == 0
        assert third["misses"] == second["misses"] == first["misses"]
        assert third["borrows"] > second["borrows"] > first["borrows"]
        named = {"rows sent", "gradients sent", "gradients received", "mask sent", "mask received"}
        assert named <= set(first["purposes"])


@pytest.mark.parametrize("remote_rows", ["keep", "refetch"])
@pytest.mark.parametrize("mode", ["sparse", "ring", "gather"])
def test_nothing_reads_a_buffer_after_its_release(pool: Pool, mode: str, remote_rows: str) -> None:
    """NaN in every returned buffer changes no result, so neither autograd nor a later step reads one."""
    case = RingCase(64, 2, 4, 2, 4, SPREAD, masked=True, uses_lse=True, seed=3, options={"remote_rows": remote_rows})
    errors = case.errors(pool.run("results_after_poison", case, SIZE, mode), case.whole())
    assert max(errors.values()) <= TOLERANCE, errors


def test_a_failed_exchange_keeps_its_buffers(pool: Pool) -> None:
    """Last in the file: what stays lent stays for good."""
    case = RingCase(64, 2, 4, 2, 4, SPREAD, seed=2, options={"remote_rows": "refetch"})
    for live, flying in pool.run("after_a_failure", case, SIZE):
        assert (live, flying) == (2, 1)
