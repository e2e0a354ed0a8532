"""Tokens per second of cached generation at a short and a long context, in one run (issue 2, "must show" 5).

Both contexts are filled by a real prefill and stand at the same place within their segments, where a token sees as many
keys in one as in the other. Their tokens are timed in short turns, so that a busy spell of the machine falls on both:
the rates are medians over the turns, the ratio is the median over pairs of neighbouring turns. Nothing is printed if
cached and uncached logits differ on a small case.

    python benchmarks/generation.py [--threads 1] [--rounds 96] [--out benchmarks/results]
    python benchmarks/generation.py --device cuda [--all] [--only TEXT] [--seconds 230] [--out benchmarks/results]

On a GPU it is another benchmark, of `generation_gpu.py`: contexts of 8k to 1M, batches of 1 to 64, prompts, and a dense
model beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import common
import generation_gpu
import torch
from torch import Tensor

from dilated_attention_pytorch.models import LongNetLM

SHORT, LONG = 8 * 1024, 64 * 1024
SEGMENT_LENGTHS, DILATION_RATES = (1024, 4096), (1, 4)
TOKENS_A_TURN = 4
ALLOWED = 0.10


def check(device: str) -> float:
    """The largest difference between cached and uncached logits over several segments, in fp64."""
    model = LongNetLM(
        vocab_size=31,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=64,
        segment_lengths=(8, 20, 192),
        dilation_rates=(1, 2, 4),
        device=device,
        dtype=torch.float64,
    ).eval()
    tokens = torch.randint(31, (2, 150), device=device)
    with torch.inference_mode():
        cache = model.make_cache()
        parts = [model(tokens[:, :29], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(29, tokens.shape[1])]
        return float((torch.cat(parts, 1) - model(tokens)).abs().max())


def turn(stream: Iterator[Tensor]) -> float:
    """Seconds a token; reading the last one waits for the device."""
    start = time.perf_counter()
    for _ in range(TOKENS_A_TURN):
        token = next(stream)
    token.tolist()
    return (time.perf_counter() - start) / TOKENS_A_TURN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=96)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="parts whose name holds this text, on a GPU")
    parser.add_argument("--seconds", type=float, default=230.0, help="what does not fit is left out, on a GPU")
    parser.add_argument("--all", action="store_true", help="all contexts and batches, on a GPU; about four minutes")
    parser.add_argument("--smoke", action="store_true", help="the GPU's benchmark, small, on any device")
    parser.add_argument("--out", type=Path, help="folder for the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    difference = check(args.device)
    common.refuse([f"cached and uncached logits differ by {difference:.1e}"] if difference > 1e-10 else [])

    if args.smoke or args.device == "cuda":
        common.announce()
        rows, said = generation_gpu.table(args.device, args.seconds, args.only, args.smoke, args.all)
        said = f"cached against uncached logits in fp64: {difference:.1e}; {said}"
        common.write(args.out, "generation", rows, check=said)
        return 0

    model = LongNetLM(
        vocab_size=256,
        d_model=256,
        nhead=8,
        num_decoder_layers=4,
        dim_feedforward=1024,
        segment_lengths=SEGMENT_LENGTHS,
        dilation_rates=DILATION_RATES,
        device=args.device,
    ).eval()
    longest = max(SEGMENT_LENGTHS)
    streams, prefill = {}, {}
    for context in (SHORT, LONG):
        prompt = torch.randint(256, (1, context + longest // 2), device=args.device)
        streams[context] = model.stream(prompt, (args.rounds + 2) * TOKENS_A_TURN, seed=0)
        start = time.perf_counter()
        next(streams[context]).tolist()
        prefill[context] = time.perf_counter() - start
    for stream in streams.values():
        turn(stream)  # warms up

    seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
    for i in range(args.rounds):
        for context in (SHORT, LONG) if i % 2 == 0 else (LONG, SHORT):
            seconds[context].append(turn(streams[context]))

    parameters = sum(p.numel() for p in model.parameters())
    common.announce()
    print(f"{parameters / 1e6:.1f} M parameters, 4 layers, w={list(SEGMENT_LENGTHS)}, r={list(DILATION_RATES)}")
    print(f"check: cached and uncached logits differ by {difference:.1e} (fp64)")
    rate = {}
    for context, times in seconds.items():
        rate[context] = 1 / statistics.median(times)
        print(
            f"context {context + longest // 2:6d}: {rate[context]:7.1f} tokens/s "
            f"(prefill {prefill[context]:.1f} s; {args.rounds} turns of {TOKENS_A_TURN} from mid-segment on)"
        )
    ratio = statistics.median(short / long for short, long in zip(seconds[SHORT], seconds[LONG], strict=True))
    flat = abs(1 - ratio) <= ALLOWED
    print(f"64k against 8k: {ratio:.3f}, {'within' if flat else 'NOT within'} {ALLOWED:.0%}")
    rows = [
        {
            "case": f"context {context + longest // 2}",
            "tokens_per_s": rate[context],
            "prefill_seconds": prefill[context],
        }
        for context in seconds
    ]
    rows.append({"case": "64k against 8k", "ratio": ratio})
    common.write(args.out, "generation", rows, check=f"cached against uncached logits in fp64: {difference:.1e}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
