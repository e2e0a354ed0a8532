"""GELU, LayerNorm and a projection that keep only their input for the backward.

Autograd would keep three tensors of the feed-forward network's inner width: the inputs of GELU, of the LayerNorm and of
the projection. The last two follow from the first by cheap elementwise work, so the backward computes them again: in
bf16 and 3072 wide that saves 12 KiB per token and layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.precision import without_autocast
from dilated_attention_pytorch.functional import in_autocast_dtype


def is_plain(norm: nn.Module) -> bool:
    """Whether nobody but its caller can tell if a LayerNorm was called: no adapter, FSDP unit or hook sees it."""
    return type(norm) is nn.LayerNorm and "forward" not in vars(norm) and not torch_private.has_hooks(norm)


def gelu_norm_linear(h: Tensor, norm: nn.LayerNorm, linear: nn.Module) -> Tensor:
    """`linear(norm(gelu(h)))`, keeping `h` `(..., inner)` and two numbers per row for the backward.

    `norm` is only read: `is_plain` says where that is enough. `linear` is called once, as a module: an `nn.Linear`, or
    an adapter in its place. Under autocast all of it runs in
    autocast's dtype, the statistics of the LayerNorm in fp32 as always. A second derivative raises.
    """
    h, weight, bias = in_autocast_dtype(h, norm.weight, norm.bias)
    if torch.compiler.is_compiling():  # the compiler chooses what to keep
        return linear(without_autocast(_gelu_norm)(h, weight, bias, norm.eps))  # type: ignore[no-any-return]
    n = without_autocast(_GeluNorm.apply)(h, weight, bias, norm.eps)
    if n.grad_fn is None or n.data_ptr() == 0:  # no gradient before the projection; a tensor without memory
        return linear(n)  # type: ignore[no-any-return]
    with _dropped(n):
        return linear(n)  # type: ignore[no-any-return]


def _gelu_norm(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(nn.functional.gelu(h), weight.shape, weight, bias, eps)


def _dropped(n: Tensor) -> saved_tensors_hooks:
    """While it is entered, autograd keeps `n` and its views as shapes, and computes `n` again when it needs them."""
    node: Any = n.grad_fn
    place, alive = n.data_ptr(), weakref.ref(n)  # the graph keeps the hooks, which must not keep n

    def pack(x: Tensor) -> Any:
        now = alive()
        # Written to since, it is no longer what would be computed again.
        same = now is not None and now._version == 0 and x.data_ptr() == place and x.dtype == now.dtype
        return (x.shape, x.stride()) if same else x

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else _GeluNorm.output(node).as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


class _GeluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        n, mean, rstd = torch.native_layer_norm(nn.functional.gelu(h), weight.shape, weight, bias, eps)
        ctx.save_for_backward(h, mean, rstd, weight, bias)
        ctx.eps, ctx.unpacked = eps, None
        return n

    @staticmethod
    def unpack(ctx: Any) -> tuple[Tensor, ...]:
        """`gelu(h)` and the saved tensors, which checkpointing gives out only once: the projection asks before us."""
        if ctx.unpacked is None:
            saved = ctx.saved_tensors
            ctx.unpacked = (nn.functional.gelu(saved[0]), *saved)
        return ctx.unpacked  # type: ignore[no-any-return]

    @staticmethod
    def output(ctx: Any) -> Tensor:
        """The forward's result, computed again."""
        a, _, _, _, weight, bias = _GeluNorm.unpack(ctx)
        return without_autocast(nn.functional.layer_norm)(a, weight.shape, weight, bias, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, h, mean, rstd, weight, bias = _GeluNorm.unpack(ctx)
        ctx.unpacked = None
        need_h, need_weight, need_bias, _ = ctx.needs_input_grad
        da, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), a, weight.shape, mean, rstd, weight, bias, [need_h, need_weight, need_bias]
        )
        del a  # as large as h: gone before another comes
        return torch.ops.aten.gelu_backward(da, h) if need_h else None, d_weight, d_bias, None
