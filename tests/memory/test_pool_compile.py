"""`torch.compile` over what lends memory or streams: that runs as it stands, and the rest is compiled around it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import UnifiedMemoryPool, dilated_attention, dilated_attention_streamed
from dilated_attention_pytorch.streaming import streamed_backward, streamed_forward

PATTERN: dict[str, Any] = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
STREAMED: dict[str, Any] = {**PATTERN, "device": "cpu", "range_length": 32}

# Dynamo asks for it of every tensor that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> list[Any]:
    return []


@pytest.fixture
def compiled(graphs: list[Any]) -> Callable[[Any], Any]:
    """`torch.compile` that keeps the graphs it makes."""

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return lambda function: torch.compile(function, backend=backend)


def qkv() -> list[Tensor]:
    return [torch.randn(1, 100, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def test_streaming(compiled: Any, graphs: list[Any]) -> None:
    inputs = qkv()

    def call(attend: Any, options: Any) -> Any:
        return lambda q, k, v: attend(2 * q, k, v, **options).square().sum()

    want = call(dilated_attention, PATTERN)(*inputs)
    function = compiled(call(dilated_attention_streamed, STREAMED))
    for _ in range(2):
        got = function(*inputs)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 2  # what comes before the call and what comes after it
    torch.testing.assert_close(
        compiled(dilated_attention_streamed)(*inputs, **STREAMED), dilated_attention(*inputs, **PATTERN)
    )


def test_the_streamed_pair(compiled: Any) -> None:
    q, k, v = (x.detach() for x in qkv())
    grad = torch.randn_like(q)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = streamed_forward(q + 1, k, v, **STREAMED)
        return out, streamed_backward(grad, q + 1, k, v, out, lse, **STREAMED)

    torch.testing.assert_close(compiled(both)(q, k, v), both(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["simple", "adaptive"])
@pytest.mark.parametrize("how", ["with", "handle", "tensor", "dropped", "own pool"])
def test_pool(compiled: Any, strategy: str, how: str) -> None:
    pool = UnifiedMemoryPool(strategy)

    def function(x: Tensor) -> Tensor:
        if how == "with":
            with pool.borrow(x.shape, x.dtype, "cpu", "x") as handle:
                return handle.tensor.copy_(x + 1) * 2
        lender = UnifiedMemoryPool(strategy) if how == "own pool" else pool
        handle = lender.borrow(x.shape, x.dtype, "cpu", "x")
        y = handle.tensor.copy_(x + 1) * 2
        if how == "tensor":
            lender.release(handle.tensor)
        elif how != "dropped":
            handle.release()
        return y

    call = compiled(function)
    for n in range(1, 20):  # more sizes than Dynamo would compile a frame for
        assert torch.equal(call(torch.arange(1.0, n)), 2 * torch.arange(2.0, n + 1))
    stats = pool.stats()
    assert stats.live == stats.current == 0 and stats.hits + stats.misses == (0 if how == "own pool" else 19)


def test_importing_the_package_does_not_import_dynamo() -> None:
    code = "import dilated_attention_pytorch.streaming, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
