"""Seeds, thread counts and hypothesis profiles for every test."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import interpreter
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Without a GPU the Triton kernels run in Triton's interpreter; the switch is read when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        interpreter.hasten()

# Under xdist the workers share the cores; more threads than cores makes every one of them slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# HYPOTHESIS_MAX_EXAMPLES bounds the examples of every property that does not set its own number.
_EXAMPLES = int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "100"))
# A first call may compile or fill a cache, and a busy machine is slow: time is no property of the code under test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "max_examples": _EXAMPLES}
# `ci` draws the same examples every time, so a red run stays red; `explore` looks for new ones; `mutants` only has to
# know whether there is a red one.
settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("explore", **_COMMON)
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's defaults as it found them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Short tests last, so that no worker waits long for what another one began.
    items.sort(key=lambda item: item.path.parent.name == "core")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
