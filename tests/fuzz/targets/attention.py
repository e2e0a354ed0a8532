"""The op's public functions, against the reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import MODES, Case, cases, shifted
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse, merge_attention
from dilated_attention_pytorch.core import torch_private, validation
from dilated_attention_pytorch.testing import gradient_scale, relative_norm
from dilated_attention_pytorch.types import AttentionOutput
from fuzz import values
from fuzz.judge import Call
from fuzz.table import target
from fuzz.values import FLOATS, anything, dense, numbers, pick, placed, sequences, spoiled, strided

_TENSORS = ("q", "k", "v")
_MASKS = ("key_padding_mask", "row_start", "cu_seqlens", "seed")
_SEQUENCES = ("segment_lengths", "dilation_rates")
_CHOICES = ("offsets", "mixing_gradient", "padding", "backend")
_NUMBERS = ("scale", "dropout_p", "q_start", "k_start", "seq_len", "segment_shift", "is_causal")
OPTIONS = (*_SEQUENCES, *_CHOICES, *_NUMBERS, *_MASKS)

# The error that rounding may leave, as a multiple of the one that the reference makes in the same dtype.
_TIMES = 8.0


def spoil_option(draw: st.DrawFn, name: str, value: Any) -> Any:
    """Something in an option's place."""
    if isinstance(value, Tensor) and draw(st.booleans()):
        return draw(st.one_of(strided(value), spoiled(value)))
    if name in _SEQUENCES:
        return draw(sequences())
    return draw(st.one_of(numbers, anything) if name in _NUMBERS else anything)


def values_can_be_read(*given: Any) -> bool:
    """False where a tensor is meta or fake."""
    return not any(isinstance(x, Tensor) and (x.is_meta or torch_private.is_fake(x)) for x in given)


def values_are_right(total: int, options: dict[str, Any]) -> bool:
    """False for bounds of sequences that the host cannot read, and that are none: there the op promises no values."""
    bounds = options.get("cu_seqlens")
    if not isinstance(bounds, Tensor) or not bounds.is_cuda:
        return True
    try:
        validation.check_cu_seqlens_values(bounds.tolist(), total)
    except ValueError:
        return False
    return True


def in_fp64(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> AttentionOutput:
    """The reference's answer to a call that was taken."""
    torch.manual_seed(0)
    return dilated_attention_with_lse(*tensors, **{**options, "backend": "reference"})


def compare(got: AttentionOutput, tensors: tuple[Tensor, ...], options: dict[str, Any], wants_grad: bool) -> None:
    """Out, lse and gradients against fp64, within what the reference's own rounding allows."""
    first = tensors[0]
    assert got.out.shape == first.shape and got.out.dtype == first.dtype, (got.out.shape, got.out.dtype)
    if not values_can_be_read(*tensors, *options.values()) or not values_are_right(first.shape[0], options):
        return
    plain = tuple(dense(x, x.dtype) for x in tensors)
    exact = tuple(dense(x) for x in tensors)
    cotangent = torch.linspace(-1, 2, max(1, got.out.numel()), dtype=torch.float64)[: got.out.numel()]
    cotangent = cotangent.view(got.out.shape).to(got.out.device)

    def results(leaves: tuple[Tensor, ...], found: AttentionOutput | None = None) -> dict[str, Tensor]:
        if found is None:
            leaves = tuple(x.requires_grad_(wants_grad) for x in leaves)
            found = in_fp64(leaves, options)
        named = {"out": found.out.detach(), "lse": found.lse.detach()}
        if wants_grad:
            grads = torch.autograd.grad(found.out, leaves, cotangent.to(found.out.dtype))
            named |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return named

    ours, want = results(tensors, got), results(exact)
    rounded = results(plain) if first.dtype != torch.float64 else want
    scale = options.get("scale")
    scale = abs(first.shape[-1] ** -0.5 if scale is None else scale)
    scales = {
        "dq": gradient_scale(cotangent, None, exact[2], exact[1], scale),
        "dk": gradient_scale(cotangent, None, exact[2], exact[0], scale),
    }
    # A logit's rounding is a factor exp(eps * |logit|) on a weight: beyond 1 the weights themselves are noise.
    largest = [float(x.detach().abs().amax()) if x.numel() else 0.0 for x in exact[:2]]
    logits = scale * math.prod(largest) * first.shape[-1]
    eps = torch.finfo(torch.float64 if first.dtype == torch.float64 else torch.float32).eps
    if logits * eps > 1e-3:
        assert all(bool(torch.isfinite(x).all()) for name, x in ours.items() if name != "lse"), ours
        return
    for name, value in want.items():
        size = float(value.masked_fill(torch.isinf(value), 0.0).norm())
        # Terms of a gradient that cancel leave what the rounding of each (and of the saved out) left.
        terms = size + scales.get(name, 0.0) / (1.0 - options.get("dropout_p", 0.0))
        if name == "lse":  # exp and log are good to a few ulps of 1, however small their sum
            terms += value.numel() ** 0.5
        allowed = _TIMES * (
            _distance(rounded[name], value) + eps * (1 + logits) * terms + torch.finfo(ours[name].dtype).eps * terms
        )
        error = _distance(ours[name], value)
        assert error <= allowed, f"{name} is off by {error:.2e}, {allowed:.2e} allowed"


def _distance(got: Tensor, want: Tensor) -> float:
    """The norm of the difference; inf where only one is finite."""
    got = got.double()
    return float(torch.where(got == want, 0.0, got - want).norm().nan_to_num(torch.inf))


def attention_call(draw: st.DrawFn, function: Callable[..., Any]) -> Call:
    """A call of `dilated_attention` or of its sibling."""
    mode = draw(st.sampled_from(MODES))
    case: Case = draw(shifted(mode) if mode != "zero_keys" and draw(st.booleans()) else cases(mode))
    if values.PLACE.type != "cpu":  # kernels are compiled for each width, so for a few
        width = draw(st.sampled_from([5, 16, 40, 64]))
        case.q_shape, case.k_shape = (*case.q_shape[:-1], width), (*case.k_shape[:-1], width)
    dtype = draw(st.sampled_from(FLOATS))
    tensors: list[Any] = [draw(strided(placed(x.clamp(-3, 3)))) for x in case.tensors(dtype)]
    options: dict[str, Any] = {name: placed(value) for name, value in case.options.items()}
    if draw(st.booleans()):
        options["backend"] = draw(st.sampled_from(["sdpa", "reference", "auto"]))
    together = draw(st.sampled_from([None] * 7 + ["meta", "fake"]))
    names = pick(draw, _TENSORS + OPTIONS, 3)
    for name in names:
        if name in _TENSORS:
            i = _TENSORS.index(name)
            tensors[i] = draw(st.one_of(spoiled(tensors[i]), strided(tensors[i])))
        else:
            options[name] = spoil_option(draw, name, options.get(name))
    if not names and together is not None:
        tensors = [values.WRONG_TENSORS[together](x) for x in tensors]
    wants_grad = draw(st.booleans())
    if wants_grad:
        tensors = [x.detach().requires_grad_() if type(x) is Tensor and x.dtype in FLOATS and x.layout == torch.strided
                   and not x.is_inference() else x for x in tensors]  # fmt: skip
        wants_grad = all(isinstance(x, Tensor) and x.requires_grad for x in tensors)

    def check(result: Any) -> None:
        out = result if isinstance(result, Tensor) else result.out
        lse = out.new_zeros(()) if isinstance(result, Tensor) else result.lse
        total = out.shape[0] if out.dim() else 0
        readable = values_can_be_read(*tensors, *options.values()) and values_are_right(total, options)
        if isinstance(result, Tensor) and readable:
            lse = in_fp64(tuple(dense(x) for x in tensors), options).lse
        compare(AttentionOutput(out, lse), tuple(tensors), options, wants_grad)
        if not wants_grad and readable and not (options.get("dropout_p") and options.get("seed") is None):
            again = function(*tensors, **options)  # which skips what the first call has checked
            assert torch.equal(out, again if isinstance(again, Tensor) else again.out), "a second call differs"

    right = not names and together is None
    return Call(function, tuple(tensors), options, (*_TENSORS, *OPTIONS), check, right)


@target("dilated_attention", 90)
def _dilated_attention(draw: st.DrawFn) -> Call:
    return attention_call(draw, dilated_attention)


@target("dilated_attention_with_lse", 60)
def _dilated_attention_with_lse(draw: st.DrawFn) -> Call:
    return attention_call(draw, dilated_attention_with_lse)


@target("merge_attention", 30)
def _merge_attention(draw: st.DrawFn) -> Call:
    n, heads, width = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lead = (draw(st.integers(0, 2)),) if draw(st.booleans()) else ()
    dtype = draw(st.sampled_from(FLOATS))
    partials: list[Any] = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        out = torch.randn(*lead, n, heads, width, generator=generator).to(dtype)
        lse = torch.randn(*lead, heads, n, generator=generator)
        lse = lse.double() if dtype == torch.float64 else lse
        lse = torch.where(torch.rand(lse.shape, generator=generator) < 0.2, -torch.inf, lse)
        out = out.masked_fill(torch.isneginf(lse).transpose(-1, -2)[..., None], 0.0)
        partials.append([draw(strided(placed(out))), draw(strided(placed(lse)))])
    spoils = draw(st.sampled_from(["", "", "tensor", "tensor", "partial"]))
    side, part = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    if spoils == "tensor":
        partials[side][part] = draw(spoiled(partials[side][part]))
    partials = [AttentionOutput(*x) if draw(st.booleans()) else tuple(x) for x in partials]
    if spoils == "partial":
        partials[side] = draw(anything)

    def check(result: AttentionOutput) -> None:
        (out_a, lse_a), (out_b, lse_b) = partials
        tensors = (out_a, lse_a, out_b, lse_b)
        assert result.out.shape == out_a.shape and result.lse.shape == lse_a.shape
        if not values_can_be_read(*tensors):
            return
        out_a, lse_a, out_b, lse_b = (dense(x) for x in tensors)
        a, b = (x.transpose(-1, -2)[..., None].exp() for x in (lse_a, lse_b))
        total = torch.where(a + b == 0, 1.0, a + b)
        eps = 8 * max(torch.finfo(x.dtype).eps for x in tensors)
        assert relative_norm(result.out, (a * out_a + b * out_b) / total) <= eps
        assert relative_norm(result.lse, torch.logaddexp(lse_a, lse_b)) <= eps

    return Call(merge_attention, tuple(partials), {}, ("a", "b"), check, not spoils)
