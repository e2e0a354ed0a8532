"""Where each row stands in its sequence, and rotary positions from that: RoFormer's and xPos's.

Tables are made when they are needed and kept by nobody, so no length is a limit and nothing of them is in a checkpoint.
A rotation depends on the absolute position alone, never on how long the sequence has become: rows rotated once can be
cached, and a cached decode gives the numbers of a whole forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.precision import accumulator

Positions = Literal["rotary", "xpos"]

_GAMMA = 0.4  # xPos, arXiv 2212.10554, section 3: the slowest decay, as the official code has it
_FASTEST = math.log((1.0 + _GAMMA) / _GAMMA)  # nats that the first channel decays over `scale_base` positions
# Nats between the largest and the smallest factor of a period. A masked pair, later key with earlier query, has the
# product of both as its logit; in fp32 (and bf16) it must stay finite with room for the values themselves.
_SPAN = {torch.float16: 18.0}
_SPAN_FP32 = 82.0


class Rotation(NamedTuple):
    """Cosines and sines for the rows of queries and keys, `(N, 1, D / 2)` or `(B, N, 1, D / 2)`, fp32 (fp64).

    Attributes:
        q_cos: for queries; with xPos, times the decay.
        q_sin: likewise.
        k_cos: for keys; with xPos, divided by the decay. Otherwise the same tensor.
        k_sin: likewise.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions: RoFormer (arXiv 2104.09864, section 3.2), or xPos (arXiv 2212.10554) with a `scale_base`.

    The pairs that are rotated are the two halves of a head, channels (j, j + D / 2), as in GPT-NeoX; the paper's pairs
    (2j, 2j + 1) are the same up to an order of the channels.

    xPos multiplies a logit by `zeta_j ** ((n - m) / scale_base)`, split into a factor for the query at n and one for
    the key at m. Both grow or vanish exponentially with the position, so they need an origin near by. Ours is the
    middle of `period` positions, the least common multiple of the segment lengths: all branches start a segment where
    a period starts, so no query sees a key of another period and the origins cancel. (The official code takes the
    middle of the current length, which moves while decoding.)

    Args:
        head_dim: D, even.
        base: the wavelengths run from 2 pi to `base` * 2 pi.
        scale_base: positions over which xPos's fastest channel decays by 0.286; None for plain rotary.
        period: positions that share an origin; xPos only.

    Raises:
        ValueError: an odd head_dim, a base that is not positive, a period too long for its scale_base.
    """

    head_dim: int
    base: float = 10_000.0
    scale_base: float | None = None
    period: int = 1

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim for rotary positions, got {self.head_dim}")
        if not self.base > 0:
            raise ValueError(f"expected rotary_base above 0, got {self.base}")
        if self.scale_base is not None:
            if not self.scale_base > 0:
                raise ValueError(f"expected scale_base above 0, got {self.scale_base}")
            self._check_span(_SPAN_FP32, "fp32")

    @staticmethod
    def named(
        name: Positions | None, head_dim: int, segment_lengths: Sequence[int], base: float, scale_base: float
    ) -> RotaryPositions | None:
        """The positions that a name stands for; None for None."""
        if name is None:
            return None
        if name == "xpos":
            return RotaryPositions(head_dim, base, scale_base, math.lcm(*segment_lengths))
        return RotaryPositions(head_dim, base)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The cosines and sines of some positions.

        Args:
            positions: int64 `(N,)` or `(B, N)`; what is negative (left padding) counts as 0.
            dtype: of the rows they will turn.
        """
        if self.scale_base is not None and dtype in _SPAN:
            self._check_span(_SPAN[dtype], str(dtype))
        # fp64: an angle of a million radians has lost four digits in fp32. MPS has no fp64, so its tables come from
        # the CPU.
        device = positions.device
        at = positions.clamp_min(0).to("cpu" if device.type == "mps" else device, torch.float64)[..., None, None]
        pair = torch.arange(self.head_dim // 2, device=at.device, dtype=torch.float64) * (2.0 / self.head_dim)
        angle = at * self.base**-pair
        cos, sin = angle.cos(), angle.sin()
        table = accumulator(dtype)
        if self.scale_base is None:
            cos, sin = cos.to(device, table), sin.to(device, table)
            return Rotation(cos, sin, cos, sin)
        decay = ((pair + _GAMMA) / (1.0 + _GAMMA)).log()
        factor = (decay * (at % self.period - self.period // 2) / self.scale_base).exp()
        return Rotation(*(x.to(device, table) for x in (cos * factor, sin * factor, cos / factor, sin / factor)))

    def _check_span(self, nats: float, where: str) -> None:
        assert self.scale_base is not None
        least = math.ceil(self.period * _FASTEST / nats)
        if self.scale_base < least:
            raise ValueError(
                f"expected scale_base of at least {least} for xPos in {where} with segments that start together every "
                f"{self.period} positions (the least common multiple of segment_lengths), got {self.scale_base}: its "
                "factors would overflow; raise scale_base, shorten the segments or take positions='rotary'"
            )


def row_positions(
    num_rows: int,
    *,
    start: int = 0,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The position of every row in its own sequence (docs/spec.md, 4).

    Args:
        num_rows: rows along N (the total, when packed).
        start: position of the first row, before `row_start` is taken off.
        row_start: int `(B,)`, first real position of each left-padded row.
        cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.
        device: of the result.

    Returns:
        int64 `(N,)`, or `(B, N)` with `row_start`; negative for left padding.
    """
    index = torch.arange(start, start + num_rows, device=device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(index.device, torch.int64)
        return index - bounds[torch.searchsorted(bounds, index, right=True) - 1]
    if row_start is not None:
        return index - row_start.to(index.device, torch.int64)[:, None]
    return index


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (j, j + D / 2) of `(..., N, H, D)`; in fp32 for half precision, rounded once."""
    a, b = x.chunk(2, -1)
    turned = torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)
