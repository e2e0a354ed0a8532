"""What each backend computes, found out by trying: the rows of the table in docs/backends.md.

A cell says yes where forward and backward agree with the reference in fp64, and no where the call is refused with an
error that says so. Anything else is a bug, and raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.testing import relative_norm

BACKENDS = ("reference", "sdpa", "triton")
N, D = 43, 16


class Feature(NamedTuple):
    """A row: what a user would call it, and what changes from the plain call."""

    name: str
    dtype: torch.dtype | None = None  # fp32, and fp64 for the reference, by default
    head_dim: int = D
    kv_heads: int = 4
    packed: bool = False
    use_lse: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    run: Callable[..., Any] | None = None


def _real() -> Tensor:
    real = torch.ones(2, N, dtype=torch.bool)
    real[0, 30:], real[1, ::5] = False, False
    return real


def _twice(call: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Second derivatives."""
    first = torch.autograd.grad(call(*leaves), leaves, cotangent, create_graph=True)
    return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))  # type: ignore[arg-type]


def _forward_mode(call: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Output and its derivative along one direction of all three inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # its own
        return list(torch.func.jvp(call, tuple(x.detach() for x in leaves), (cotangent,) * 3))


def _compiled(call: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Traced as a whole; the compiler's own code generation is no concern of the op."""
    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


FEATURES = (
    Feature("fp64", dtype=torch.float64),
    Feature("fp32", dtype=torch.float32),
    Feature("bf16", dtype=torch.bfloat16),
    Feature("fp16", dtype=torch.float16),
    Feature("head width 48", head_dim=48),
    Feature("head width 320", head_dim=320),
    Feature("causal", options={"is_causal": True}),
    Feature("grouped key/value heads", kv_heads=2),
    Feature('`offsets="blocked"`', options={"offsets": "blocked"}),
    Feature("`key_padding_mask`", options={"key_padding_mask": _real()}),
    Feature("left padding (`row_start`)", options={"row_start": torch.tensor([0, 17]), "is_causal": True}),
    Feature("packed sequences (`cu_seqlens`)", packed=True, options={"cu_seqlens": torch.tensor([0, 5, 5, 30, N])}),
    Feature("partial ranges (`q_start`, `k_start`)", options={"q_start": 11, "seq_len": 80, "is_causal": True}),
    Feature("dropout", options={"dropout_p": 0.3, "seed": 5}),
    Feature("gradient through `lse`", use_lse=True),
    Feature('`mixing_gradient="detached"`', options={"mixing_gradient": "detached"}),
    Feature('`padding="zero_keys"`', options={"padding": "zero_keys"}),
    Feature("`torch.compile(fullgraph=True)`", run=_compiled),
    Feature("second derivatives", run=_twice),
    Feature("forward-mode derivatives (`torch.func.jvp`)", run=_forward_mode),
)


def compute(feature: Feature, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, or whatever the feature asks for."""
    generator = torch.Generator().manual_seed(3)
    lead = (N,) if feature.packed else (2, N)
    heads = (4, feature.kv_heads, feature.kv_heads, 4)
    drawn = [torch.randn(*lead, h, feature.head_dim, generator=generator) for h in heads]
    # Rounded once, so that every precision starts from the same numbers.
    *leaves, cotangent = (x.to(feature.dtype or torch.float32).to(dtype) for x in drawn)
    leaves = [x.requires_grad_() for x in leaves]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = dilated_attention_with_lse(
            q, k, v, segment_lengths=[16, 37], dilation_rates=[1, 3], backend=backend, **feature.options
        )  # type: ignore[arg-type]
        return out + lse.transpose(-1, -2)[..., None].to(out.dtype) if feature.use_lse else out

    if feature.run is not None:
        return list(feature.run(call, leaves, cotangent))
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def cell(feature: Feature, backend: str) -> str:
    """ "yes" or "no", by trying.

    Raises:
        AssertionError: a result that is not the reference's.
    """
    dtype = feature.dtype or torch.float32
    try:
        got = compute(feature, backend, dtype)
    except NotImplementedError:
        return "no"
    except RuntimeError as error:
        # What autograd says where an op has one derivative and no more.
        if feature.run is _twice and "no autograd formula was registered" in str(error):
            return "no"
        raise
    exact, same = compute(feature, "reference", torch.float64), compute(feature, "reference", dtype)
    for a, b, want in zip(got, same, exact, strict=True):
        # The reference's own loss in that precision; ten times it, and no less than ten roundings.
        allowed = 10 * max(relative_norm(b, want), torch.finfo(dtype).eps)
        error_ = relative_norm(a, want)
        assert error_ <= allowed, f"{backend}, {feature.name}: off by {error_:.1e}, allowed {allowed:.1e}"
    return "yes"


def table() -> str:
    """The whole table; tries every cell, so Triton's interpreter must be on where there is no GPU."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in BACKENDS) + " |", "|---|" + "---|" * len(BACKENDS)]
    lines += [f"| {f.name} | " + " | ".join(cell(f, name) for name in BACKENDS) + " |" for f in FEATURES]
    return "\n".join(lines)
