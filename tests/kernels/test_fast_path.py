"""A second call of a kind skips validation and dispatch; whatever watches calls must still see it."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.kernels import fast_path, ops

PATTERN = {"segment_lengths": [8, 32], "dilation_rates": [1, 2]}


def inputs(seed: int = 0, n: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 2, 8, generator=generator) for _ in range(3)]


@pytest.fixture(autouse=True)
def known():
    """One kind is known: the calls of `inputs` without options."""
    fast_path._known.clear()
    dilated_attention(*inputs(), **PATTERN)
    assert len(fast_path._known) == 1
    yield fast_path._known
    fast_path._known.clear()


def through_the_op(call) -> bool:
    """Whether a call goes the long way."""
    seen = []
    original = ops.attention
    ops.attention = lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs)
    try:
        call()
    finally:
        ops.attention = original
    return bool(seen)


def test_a_known_kind_gives_the_same_on_other_tensors():
    first = inputs(1)
    assert not through_the_op(lambda: dilated_attention(*first, **PATTERN))
    short = dilated_attention_with_lse(*first, **PATTERN)
    fast_path._known.clear()
    long = dilated_attention_with_lse(*first, **PATTERN)
    assert torch.equal(short.out, long.out)
    assert torch.equal(short.lse, long.lse)


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": True}, {"scale": 0.5}, {"offsets": "blocked"}, {"q_start": 1, "k_start": 1}, {"seq_len": 40},
        {"padding": "zero_keys"}, {"mixing_gradient": "detached"}, {"segment_lengths": [8, 16]},
        {"dilation_rates": [1, 4]}, {"backend": "sdpa"}, {"key_padding_mask": torch.ones(1, 32, dtype=torch.bool)},
        {"dropout_p": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_argument_is_another_kind(change):
    assert through_the_op(lambda: dilated_attention(*inputs(), **(PATTERN | change)))


def test_another_layout_is_another_kind():
    q, k, v = inputs()
    assert through_the_op(lambda: dilated_attention(q.double(), k.double(), v.double(), **PATTERN))
    assert through_the_op(lambda: dilated_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, **PATTERN))
    assert through_the_op(lambda: dilated_attention(*inputs(n=33), **PATTERN))
    assert through_the_op(lambda: dilated_attention(torch.zeros(q.numel() + 1)[1:].view_as(q), k, v, **PATTERN))


def test_dropout_is_never_repeated(known):
    for _ in range(2):
        assert through_the_op(lambda: dilated_attention(*inputs(), **PATTERN, dropout_p=0.5))
    assert len(known) == 1


def test_gradients_are_recorded():
    q, k, v = inputs()
    q.requires_grad_()
    out = dilated_attention(q, k, v, **PATTERN)
    assert out.requires_grad
    with torch.no_grad():
        assert not through_the_op(lambda: dilated_attention(q, k, v, **PATTERN))


def test_modes_and_transforms_see_the_call():
    q, k, v = inputs()
    with FlopCounterMode(display=False) as counter:
        dilated_attention(q, k, v, **PATTERN)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert dilated_attention(q, k, v, **PATTERN).dtype == torch.bfloat16
    with torch.device("cpu"):
        assert through_the_op(lambda: dilated_attention(q, k, v, **PATTERN))

    def total(x):
        return dilated_attention(x, k, v, **PATTERN).square().sum()

    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    assert torch.equal(torch.func.grad(total)(q), want)  # silence would be a wrong gradient
    with forward_ad.dual_level():
        assert through_the_op(lambda: dilated_attention(q, k, v, **PATTERN))


def test_the_compiler_sees_the_call():
    q, k, v = inputs()
    compiled = torch.compile(lambda q: dilated_attention(q, k, v, **PATTERN), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), dilated_attention(q, k, v, **PATTERN))


@pytest.mark.parametrize("wrong", [[8, [32]], [8, -32], [8]], ids=str)
def test_bad_input_is_still_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="segment_lengths"):
        dilated_attention(*inputs(), segment_lengths=wrong, dilation_rates=[1, 2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"segment_lengths": [8.0, 32]}, {"dilation_rates": [True, 2]}, {"is_causal": 0}, {"q_start": False},
        {"k_start": 0.0}, {"dropout_p": False},
    ],
    ids=str,
)  # fmt: skip
def test_equal_values_of_another_type_are_still_refused(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        dilated_attention(*inputs(), **(PATTERN | wrong))


def test_kinds_are_bounded(known, monkeypatch):
    monkeypatch.setattr(fast_path, "_KEPT", 3)
    for n in range(1, 7):
        dilated_attention(*inputs(n=n), **PATTERN)
    assert len(known) == 3


def test_a_negative_bit_goes_through_the_op():
    """A kernel reads what stands in memory, whose sign is the other one; the dispatcher mends that."""
    negative = [torch._neg_view(-x) for x in inputs(3)]
    assert through_the_op(lambda: dilated_attention(*negative, **PATTERN))
    assert torch.equal(dilated_attention(*negative, **PATTERN), dilated_attention(*inputs(3), **PATTERN))
