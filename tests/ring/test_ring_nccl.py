"""The same cases over NCCL, a GPU each: what the CPU cannot show is streams, and kernels that take what arrives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from ring_pool import Pool
from ring_tasks import MUTATIONS, SPREAD, TOLERANCE, RingCase, drawn

from dilated_attention_pytorch.testing import relative_norm

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
MODES = ("sparse", "ring", "gather")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    sizes = [n for n in (2, 3, 4, 8) if n <= GPUS]
    pool = Pool(sizes[-1], sizes, "ring_tasks", "nccl")
    yield pool
    pool.close()


def world_sizes(pool: Pool) -> list[int]:
    return [n for n in (2, 3, 4, 8) if n <= pool.size]


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_every_rank_has_what_one_device_has(pool: Pool, first: int) -> None:
    cases = [drawn(number) for number in range(first, first + 10)]
    jobs = list(itertools.product(cases, world_sizes(pool), MODES, (torch.float64,)))
    results = pool.run("run_cases", jobs)
    for i, (case, world_size, mode, _) in enumerate(jobs):
        errors = case.errors([results[rank][i] for rank in range(world_size)], case.whole())
        assert max(errors.values()) <= TOLERANCE, (mode, world_size, errors, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision_errs_at_most_twice_as_much_as_one_device(
    pool: Pool, dtype: torch.dtype, backend: str, is_causal: bool
) -> None:
    pattern = {"segment_lengths": [256, 1024, 4096], "dilation_rates": [1, 2, 4]}
    case = RingCase(4096, 1, 4, 2, 64, pattern, is_causal=is_causal, seed=3, options={"backend": backend})
    exact = case.whole_of_rounded(dtype)
    # One device is the first GPU alone: a ring of one rank.
    alone = pool.run("alone", case, dtype)[0]
    for world_size, mode in itertools.product(world_sizes(pool), MODES):
        results = pool.run("run_cases", [(case, world_size, mode, dtype)])
        for name in exact:
            got = torch.cat([results[r][0][name] for r in range(world_size)], 2 if name == "lse" else 1)
            ours, theirs = relative_norm(got, exact[name]), relative_norm(alone[name], exact[name])
            assert ours <= 2 * theirs, (mode, world_size, name, ours, theirs)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_routing_is_seen(pool: Pool, mutation: str) -> None:
    case = RingCase(64, 1, 4, 1, 4, SPREAD, seed=1)
    broken = pool.run("run_cases", [(case, 2, "sparse", torch.float64)], mutation)
    assert max(case.errors([broken[r][0] for r in range(2)], case.whole()).values()) > 1e-3
