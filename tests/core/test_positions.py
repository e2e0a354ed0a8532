"""Rotary positions: relative, independent of the length, exact far out, and xPos without overflow."""

from __future__ import annotations

import math

import pytest
import torch

from dilated_attention_pytorch.core.positions import RotaryPositions, rotate, row_positions

D = 16


def logits(rotary: RotaryPositions, q: torch.Tensor, k: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """q . k after the rotation, for every pair of positions (n, m); q and k are one row."""
    a, b = rotary.rotation(n, q.dtype), rotary.rotation(m, k.dtype)
    turned_q = rotate(q.expand(len(n), 1, D), a.q_cos, a.q_sin)[:, 0]
    turned_k = rotate(k.expand(len(m), 1, D), b.k_cos, b.k_sin)[:, 0]
    return turned_q @ turned_k.T


def test_names_stand_for_positions() -> None:
    assert RotaryPositions.named(None, D, [6, 8], 10_000.0, 512.0) is None
    assert RotaryPositions.named("rotary", D, [6, 8], 500.0, 512.0) == RotaryPositions(D, 500.0)
    # Scales start anew where segments of every branch do.
    assert RotaryPositions.named("xpos", D, [6, 8], 10_000.0, 64.0) == RotaryPositions(D, 10_000.0, 64.0, 24)


def test_rotary_is_roformer_on_halves() -> None:
    """Against complex numbers: pair j is turned by position * base ** (-2 j / D)."""
    x = torch.randn(5, 2, D, dtype=torch.float64)
    n = torch.tensor([0, 1, 7, 1000, 999_999])
    rotation = RotaryPositions(D).rotation(n, x.dtype)
    frequency = 10_000.0 ** -(torch.arange(D // 2, dtype=torch.float64) * 2 / D)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * n[:, None, None] * frequency)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotate(x, rotation.q_cos, rotation.q_sin), expected, rtol=0, atol=1e-13)


def test_xpos_is_its_paper() -> None:
    """The logit of (n, m) is Re sum_j q_j conj(k_j) (e^{i theta_j} zeta_j^{1 / scale_base})^(n - m)."""
    rotary = RotaryPositions(D, scale_base=64.0, period=256)
    q, k = torch.randn(1, 1, D, dtype=torch.float64), torch.randn(1, 1, D, dtype=torch.float64)
    n = torch.arange(256, 512)
    got = logits(rotary, q, k, n, n)
    j = torch.arange(D // 2, dtype=torch.float64)
    # torchscale: (arange(0, D, 2) + 0.4 D) / (1.4 D)
    zeta, theta = (2 * j + 0.4 * D) / (1.4 * D), 10_000.0 ** -(2 * j / D)
    distance = (n[:, None] - n[None]).to(torch.float64)[..., None]
    product = torch.complex(q[0, 0, : D // 2], q[0, 0, D // 2 :]) * torch.complex(k[0, 0, : D // 2], -k[0, 0, D // 2 :])
    expected = (product * torch.exp(1j * distance * theta) * zeta ** (distance / 64.0)).real.sum(-1)
    torch.testing.assert_close(got.tril(), expected.tril(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_logits_depend_on_the_distance_alone(scale_base: float | None) -> None:
    rotary = RotaryPositions(D, scale_base=scale_base, period=1024)
    q, k = torch.randn(1, 1, D, dtype=torch.float64), torch.randn(1, 1, D, dtype=torch.float64)
    n = torch.arange(1024)
    near, far = logits(rotary, q, k, n, n), logits(rotary, q, k, n + 1024 * 1023, n + 1024 * 1023)
    assert torch.linalg.vector_norm((near - far).tril()) <= 1e-8 * torch.linalg.vector_norm(near.tril())


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_fp32_is_as_good_at_a_million_as_at_zero(scale_base: float | None) -> None:
    rotary = RotaryPositions(D, scale_base=scale_base, period=4096)
    q, k = torch.randn(1, 1, D, dtype=torch.float64), torch.randn(1, 1, D, dtype=torch.float64)
    n = torch.arange(0, 4096, 37) + 4096 * 255
    exact, single = logits(rotary, q, k, n, n).tril(), logits(rotary, q.float(), k.float(), n, n).tril()
    # A dot product of D terms with a few roundings each.
    bound = 8 * D * torch.finfo(torch.float32).eps * q.norm() * k.norm()
    assert (single.double() - exact).abs().max() <= bound


def test_a_rotation_does_not_depend_on_how_it_was_asked_for() -> None:
    """A cached decode asks for one position at a time: the same numbers, bit for bit."""
    rotary = RotaryPositions(D, scale_base=512.0, period=96)
    whole = rotary.rotation(row_positions(300), torch.float32)
    for n in (0, 1, 95, 96, 299):
        one = rotary.rotation(row_positions(1, start=n), torch.float32)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(whole, one, strict=True))


def test_xpos_at_the_longest_period_stays_finite_through_attention() -> None:
    """The paper's largest segment, 32768, at scale_base 512: the factors of masked pairs stay below fp32's end."""
    rotary = RotaryPositions(D, scale_base=512.0, period=32768)
    n = torch.tensor([0, 16384, 32767])
    x = 8 * torch.randn(1, 1, D)
    assert logits(rotary, x, x, n, n).isfinite().all()
    rotation = rotary.rotation(n, torch.float32)
    for cos, sin in ((rotation.q_cos, rotation.q_sin), (rotation.k_cos, rotation.k_sin)):
        nats = torch.hypot(cos, sin).log().abs()
        assert 40 < nats.max() < 41, "the origin is the middle: neither end is worse than the other"


def test_xpos_refuses_what_would_overflow() -> None:
    with pytest.raises(
        ValueError, match=r"expected scale_base of at least 16020 .* every 1048576 positions .* got 512"
    ):
        RotaryPositions(D, scale_base=512.0, period=1 << 20)
    RotaryPositions(D, scale_base=16020.0, period=1 << 20)
    with pytest.raises(ValueError, match=r"expected scale_base of at least \d+ for xPos in torch.float16"):
        RotaryPositions(D, scale_base=512.0, period=32768).rotation(torch.arange(4), torch.float16)


def test_half_precision_is_rounded_once() -> None:
    x, n = torch.randn(50, 2, D).bfloat16(), torch.arange(50) + 100_000
    rotation = RotaryPositions(D).rotation(n, x.dtype)
    assert rotation.q_cos.dtype == torch.float32
    got, exact = rotate(x, rotation.q_cos, rotation.q_sin), rotate(x.float(), rotation.q_cos, rotation.q_sin)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_row_positions() -> None:
    assert row_positions(4, start=3).tolist() == [3, 4, 5, 6]
    assert row_positions(4, start=1, row_start=torch.tensor([0, 2])).tolist() == [[1, 2, 3, 4], [-1, 0, 1, 2]]
    assert row_positions(6, cu_seqlens=torch.tensor([0, 2, 2, 6])).tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 15}, "expected an even head_dim for rotary positions, got 15"),
        ({"head_dim": 16, "base": 0.0}, "expected rotary_base above 0, got 0.0"),
        ({"head_dim": 16, "scale_base": -1.0}, "expected scale_base above 0, got -1.0"),
        ({"head_dim": 16, "base": math.nan}, "expected rotary_base above 0, got nan"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryPositions(**arguments)  # type: ignore[arg-type]
