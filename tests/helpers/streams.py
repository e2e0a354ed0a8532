"""Sources, sinks and a ledger for the tests of streaming, and a call as a whole beside a call in ranges."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import dilated_attention_pytorch as package
from dilated_attention_pytorch import dilated_attention_with_lse, streaming
from dilated_attention_pytorch.testing import gradient_scale, relative_norm

# Also where there is a GPU, which tests/streaming/test_streaming_gpu.py is for.
dilated_attention_streamed = functools.partial(package.dilated_attention_streamed, device="cpu")
streamed_forward = functools.partial(streaming.streamed_forward, device="cpu")
streamed_backward = functools.partial(streaming.streamed_backward, device="cpu")

PATTERN: dict[str, Any] = {"segment_lengths": (16, 64, 100), "dilation_rates": (1, 4, 6)}


class Source:
    """Rows of a tensor, handed out range by range and counted."""

    def __init__(self, x: Tensor, dim: int = 1, fail_from: int | None = None) -> None:
        self.x, self.dim, self.fail_from = x, dim, fail_from
        self.shape, self.dtype = x.shape, x.dtype
        self.read_rows = 0

    def read(self, start: int, stop: int) -> Tensor:
        if self.fail_from is not None and stop > self.fail_from:
            raise KeyboardInterrupt
        self.read_rows += stop - start
        return self.x.narrow(self.dim, start, stop - start).clone()


class IntoSource(Source):
    """A source that fills what it is given."""

    def read_into(self, start: int, stop: int, out: Tensor) -> None:
        self.read_rows += stop - start
        out.copy_(self.x[:, start:stop])


class Sink:
    """Collects rows; notes the order and whether all was committed."""

    def __init__(self, x: Tensor, dim: int = 1, fail_at: int | None = None) -> None:
        self.x, self.dim, self.fail_at = x, dim, fail_at
        self.next, self.committed = 0, 0

    def write(self, start: int, rows: Tensor) -> None:
        assert start == self.next and not self.committed
        if self.fail_at is not None and start >= self.fail_at:
            raise OSError("the disk is full")
        self.x.narrow(self.dim, start, rows.shape[self.dim]).copy_(rows)
        self.next += rows.shape[self.dim]

    def commit(self) -> None:
        self.committed += 1


class Ledger:
    """A pool's handles: what is lent now, and the most that was."""

    def __init__(self) -> None:
        self.lent, self.peak = 0, 0

    def borrow(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any, **_: Any) -> Any:
        ledger, tensor = self, torch.full(shape, 255, dtype=dtype, device=device)  # NaN in every float dtype

        class Handle:
            def __enter__(self) -> Handle:
                ledger.lent += tensor.nbytes
                ledger.peak = max(ledger.peak, ledger.lent)
                self.tensor = tensor
                return self

            def __exit__(self, *_: object) -> None:
                ledger.lent -= tensor.nbytes

        return Handle()


def draw_qkv(
    n: int, heads: int = 2, group: int = 1, batch: int = 1, width: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, n, heads * group, width, dtype=torch.float64)
    k, v = (torch.randn(batch, n, heads, width, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def whole(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention_with_lse(*leaves, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def streamed(q: Any, k: Any, v: Any, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    out, lse = streamed_forward(q, k, v, **options)
    dq, dk, dv = streamed_backward(grad_out, q, k, v, out, lse, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def errors(
    got: dict[str, Tensor], want: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> dict[str, float]:
    scale = q.shape[-1] ** -0.5
    scales = {"dq": gradient_scale(grad, None, v, k, scale), "dk": gradient_scale(grad, None, v, q, scale)}
    return {name: relative_norm(got[name], want[name], scale=scales.get(name, 0.0)) for name in want}
