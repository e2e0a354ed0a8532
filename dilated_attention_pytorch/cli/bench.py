"""`bench`: the op on this machine against torch's dense attention, correctness first."""

from __future__ import annotations

import json
import statistics
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from typer import Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, print_table
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.validation import check_positive_int
from dilated_attention_pytorch.functional import dilated_attention

_CHECK_LENGTH = 512


def bench(
    length: Annotated[str, Option("--length", "-n", help="Lengths to time: 4096,16384.")] = "4096,16384",
    segments: options.Lengths = "2048,4096,8192,16384",
    rates: options.Rates = "1,2,4,8",
    heads: options.Heads = 8,
    head_dim: options.HeadDim = 64,
    offsets: options.OffsetRule = "modulo",
    causal: options.Causal = True,
    dtype: options.Dtype = "fp32",
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, Option(min=1, max=1000, help="Timed runs; the median is shown.")] = 3,
    backward: Annotated[bool, Option("--backward", help="Time forward and backward.")] = False,
    dense: Annotated[bool, Option("--dense/--no-dense", help="Time dense attention too.")] = True,
    as_json: options.AsJson = False,
) -> None:
    """Time dilated against dense attention here; no number is printed unless the result is right."""
    kind = options.check_dtype(dtype)
    options.check_device(device)
    pattern = options.make_pattern(segments, rates, heads, offsets)
    lengths = options.ints("--length", length)
    check_positive_int("length", min(lengths))
    error = _check(pattern, head_dim, causal, kind, device)
    rows = []
    for n in lengths:
        shape = (1, n, heads, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=kind, requires_grad=backward) for _ in range(3))
        ours = _time(partial(_dilated, pattern, q, k, v, causal), (q, k, v), repeats, backward)
        row = {"length": n, "dilated_s": ours, "tokens_per_s": n / ours}
        if dense:
            row["dense_s"] = _time(partial(_dense, q, k, v, causal), (q, k, v), repeats, backward)
        rows.append(row)
    if as_json:
        print(json.dumps({"check_relative_error": error, "threads": torch.get_num_threads(), "rows": rows}, indent=1))
        return
    console.print(f"check: relative error {error:.1e} against the reference at {_CHECK_LENGTH} positions")
    cells = []
    for row in rows:
        cells.append([f"{row['length']:,}", f"{row['dilated_s'] * 1e3:,.1f} ms", f"{row['tokens_per_s']:,.0f}"])
        if dense:
            cells[-1] += [f"{row['dense_s'] * 1e3:,.1f} ms", f"{row['dense_s'] / row['dilated_s']:.2f}x"]
    print_table(
        f"{'forward and backward' if backward else 'forward'}, {'causal' if causal else 'bidirectional'}, "
        f"{heads} heads of {head_dim}, {dtype} on {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads; median of {repeats}",
        ("length", "dilated", "tokens/s", *(("dense", "speed-up") if dense else ())),
        cells,
    )


def _dilated(pattern: DilatedPattern, q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: str = "auto") -> Tensor:
    return dilated_attention(
        q, k, v, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        offsets=pattern.offsets, is_causal=causal, backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _check(pattern: DilatedPattern, head_dim: int, causal: bool, dtype: torch.dtype, device: str) -> float:
    """The relative error against the reference in fp64, on segments cut down to a length that it can hold."""
    lengths, longest = pattern.segment_lengths, max(pattern.segment_lengths)
    cut = replace(pattern, segment_lengths=tuple(max(1, w * _CHECK_LENGTH // longest) for w in lengths))
    generator = torch.Generator().manual_seed(0)
    shape = (1, _CHECK_LENGTH, pattern.num_heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for _ in range(3))
    exact = _dilated(cut, q.double(), k.double(), v.double(), causal, "reference")
    error = float((_dilated(cut, q, k, v, causal).double() - exact).norm() / exact.norm())
    # Four roundings of the dtype: of the inputs' products, the weights, the sum and the output.
    allowed = 4 * torch.finfo(dtype).eps
    if not error <= allowed:
        raise ValueError(f"expected a relative error of at most {allowed:.1e} against the reference, got {error:.1e}")
    return error


def _time(call: Callable[[], Tensor], inputs: tuple[Tensor, ...], repeats: int, backward: bool) -> float:
    """Median seconds of a call, after one to warm up."""

    def step() -> None:
        out = call()
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        if out.is_cuda:
            torch.cuda.synchronize()

    return statistics.median(timeit.repeat(step, number=1, repeat=repeats + 1)[1:])
