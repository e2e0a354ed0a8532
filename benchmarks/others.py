"""What the authors' code computes beside the definition: lengths that do not divide, and gradients; on a CPU.

    python benchmarks/others.py --torchscale PATH     # a checkout of microsoft/torchscale; it needs einops

Prints relative differences of torchscale's `DilatedAttention` from the fp64 reference, which `docs/compare.md` quotes.
Its attention calls go to torch's flash attention, since flash-attn has none for a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.testing import relative_norm

LENGTHS, RATES, HEADS, WIDTH = (64, 256, 1024), (1, 2, 4), 4, 16


def flash_attention_4() -> Callable[..., Tensor] | None:
    """FlashAttention-4 of q, k, v `(B, N, H, D)` and `is_causal`, where the package `flash-attn-4` is installed."""
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError:
        return None

    def call(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        found = flash_attn_func(q, k, v, causal=is_causal)
        return found[0] if isinstance(found, tuple) else found

    return call


def torchscale(path: Path) -> Callable[[Any], Callable[..., Tensor]]:
    """The authors' dilated attention from a checkout of torchscale, over torch's flash attention.

    What it gives takes a line with the attributes of `patterns.Line`, and gives a function of q, k and v.
    """
    sys.path.insert(0, str(path))
    try:
        from torchscale.component import dilated_attention as theirs
        from torchscale.component import multihead_attention as base
    except ImportError as error:
        sys.exit(f"expected a checkout of torchscale at {path}, and einops installed, got: {error}")

    def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: None, scale: None, causal: bool) -> Any:
        """flash-attn's function, (batch, length, heads, width) in and out."""
        aten = torch.ops.aten
        kernel = (
            aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
        )
        out, lse, *_ = kernel(*(x.transpose(1, 2) for x in (q, k, v)), dropout, causal)
        return out.transpose(1, 2), lse

    base.flash_attn_func = flash

    def prepare(line: Any) -> Callable[..., Tensor]:
        settings = SimpleNamespace(
            segment_length=list(line.segment_lengths), dilated_ratio=list(line.dilation_rates), flash_attention=True,
            multiway=False, xpos_rel_pos=False, seq_parallel=False, layernorm_eps=1e-5,
        )  # fmt: skip
        module = theirs.DilatedAttention(settings, line.num_heads * line.head_dim, line.num_heads, self_attention=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(module, name, torch.nn.Identity())

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, _ = module(*(x.flatten(2) for x in (q, k, v)), is_causal=line.is_causal)
            return out.unflatten(2, (line.num_heads, line.head_dim))

        return call

    return prepare


def compare(prepare: Callable[[Any], Callable[..., Tensor]], seq_len: int, causal: bool) -> dict[str, float]:
    """Relative differences from the reference: the output, and the gradients of q and k."""
    generator = torch.Generator().manual_seed(seq_len)
    q, k, v, cotangent = (torch.randn(1, seq_len, HEADS, WIDTH, generator=generator) for _ in range(4))
    line = SimpleNamespace(
        segment_lengths=LENGTHS, dilation_rates=RATES, num_heads=HEADS, head_dim=WIDTH, is_causal=causal
    )
    theirs = [x.requires_grad_() for x in (q, k, v)]
    out = prepare(line)(*theirs)
    grads = torch.autograd.grad(out, theirs, cotangent)
    exact = [x.detach().double().requires_grad_() for x in theirs]
    options: dict[str, Any] = {"segment_lengths": LENGTHS, "dilation_rates": RATES, "offsets": "blocked"}
    truth = dilated_attention(*exact, is_causal=causal, backend="reference", **options)
    wanted = torch.autograd.grad(truth, exact, cotangent.double())
    names = ("q's gradient", "k's gradient")
    found = {name: relative_norm(got, want) for name, got, want in zip(names, grads, wanted, strict=False)}
    return {"output": relative_norm(out, truth), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchscale", type=Path, required=True, help="a checkout")
    arguments = parser.parse_args()
    prepare = torchscale(arguments.torchscale)
    print(f"w={LENGTHS}, r={RATES}, {HEADS} heads of {WIDTH}, fp32; relative to fp64")
    for seq_len in (1024, 1069):
        for causal in (False, True):
            found = ", ".join(f"{name} {value:.1e}" for name, value in compare(prepare, seq_len, causal).items())
            print(f"N={seq_len}, {'causal' if causal else 'bidirectional'}: {found}")


if __name__ == "__main__":
    main()
