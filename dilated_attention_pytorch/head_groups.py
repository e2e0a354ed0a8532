"""Each head takes one branch: the layout of 0.1 with a softmax that is right, and the switch that makes it the default.

Within one branch and offset o the members of a segment are dense: slot j of segment s is position
`s * w + o + j * r`. So the members are taken out as one sequence of rate 1, whose segments are as long as a segment has
members, and any backend attends to that.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch._deprecated import warn_user
from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.members import Members
from dilated_attention_pytorch.functional import dilated_attention, in_autocast_dtype
from dilated_attention_pytorch.types import QKV, Masks

ENVIRONMENT = "DILATED_ATTENTION_LEGACY"
_WARNING = (
    "is on: modules made now give each head one branch, as 0.1 did (head_groups=True), where LongNet gives each head "
    "all of them. Attention itself is computed right, which 0.1's was not: see docs/migration.md"
)
_legacy: ContextVar[bool] = ContextVar("legacy", default=False)
_warned = False  # of the environment, once per process


@contextmanager
def legacy_mode() -> Iterator[None]:
    """While it is on, modules are made with 0.1's defaults: `head_groups=True`, extra heads to the first branches.

    The environment variable `DILATED_ATTENTION_LEGACY=1` does the same for the whole process. Both warn. What 0.1
    computed wrongly stays mended, so numbers differ from 0.1's.

    Returns:
        A context manager; modules made inside keep the layout outside.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"), legacy_mode():
        ...     attention = DilatedAttention([128, 512], [1, 4])
        >>> attention.head_groups
        True
    """
    warnings.warn(f"legacy_mode {_WARNING}", FutureWarning, stacklevel=3)
    token = _legacy.set(True)
    try:
        yield
    finally:
        _legacy.reset(token)


def head_groups_by_default() -> bool:
    """Whether legacy mode is on, by the context or the environment."""
    if _legacy.get():
        return True
    value = os.environ.get(ENVIRONMENT, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"expected the environment variable {ENVIRONMENT} to be 0 or 1, got {check.quoted(value)}")
    global _warned
    if value == "1" and not _warned:
        warn_user(f"{ENVIRONMENT}=1 {_WARNING}", FutureWarning)
        _warned = True
    return value == "1"


def head_runs(num_heads: int, num_branches: int) -> list[slice]:
    """The consecutive heads of each branch; the first branches have one more where they do not divide."""
    size, extra = num_heads // num_branches, num_heads % num_branches  # Dynamo cannot trace divmod
    ends = [i * size + min(i, extra) for i in range(num_branches + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def grouped_attention(
    x: QKV,
    branches: Sequence[tuple[int, int]],
    masks: Masks,
    ranges: tuple[object, object, object],
    seed: int | Tensor | None,
    **options: Any,
) -> Tensor:
    """Dilated attention where run i of `head_runs` takes branch i, a pair (w, r), alone, with offset `i mod r_i`.

    `ranges` are q_start, k_start and seq_len. Arguments, results and errors are those of `dilated_attention`, except
    that `row_start` takes whole sequences and no mask beside it.
    """
    x = check.check_qkv(QKV(*in_autocast_dtype(*x)), packed=masks.cu_seqlens is not None)
    shape = x.q.shape
    check.check_all_or_none_fake(x.q, {"k": x.k, "v": x.v})
    check.check_seed(seed)
    if torch.compiler.is_compiling() and (masks.cu_seqlens is not None or masks.row_start is not None):
        raise NotImplementedError(
            "expected no cu_seqlens or row_start with head_groups=True while compiling or exporting: how many members "
            "a sequence has depends on their values; use key_padding_mask, or head_groups=False"
        )
    places = _checked_ranges(x, masks._replace(seed=seed if isinstance(seed, Tensor) else None), *ranges)
    packing: tuple[Tensor, Tensor] | None = None  # the position of each row in its sequence, and the sequences' bounds
    if masks.cu_seqlens is not None:
        bounds = masks.cu_seqlens.long()
        starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
        packing = torch.arange(shape[0], device=starts.device) - starts, bounds
    elif masks.row_start is not None:
        # Rows that start at different positions are sequences of different lengths, packed.
        device = masks.row_start.device
        positions = torch.arange(shape[1], device=device) - masks.row_start[:, None].long()
        packing = positions.flatten(), torch.arange(shape[0] + 1, device=device) * shape[1]
        x = QKV(*(rows.flatten(0, 1) for rows in x))

    ratio = shape[-2] // x.k.shape[-2]
    parts = []
    for i, (run, (length, rate)) in enumerate(zip(head_runs(x.k.shape[-2], len(branches)), branches, strict=True)):
        if run.start == run.stop:
            continue
        members = Members(length, rate, i % rate)
        heads = QKV(x.q[..., run.start * ratio : run.stop * ratio, :], x.k[..., run, :], x.v[..., run, :])
        if members.slots == 0:
            parts.append(torch.zeros_like(heads.q))
            continue
        # Runs of heads count from 0 each, so one seed would drop the same weights in all of them.
        options |= {"segment_lengths": [members.slots], "dilation_rates": [1], "seed": _next_seed(seed, i)}
        if packing is not None:
            parts.append(_packed(heads, members.of(packing[0]).to(heads.q.device), packing[1], options))
        else:
            parts.append(_ranged(heads, members, masks.key_padding, places, options))
    return torch.cat(parts, dim=-2).view(shape)


def _ranged(
    heads: QKV, members: Members, mask: Tensor | None, places: tuple[int, int, int], options: dict[str, Any]
) -> Tensor:
    """Attention among the members of two ranges of positions, and 0 elsewhere."""
    q_start, k_start, seq_len = places
    q_rows = members.rows(q_start, heads.q.shape[1], heads.q.device)
    k_rows = members.rows(k_start, heads.k.shape[1], heads.q.device)
    out = torch.zeros_like(heads.q)
    options = {**options, "key_padding_mask": mask if mask is None else mask[:, members.rows(0, seq_len, mask.device)]}
    options |= {"q_start": members.before(q_start), "k_start": members.before(k_start)}
    options["seq_len"] = members.before(seq_len)
    q, k, v = heads.q[:, q_rows], heads.k[:, k_rows], heads.v[:, k_rows]
    out[:, q_rows] = dilated_attention(q, k, v, **options)
    return out


def _packed(heads: QKV, are_members: Tensor, bounds: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention among the members of each packed sequence, and 0 elsewhere."""
    rows = are_members.nonzero().flatten()
    before = torch.nn.functional.pad(are_members.cumsum(0), (1, 0))
    out = torch.zeros_like(heads.q)
    out[rows] = dilated_attention(*(x[rows] for x in heads), cu_seqlens=before[bounds.to(before.device)], **options)
    return out


def _next_seed(seed: int | Tensor | None, i: int) -> int | Tensor | None:
    if seed is None or isinstance(seed, Tensor):
        return None if seed is None else seed + i
    return (check.check_int("seed", seed, -(2**63)) + i + 2**63) % 2**64 - 2**63


def _checked_ranges(x: QKV, masks: Masks, q_start: object, k_start: object, seq_len: object) -> tuple[int, int, int]:
    """Checks what a call on members would report in terms of members; returns the ranges with seq_len filled in."""
    if masks.cu_seqlens is not None:
        check.check_cu_seqlens(masks.cu_seqlens)
        check.check_packed_alone(masks, q_start, k_start, seq_len)
        check.check_masks(masks, x.q, x.q.shape[0])
        check.check_cu_seqlens_values(masks.cu_seqlens.tolist(), x.q.shape[0])
        return 0, 0, x.q.shape[0]
    found = check.check_range(x, q_start, k_start, seq_len)
    check.check_masks(masks, x.q, found[2])
    if masks.row_start is not None:
        check.check_row_start_values(masks.row_start)
        if masks.key_padding is not None or found != (0, 0, x.q.shape[1]) or x.k.shape[1] != x.q.shape[1]:
            raise ValueError(
                "expected row_start with whole sequences and without key_padding_mask where head_groups=True, got a "
                "range or a mask beside it"
            )
    return found
