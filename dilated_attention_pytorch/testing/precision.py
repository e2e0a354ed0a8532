"""Errors as relative norms, with the floor that cancellation sets."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_norm(got: Tensor, want: Tensor, *, scale: float = 0.0) -> float:
    """The norm of the difference over the norm of `want`, in fp64.

    If `want` all but vanishes by cancellation (the gradient of a softmax over one key is exactly 0, and rounding leaves
    1e-17), rounding is measured by the terms that cancelled: a difference below 64 ulps of `scale` counts as 0.

    Args:
        got: any shape.
        want: the same shape.
        scale: norm of the terms whose sum is `want`; 0 to judge by `want` alone.

    Returns:
        The relative norm; inf if an entry is NaN, or infinite in only one of the two.
    """
    if got.shape != want.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(got.shape)} and {tuple(want.shape)}")
    ulp = torch.finfo(want.dtype).eps
    got, want = got.detach().double(), want.detach().double()
    equal = got == want  # also equal infinities
    difference = torch.where(equal, 0.0, got - want).norm().item()
    if not difference < float("inf"):
        return float("inf")
    if difference <= 64 * ulp * scale:
        return 0.0
    size = torch.where(torch.isinf(want), 0.0, want).norm().item()
    return difference / size if size > 0 else float("inf")


def gradient_scale(grad_out: Tensor, grad_lse: Tensor | None, v: Tensor, other: Tensor, scale: float) -> float:
    """The size of the terms that cancel in the gradient of q (`other` = k) or of k (`other` = q).

    A row of dQ is a weighted mean of `scale * (dO.v - rowsum(dO * out) + dlse) k`; its size is at most
    `scale * (2 |dO| max|v| + |dlse|) max|k|`.
    """
    if 0 in (grad_out.numel(), v.numel(), other.numel()):
        return 0.0
    upstream = 2 * grad_out.double().norm() * v.detach().double().norm(dim=-1).max()
    if grad_lse is not None:
        upstream = upstream + grad_lse.double().norm()
    return float(scale * upstream * other.detach().double().norm(dim=-1).max())
