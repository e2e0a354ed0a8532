"""Settings of ring attention, checked once and then frozen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dilated_attention_pytorch._deprecated import takes_old_call  # 0.4.0: goes with _old
from dilated_attention_pytorch.core import validation
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.shift import check_shift
from dilated_attention_pytorch.types import BackendName, Offsets, Padding

Mode = Literal["auto", "sparse", "ring", "gather"]
RemoteRows = Literal["keep", "refetch"]
Check = Literal["first", "always", "never"]


@takes_old_call("_old.calls:RING_CONFIG")  # 0.4.0: goes with _old
@dataclass(frozen=True, kw_only=True)
class RingAttentionConfig:
    """What a ring of ranks computes, and how rows travel between them.

    Args:
        segment_lengths: w_i, in positions of the whole sequence, one per branch.
        dilation_rates: r_i, one per branch.
        offsets: `"modulo"` (the paper) or `"blocked"` (the official code and every published checkpoint).
        segment_shift: c, in positions: moves the borders of all segments, as in `dilated_attention`.
        scale: factor on q . k; `D ** -0.5` by default.
        dropout: probability of dropping an attention weight, in training mode only. The mask is a function of global
            positions, so it does not depend on the world size.
        padding: `"none"`, or `"zero_keys"` for the numbers of published checkpoints: without causality or mask, and
            where w_i is a multiple of r_i or the sequence one segment, so that the official code moves no rows.
        mode: `"sparse"` fetches the rows a rank's heads keep, in one exchange, while local attention runs; `"ring"`
            fetches the same rows from one rank after another, so that those of two ranks at most are held;
            `"gather"` fetches all of K and V; `"auto"` decides from the plan's bytes.
        gradient_dtype: what gradients of remote rows travel in, whatever they were computed in. None: fp32, and fp64
            for fp64 inputs. They are summed in fp32 (fp64) always.
        remote_rows: `"keep"` saves fetched rows for the backward, `"refetch"` saves memory and fetches them again, as
            mode `"ring"` always does.
        check: when ranks compare what they are about to do. `"first"`: a rank compares at the group's first call and
            when its own call differs from its last. If only some ranks changed, those fail with RingError, possibly
            after the others have returned. `"always"`: at every exchange, so that every disagreement is named before
            data moves, and shards may change length on one rank alone. `"never"`: not at all; shards are then taken
            to be equally long.
        timeout: seconds a rank waits for the others before it raises; None for the process group's own timeout.
        backend: `"auto"`, `"sdpa"` or `"triton"`.

    Raises:
        ValueError: lists that do not fit together, an unknown option, a number out of range.
        TypeError: an argument of the wrong type.

    Example:
        >>> RingAttentionConfig(segment_lengths=[2048, 32768], dilation_rates=[1, 4]).mode
        'sparse'
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    offsets: Offsets = "modulo"
    segment_shift: int = 0
    scale: float | None = None
    dropout: float = 0.0
    padding: Padding = "none"
    mode: Mode = "sparse"
    gradient_dtype: torch.dtype | None = None
    remote_rows: RemoteRows = "keep"
    check: Check = "first"
    timeout: float | None = None
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        # The pattern checks the lists; 1 stands for the number of heads, which comes with a call.
        pattern = DilatedPattern(self.segment_lengths, self.dilation_rates, 1, self.offsets)  # type: ignore[arg-type]
        object.__setattr__(self, "segment_lengths", pattern.segment_lengths)
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)
        shift = check_shift(self.segment_shift, pattern.segment_lengths)
        object.__setattr__(self, "segment_shift", shift)
        options = {"padding": Padding, "mode": Mode, "remote_rows": RemoteRows, "check": Check, "backend": BackendName}
        for name, allowed in options.items():
            validation.check_choice(name, getattr(self, name), allowed)
        if shift and self.padding == "zero_keys":
            raise ValueError(f"expected segment_shift=0 with padding='zero_keys', got {shift}")
        if self.backend == "reference":
            raise ValueError("expected backend 'auto', 'sdpa' or 'triton', got 'reference', which takes no ring")
        object.__setattr__(self, "dropout", validation.check_probability("dropout", self.dropout))
        validation.check_scale(self.scale, 1)
        wire = self.gradient_dtype
        if wire is not None and not (isinstance(wire, torch.dtype) and wire in validation.FLOAT_DTYPES):
            raise TypeError(
                f"expected gradient_dtype to be a floating torch.dtype or None, got {validation.quoted(wire)}"
            )
        if self.timeout is None:
            return
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float):
            got = validation.quoted(self.timeout)
            raise TypeError(f"expected timeout to be a number of seconds or None, got {got}")
        if not 0 < self.timeout <= sys.float_info.max:
            got = validation.quoted(self.timeout)
            raise ValueError(f"expected timeout to be positive and finite, got {got}")
