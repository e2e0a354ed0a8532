"""What `compare.py` times: small fixed work on one core, each with its own check.

A case is made inside a process that has one revision of the package on its path. It gives back a function to time and
the relative error of its result against the reference, or whatever else says that it computes the right thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dilated_attention_pytorch import LongNetLM, dilated_attention

PATTERN: dict[str, Any] = {"segment_lengths": [256, 512, 1024], "dilation_rates": [1, 2, 4]}
# fp32 sums of at most 1,792 terms: 1e-5 is a hundred roundings.
ALLOWED = 1e-5


class Case(NamedTuple):
    """A function to time, and how far its result is from the truth."""

    run: Callable[[], object]
    error: float


def _tensors(n: int, *, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, n, 4, 64, generator=generator).requires_grad_(grad) for _ in range(3)]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def forward() -> Case:
    """The op alone, not causal."""
    q, k, v = _tensors(1500)

    def run() -> torch.Tensor:
        return dilated_attention(q, k, v, **PATTERN)

    want = dilated_attention(q.double(), k.double(), v.double(), backend="reference", **PATTERN)
    return Case(run, _error(run(), want))


def training() -> Case:
    """Forward and backward, causal."""
    leaves = _tensors(1024, grad=True)
    cotangent = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, ...]:
        out = dilated_attention(*leaves, is_causal=True, **PATTERN)
        return torch.autograd.grad(out, leaves, cotangent)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = dilated_attention(*exact, is_causal=True, backend="reference", **PATTERN)
    want = torch.autograd.grad(out, exact, cotangent.double())
    return Case(run, max(_error(a, b) for a, b in zip(run(), want, strict=True)))


def overhead() -> Case:
    """Short calls, where Python is what counts."""
    q, k, v = _tensors(48)
    pattern = {"segment_lengths": [16, 64], "dilation_rates": [1, 2]}

    def run() -> None:
        for _ in range(20):
            dilated_attention(q, k, v, **pattern)

    want = dilated_attention(q.double(), k.double(), v.double(), backend="reference", **pattern)
    return Case(run, _error(dilated_attention(q, k, v, **pattern), want))


def decoding() -> Case:
    """Tokens of a small language model with its cache; greedy, so that the uncached model can check them."""
    torch.manual_seed(0)
    model = LongNetLM(
        vocab_size=256, d_model=128, nhead=4, num_decoder_layers=2, dim_feedforward=256,
        segment_lengths=[128, 512], dilation_rates=[1, 4],
    ).eval()  # fmt: skip
    prompt = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(2))

    def run() -> torch.Tensor:
        return model.generate(prompt, 8, greedy=True)

    with torch.no_grad():
        new = run()
        want = model(torch.cat((prompt, new), 1))[:, 199:-1].argmax(-1)
    return Case(run, float((new != want).double().mean()))


CASES: dict[str, Callable[[], Case]] = {
    "forward": forward,
    "training": training,
    "overhead": overhead,
    "decoding": decoding,
}
