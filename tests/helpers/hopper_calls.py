"""Drawn calls of the tests on a Hopper GPU: their tensors, and what their gradients are held to."""

import torch
from torch import Tensor

from dilated_attention_pytorch.testing import relative_norm


def inputs(call: dict) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """q, k, v and the cotangents of out and lse; q, k and v are slices of one tensor where packed."""
    generator = torch.Generator("cuda").manual_seed(call["seed"])
    batch, n, heads, width = call["shape"]
    kv = call["kv_heads"]
    x = torch.randn(batch, n, heads + 2 * kv, width, device="cuda", generator=generator).to(call["dtype"])
    q, k, v = x.split([heads, kv, kv], 2)
    if not call["packed"]:
        q, k, v = (y.contiguous() for y in (q, k, v))
    out = torch.randn(call["shape"], device="cuda", generator=generator).to(call["dtype"])
    return (q, k, v), out, torch.randn(batch, heads, n, device="cuda", generator=generator)


def check(names, ours, again, exact, plain) -> None:
    """The same bits twice, and at most twice the error of torch's flash attention, merged over branches in fp32; lse,
    which that has in fp32, may be off by rounding too."""
    for name, first, second, want, base in zip(names, ours, again, exact, plain, strict=True):
        assert torch.equal(first, second), name
        assert relative_norm(first, want) <= 2 * relative_norm(base, want) + 1e-6 * (name == "lse"), name
