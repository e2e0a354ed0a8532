"""What the kernels for Hopper compute. Imports neither Triton nor Gluon before a call could be theirs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.kernels.triton.support import interpreting

if TYPE_CHECKING:
    from dilated_attention_pytorch.kernels.triton.launch_aligned import Alignment
    from dilated_attention_pytorch.kernels.triton.work import Work

ROWS = 128  # of a tile of two warpgroups
MAX_RATES = 5  # strides that a causal kernel has views for
_TRITON = "3.6."  # the versions that were measured; Gluon has no stable API yet
_WIDTHS = (64, 128)
_DTYPES = (torch.bfloat16, torch.float16)
# (head_dim, causal) -> on a q of at most so many elements the twins are faster: there are too few tiles for one program
# per multiprocessor to have like shares of them, and describing the causal kernels' views takes the host longer than
# the device computes. Forward on an H200 beside the twins, before tiles were drawn, us: D=64 747 against 719 at N=32768
# (12 heads), 1452 against 1641 at 65536; causal 533 against 324 at 16384, 572 against 705 at 32768; D=128 (6 heads) 286
# against 347 at 16384.
_SHORT = {(64, False): 768 << 15, (64, True): 768 << 14, (128, False): 768 << 13, (128, True): 768 << 14}

# The share of a causal call's pairs that may be computed beyond its diagonals (`_wasted`). At 0.24 (w=4096,65536,
# r=1,16, D=128) these kernels had 0.63 of dense cuDNN's rate forward and 0.59 with backward, the general ones 0.77 and
# 0.67.
_WASTE = 0.2

# Columns that a tile of one branch may have: dK and dV, two accumulators, would fill all registers at 256.
_COLUMNS = {"forward": (64, 128, 256), "dq": (64, 128, 256), "dkv": (64, 128)}
# The kernels for one branch outrun their twins from so many rows of a segment on: where the width fills no tile, where
# it does, there under a causal mask in tiles of 64 columns and of 128, and in tiles of 256 columns; and from so many
# multiplications, since describing their views takes the host 0.1 ms. `benchmarks/hopper.py --branches` times both,
# branch by branch.
_FEW = {
    "forward": (1024, 2048, 2048, 4096, 1024),
    "dq": (2048, 2048, 2048, 2048, 1024),
    "dkv": (1024, 1024, 1024, 1024, 1024),
}
_LITTLE = {"forward": 1e10, "dq": 1e10, "dkv": 4e9}


def why_not(work: Work) -> list[str]:
    """The reasons why a call does not take these kernels, forward or backward; empty if it does."""
    return why_not_here(work.x.q.device) or _why_not_the_call(work) or _why_not_the_layout(work)


@lru_cache
def why_not_here(device: torch.device) -> list[str]:
    """The reasons that lie in the machine."""
    if interpreting():
        return ["Triton's interpreter has no Gluon"]
    if importlib.util.find_spec("triton") is None:
        return ["the package 'triton' is not installed"]
    version = importlib.metadata.version("triton")
    if not version.startswith(_TRITON):
        return [f"Triton is {version}, measured was {_TRITON}x"]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return ["the device is no Hopper GPU"]
    return []


def _why_not_the_call(work: Work) -> list[str]:
    """The reasons that lie in dtype, width and problem."""
    from dilated_attention_pytorch.kernels.triton.launch_aligned import alignment, misalignment

    (q, k, _), problem = work.x, work.problem
    if work.is_masked:
        return ["it has masks or packing"]
    n = q.shape[1]
    obstacle = misalignment(problem, n, k.shape[1], causal=True)
    if obstacle is not None:
        return [obstacle]
    plan = alignment(work)
    obstacles = {
        f"it has no {str(q.dtype).removeprefix('torch.')}": q.dtype not in _DTYPES,
        f"head_dim {q.shape[3]} is none of {_WIDTHS}": q.shape[3] not in _WIDTHS,
        "queries and keys differ in number": n != k.shape[1],
        "its scale is negative": problem.scale < 0,
        "its offsets are not modulo": problem.pattern.offsets != "modulo",
        "its segments do not nest": not (plan.once or len(plan.rates) == 1),
        "no branch has rate 1": plan.rates[0] != 1,
        f"a tile of {ROWS} rows straddles two segments": plan.multiple % ROWS != 0,
        f"a residue has fewer than {ROWS} rows": n < ROWS * plan.rate,
        "it is short": q.numel() <= _SHORT.get((q.shape[3], problem.is_causal), 0),
    }
    if problem.is_causal:
        obstacles |= {
            f"it is causal and has more than {MAX_RATES} branches": len(plan.rates) > MAX_RATES,
            "it is causal and its shortest segment covers the sequence": plan.lengths[0] > n,
            "it is causal and its tiles are long beside its shortest segment": plan.once and _wasted(plan, n) > _WASTE,
        }
    return [reason for reason, holds in obstacles.items() if holds]


def _wasted(plan: Alignment, n: int) -> float:
    """What a causal walk computes beyond the diagonals, as a share of the pairs.

    A tile of level l has rows at the stride r_l, or the last, in a segment of which every position is a key. Each half
    of it computes to its own end: a quarter of the tile's span is wasted, by mean. Of all rows, 1 / r_l have a level
    above l.
    """
    rates, lengths = plan.rates, [min(length, n) for length in plan.lengths]
    shares = [1 / rate for rate in rates] + [0.0]
    rings = zip(shares, rates, lengths, [0, *lengths], strict=False)
    keys = sum(share * (length - inner) / (2 * rate) for share, rate, length, inner in rings)
    strides = [*rates[1:], rates[-1]]
    return sum((a - b) * stride * ROWS / 4 for a, b, stride in zip(shares, shares[1:], strides, strict=False)) / keys


def why_not_branch(work: Work, grad: Tensor | None, branch: int, kernel: str) -> list[str]:
    """The reasons why a branch's forward, dQ, or dK and dV ("forward", "dq", "dkv") takes the general kernels; empty if
    it takes those of `branch_forward.py` and `branch_backward.py`."""
    if reasons := why_not_here(work.x.q.device):
        return reasons
    from dilated_attention_pytorch.kernels.triton.grids import dilation_rate, slots_of

    (q, k, v), problem = work.x, work.problem
    batch, n, heads, width = q.shape
    rate, slots, whole = dilation_rate(problem, branch), slots_of(problem, branch), width == work.block_d
    kind = 4 if work.block_d == 256 else whole + (whole and problem.is_causal) * (work.block_d // 64)
    few = _FEW[kernel][kind]
    pairs = batch * heads * (n // rate) * slots * (0.5 if problem.is_causal else 1.0)
    obstacles = {
        "it has masks or packing": work.is_masked or problem.padding != "none",
        "it has dropout": problem.dropout_p > 0,
        "its scale is negative": kernel == "forward" and problem.scale < 0,
        "it is a part of a sequence": problem.q_start != 0 or not n == k.shape[1] == problem.seq_len,
        f"it has no {str(q.dtype).removeprefix('torch.')}": q.dtype not in _DTYPES,
        f"head_dim {width} fills no tile": work.block_d not in _COLUMNS[kernel] or width % 8 != 0,
        "a segment has few rows": slots < few,
        "it is short": pairs * width < _LITTLE[kernel],
        # The rows' terms, up to twice as many as rows, are counted in 32 bits.
        "it is too long": 4 * batch * heads * n >= 1 << 31,
    }  # fmt: skip
    reasons = [reason for reason, holds in obstacles.items() if holds]
    named = ("q", q), ("k", k), ("v", v), *([] if grad is None else [("dO", grad)])
    return reasons or [reason for name, x in named if (reason := misplaced(name, x, rate))]


def _why_not_the_layout(work: Work) -> list[str]:
    """What the copy engine asks of addresses and strides, and 32-bit arithmetic of offsets within a row of a view."""
    from dilated_attention_pytorch.kernels.triton.launch_aligned import alignment

    rate = alignment(work).rate
    found = (misplaced(name, x, rate) for name, x in zip("qkv", work.x, strict=True))
    return [reason for reason in found if reason is not None]


def misplaced(name: str, x: Tensor, rate: int) -> str | None:
    """Why the copy engine cannot read a tensor's rows at strides up to a rate; None if it can."""
    from dilated_attention_pytorch.kernels.triton.hopper.views import columns_of

    strides, size = x.stride()[:3], x.element_size()
    if x.data_ptr() % 16 or any(s * size % 16 for s in strides) or strides[1] <= 0:
        return f"{name} is not aligned to 16 bytes"
    if max(columns_of(x, rate), rate * strides[1] * size >> 9) >= 1 << 31:
        return f"{name}'s rows lie too far apart"
    return None
