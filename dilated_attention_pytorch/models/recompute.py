"""GELU, LayerNorm and a projection as one step that keeps its input alone for the backward.

Autograd would keep three tensors of the feed-forward network's inner width: what goes into GELU, into the LayerNorm and
into the projection. The last two follow from the first by cheap elementwise work, so they are computed again: at 3072
wide that is 12 KiB a token and layer in bf16 that need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.core.precision import without_autocast
from dilated_attention_pytorch.functional import in_autocast_dtype


def gelu_norm_linear(h: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """`linear(norm(gelu(h)))`, keeping `h` and two numbers a row for the backward.

    Under autocast all of it runs in autocast's dtype, the statistics of the LayerNorm in fp32 as always.

    Args:
        h: `(..., inner)`.
        norm: over the last dimension, with weight and bias.
        linear: from inner to whatever width.

    Returns:
        `(..., out_features)`. First derivatives only: a second one raises.
    """
    h, norm_weight, norm_bias, weight = in_autocast_dtype(h, norm.weight, norm.bias, linear.weight)
    (bias,) = (None,) if linear.bias is None else in_autocast_dtype(linear.bias)
    out: Tensor = without_autocast(_GeluNormLinear.apply)(h, norm_weight, norm_bias, norm.eps, weight, bias)
    return out


class _GeluNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        a = nn.functional.gelu(h)
        n, mean, rstd = torch.native_layer_norm(a, norm_weight.shape, norm_weight, norm_bias, eps)
        ctx.save_for_backward(h, mean, rstd, norm_weight, norm_bias, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return nn.functional.linear(n, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        need_h, need_nw, need_nb, _, need_w, need_b = ctx.needs_input_grad
        a = nn.functional.gelu(h)
        d_weight = d_bias = dh = d_norm_weight = d_norm_bias = None
        rows = grad.flatten(0, -2)
        if need_w:
            n = nn.functional.layer_norm(a, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
            d_weight = rows.t() @ n.flatten(0, -2)
            del n  # as large as h: gone before its gradient comes
        if ctx.has_bias and need_b:
            d_bias = rows.sum(0)
        if need_h or need_nw or need_nb:
            dn = grad @ weight
            da, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
                dn, a, norm_weight.shape, mean, rstd, norm_weight, norm_bias, [need_h, need_nw, need_nb]
            )
            del dn, a
            dh = torch.ops.aten.gelu_backward(da, h) if need_h else None
        return dh, d_norm_weight, d_norm_bias, None, d_weight, d_bias
