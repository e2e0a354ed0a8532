"""Each test of the pool that asks for `strategy` or `pool` runs over every strategy; `device` is the CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool_checks import adds_up

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES


@pytest.fixture(params=list(STRATEGIES))
def strategy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def pool(strategy: str) -> Iterator[UnifiedMemoryPool]:
    pool = UnifiedMemoryPool(strategy)
    yield pool
    adds_up(pool)
