"""Generation on one GPU, `python benchmarks/generation.py --device cuda`: what `generation.py` hands over.

A token of `LongNetLM` as one replay of a CUDA graph and step by step, beside the bytes that it has to read; prompts in
pieces, one of them of a million tokens, continued by `stream` as users call it; and a dense Llama of the same size in
transformers, with its dynamic and its static cache (eager, and compiled as `generate` compiles it).

A step is put at a position by filling the cache with random keys of the right shape: what a token costs depends on how
many keys it sees, not on what they are. A graph serves every position, so contexts are measured with one capture per
batch. Multiples of every segment length are where the fewest keys are in sight: *after* is the mean over the 128 tokens
behind the context, *before* over the 128 in front of it, *mean* over 64 places drawn from its longest segment.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import common
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.models import LongNetLM, decoding
from dilated_attention_pytorch.models.generation import Sampler, prefill

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000, "d_model": 1024, "nhead": 16, "num_decoder_layers": 16, "dim_feedforward": 4096,
    "segment_lengths": (2048, 8192, 32_768), "dilation_rates": (1, 4, 16),
}  # fmt: skip
SMOKE: dict[str, Any] = SHAPE | {
    "vocab_size": 97, "d_model": 64, "nhead": 4, "num_decoder_layers": 2, "dim_feedforward": 96,
    "segment_lengths": (16, 64), "dilation_rates": (1, 4),
}  # fmt: skip
BATCHES, CONTEXTS = (1, 8, 64), (8 << 10, 64 << 10, 256 << 10, 1 << 20)
PIECES = (8 << 10, 32 << 10, 64 << 10)  # positions of a prompt at a time
# Bytes per second, as the makers state them.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
PLACES = ("after", "before", "mean")
Row = dict[str, Any]


def named(context: int) -> str:
    """1048576 is 1M."""
    return f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}k"


class Standing:
    """Steps of a batch that can be put at any position."""

    def __init__(self, model: LongNetLM, batch: int, longest: int) -> None:
        prompt = torch.zeros(batch, 1, dtype=torch.int64, device=model.embed_tokens.weight.device)
        growing = model.make_cache()
        model.hidden(prompt, cache=growing)
        sampler = Sampler(batch, prompt.device, {"greedy": True})
        self.cache = decoding.DecodingCache(model, torch.ones_like(prompt[:, 0]), longest)
        self.cache.take(growing)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.eager = decoding.EagerSteps(model, self.cache, sampler.draw, prompt[:, 0])
        self.graphed = decoding.GraphedSteps(self.eager, [self.cache.positions, sampler.finished], None, 16)

    def seconds(self, steps: decoding.Steps, positions: Iterable[int], count: int) -> float:
        """Seconds per token: `count` from each of the positions on."""
        total = 0
        start = now()
        for position in positions:
            self.cache.positions.fill_(position)
            steps.take(count)
            total += count
        return (now() - start) / total

    def device_work(self, positions: list[int]) -> tuple[float, float]:
        """Seconds that the device works per token, and how many kernels and copies that are."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.seconds(self.graphed, positions, 1)
        work = [x for x in seen.key_averages() if x.self_device_time_total > 0]
        count = len(positions)
        return sum(x.self_device_time_total for x in work) / 1e6 / count, sum(x.count for x in work) / count


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def first_positions(context: int, place: str, longest: int) -> tuple[list[int], int]:
    """Positions to stand at, and how many tokens to take from each on."""
    near = min(128, longest // 16)
    if place != "mean":
        return [context if place == "after" else context - near], near
    start = (context - 1) // longest * longest
    # Drawn, because evenly spaced ones would fall on the same residues of the shorter segments.
    return [start + i for i in random.Random(context).sample(range(longest - 4), min(64, near))], 4


def bytes_of(model: LongNetLM, positions: list[int], batch: int) -> float:
    """Bytes that a token of each row has to read: the weights, one row of the embedding, each key in sight once."""
    config = model.config
    heads = config.num_kv_heads or config.nhead
    pattern = DilatedPattern(config.segment_lengths, config.dilation_rates, heads)
    size = model.embed_tokens.weight.element_size()
    weights = sum(p.nbytes for p in model.parameters()) - model.embed_tokens.weight.nbytes
    keys = keys_in_sight(pattern, tuple(positions)) * config.d_model // config.nhead * 2 * size
    return weights + batch * keys * config.num_decoder_layers


@functools.cache
def keys_in_sight(pattern: DilatedPattern, positions: tuple[int, ...]) -> float:
    """Distinct keys that a query sees, of all heads together; the mean over the positions."""
    heads = range(pattern.num_heads)
    return statistics.mean(sum(len(set().union(*pattern.keys_of(n, h, n + 1))) for h in heads) for n in positions)


def bandwidth() -> float | None:
    """Of this device, where it is known."""
    return next((rate for part, rate in BANDWIDTH.items() if part in torch.cuda.get_device_name()), None)


def decode(model: LongNetLM, batches: Iterable[int], contexts: Iterable[int], eager: bool) -> Iterator[Row]:
    """Replays, or the same steps from the host."""
    contexts, longest = list(contexts), max(model.config.segment_lengths)
    for batch in batches:
        fresh()
        standing = Standing(model, batch, max(contexts) + longest)
        steps = standing.eager if eager else standing.graphed
        for context, place in itertools.product(contexts, ("mean",) if eager else PLACES):
            positions, count = first_positions(context, place, longest)
            positions = positions[::8] if eager else positions
            standing.seconds(steps, positions[:1], 4)
            found = statistics.median(standing.seconds(steps, positions, count) for _ in range(1 if eager else 3))
            # Every token that was taken, or a few of many that follow one another.
            taken = [n + i for n in positions for i in range(0, count, max(1, count // 16))]
            least = bytes_of(model, taken, batch)
            row: Row = {
                "case": f"{'eager' if eager else 'graphed'} B={batch} {named(context)} {place}", "ms": found * 1e3,
                "gib": least / 2**30, "peak_gib": peak(),
            }  # fmt: skip
            if (rate := bandwidth()) is not None:
                row["floor_ms"] = least / rate * 1e3
            if not eager:
                work, kernels = standing.device_work(taken[::4] if place == "mean" else taken)
                row |= {"device_ms": work * 1e3, "kernels": kernels, "share": work / found}
            yield row
        del standing, steps


def growing(model: LongNetLM, contexts: Iterable[int]) -> Iterator[Row]:
    """Steps over the growing cache, `generate(graphed=False)`, which was all there was before graphs."""
    for context in contexts:
        fresh()
        cache = model.make_cache()
        cache.begin(context)
        heads, width = model.decoder.layers[0].self_attn.num_kv_heads, model.decoder.layers[0].self_attn.head_dim
        for layer in cache.layers:
            x = torch.randn(1, 1, heads, width, device=device_of(model), dtype=model.embed_tokens.weight.dtype)
            layer.append(*[x.expand(1, context, heads, width)] * 2)
        cache.commit()
        steps = decoding.EagerSteps(
            model, cache, functools.partial(torch.argmax, dim=-1), torch.zeros_like(x[0, :, 0, 0]).long()
        )
        steps.take(4)
        start = now()
        steps.take(24)
        yield {
            "case": f"growing cache B=1 {named(context)} after",
            "ms": (now() - start) / 24 * 1e3,
            "peak_gib": peak(),
        }


def prompts(model: LongNetLM, cases: Iterable[tuple[int, int, int | None]]) -> Iterator[Row]:
    """A prompt whole or in pieces, random tokens, without and with what is compiled for its shape."""
    for batch, context, piece in cases:
        fresh()
        prompt = torch.randint(model.config.vocab_size or 1, (batch, context), device=device_of(model))
        times = []
        for _ in range(2):
            start = now()
            prefill(model, model.make_cache(), prompt, piece)
            times.append(now() - start)
        how = "whole" if piece is None else f"in pieces of {named(piece)}"
        case = f"prefill B={batch} {named(context)} {how}"
        yield {"case": case, "first_s": times[0], "s": times[1], "peak_gib": peak()}


def streamed(model: LongNetLM, context: int, graphed: bool) -> Iterator[Row]:
    """What a user of `stream` sees, compilation included: a real prompt, the first token, 256 more."""
    fresh()
    prompt = torch.randint(model.config.vocab_size or 1, (1, context), device=device_of(model))
    start = now()
    stream = model.stream(prompt, 258, seed=0, top_k=50, prefill_chunk=PIECES[-1], graphed=graphed)
    next(stream).tolist()
    first = now()
    next(stream).tolist()  # captures
    second = now()
    for token in stream:
        token.tolist()
    yield {
        "case": f"stream B=1 {named(context)}", "first_s": first - start, "second_s": second - first,
        "ms": (now() - second) / 256 * 1e3, "peak_gib": peak(),
    }  # fmt: skip


def dense(like: LongNetLM, cases: Iterable[tuple[str, int, int]]) -> Iterator[Row]:
    """A Llama of as many parameters; its static cache is filled with random keys, as ours."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    c, device, dtype = like.config, device_of(like), like.embed_tokens.weight.dtype
    # SwiGLU has three matrices where LongNet's network has two.
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.num_decoder_layers,
        num_attention_heads=c.nhead, intermediate_size=c.dim_feedforward * 2 // 3 // 8 * 8,
        max_position_embeddings=max(CONTEXTS) * 2, attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).to(dtype).eval()
    heads, width = c.nhead, c.d_model // c.nhead
    for kind, batch, context in cases:
        fresh()
        need = 2 * c.num_decoder_layers * batch * heads * width * context * torch.finfo(dtype).bits // 8
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 1 << 30
        case = f"dense, {kind} cache B={batch} {named(context)}"
        if need * (1.0 + 3.0 / c.num_decoder_layers) > free:
            yield {"case": case, "left_out": f"its cache is {need / 2**30:.0f} GiB"}
            continue
        token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        cache: Any = DynamicCache(config=config)
        call: Callable[..., Any] = model
        if kind == "dynamic":
            for i in range(c.num_decoder_layers):
                cache.update(*(torch.randn(batch, heads, context, width, device=device, dtype=dtype) for _ in "kv"), i)
        else:
            cache = StaticCache(config=config, max_cache_len=context + 64)
            model(token, past_key_values=cache)
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
                layer.cumulative_length.fill_(context)
            if kind.endswith("compiled"):
                call = torch.compile(model, mode="reduce-overhead")
        warm = now()
        for _ in range(4):
            call(token, past_key_values=cache)
        start = now()
        for _ in range(16):
            token = call(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        yield {"case": case, "ms": (now() - start) / 16 * 1e3, "warm_up_s": start - warm, "peak_gib": peak()}
        del cache


def device_of(model: LongNetLM) -> torch.device:
    """Where a model lies."""
    return model.embed_tokens.weight.device


def fresh() -> None:
    """Memory of earlier cases is given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def check(device: str) -> float:
    """The largest difference of logits over fixed buffers from those over the growing cache, in fp32."""
    model = LongNetLM(**SMOKE, device=device).eval()
    tokens = torch.randint(97, (2, 200), device=device)
    growing = model.make_cache(row_start=torch.tensor([0, 37], device=device))
    model(tokens[:, :50], cache=growing)
    fixed, worst = decoding.DecodingCache(model, torch.tensor([50, 13], device=device), 200), 0.0
    fixed.take(growing)
    for n in range(50, 140):
        one, other = (model(tokens[:, n : n + 1], cache=cache) for cache in (growing, fixed))
        worst = max(worst, float((one - other).abs().max()))
    return worst


def run(device: str, seconds: float, only: str, smoke: bool, everything: bool) -> tuple[list[Row], list[str]]:
    """The rows of the parts whose name holds a text, as many as the seconds allow; and what was left out."""
    begun = time.perf_counter()
    shape, contexts, batches = (SMOKE, (512, 1024), (1, 2)) if smoke else (SHAPE, CONTEXTS, BATCHES)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, late = [], []
    with torch.inference_mode():
        model = LongNetLM(**shape, device=device, dtype=dtype).eval()
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {dtype}", flush=True)
        few, last, most = contexts if everything else (*contexts[:2], contexts[-1]), contexts[-1], batches[-1]
        whole = [(1, contexts[0], None), (1, last, PIECES[-1])]
        more = [(1, last, piece) for piece in PIECES[:-1]]
        more += [(1, contexts[1], None), (batches[1], contexts[1], PIECES[-1]), (most, contexts[0], PIECES[0])]
        parts: dict[str, Iterator[Row]] = {
            "prefill": prompts(model, whole + more if everything else whole),
            "stream": streamed(model, last, graphed=device == "cuda"),
            "fixed buffers": decode(model, batches[:1], few, eager=False),
            "fixed buffers, a batch": decode(model, batches[1:], contexts if everything else [last], eager=False),
            "growing cache": growing(model, few if everything else few[:1]),
            "eager": decode(model, batches if everything else batches[:1], contexts[:1], eager=True),
            "dense, dynamic": dense(model, [*(("dynamic", 1, n) for n in few), ("dynamic", most, contexts[0])]),
            "dense, static": dense(model, [("static", 1, n) for n in (few if everything else few[1:2])]),
            "dense, compiled": dense(model, [("static, compiled", 1, n) for n in (few if everything else few[1:2])]),
        }
        for name, part in parts.items():
            # Without a GPU the kernels of a step would be interpreted.
            if only not in name or (device != "cuda" and name.startswith(("fixed", "eager", "dense, comp"))):
                continue
            for row in part:
                rows.append(row)
                print(line(row), flush=True)
                if time.perf_counter() - begun > seconds:
                    late.append(f"the rest of {name}")
                    break
    return rows, late


def line(row: Row) -> str:
    """A row in words."""
    forms = {
        "ms": "{:9.3f} ms a token", "gib": "{:.3f} GiB to read", "floor_ms": "in {:.3f} ms",
        "share": "device {:.0%}", "kernels": "{:.0f} kernels",
        "device_ms": "works {:.3f} ms", "first_s": "first {:.2f} s", "second_s": "second {:.2f} s", "s": "{:.2f} s",
        "warm_up_s": "warm-up {:.1f} s", "peak_gib": "{:.2f} GiB", "left_out": "left out: {}",
    }  # fmt: skip
    said = [form.format(row[name]) for name, form in forms.items() if name in row]
    return f"{row['case']:40}" + ", ".join(said)


def judged(rows: list[Row]) -> list[str]:
    """What issue 19 asks for, beside what was found."""
    found, said = {row["case"]: row for row in rows}, []
    single = [row["ms"] for case, row in found.items() if case.startswith("graphed B=1 ")]
    if single:
        said.append(f"batch 1: {min(single):.2f} to {max(single):.2f} ms a token; at most 1.5 is asked for")
    for place in PLACES:
        one = [row["ms"] for case, row in found.items() if case.startswith("graphed B=1 ") and case.endswith(place)]
        if len(one) > 1:
            said.append(f"batch 1, {place}: {max(one) / min(one) - 1:.0%} between contexts; 10% is asked for")
    for case, row in found.items():
        if case.startswith("graphed B=64") and case.endswith("mean") and "floor_ms" in row:
            ratio = row["ms"] / row["floor_ms"]
            said.append(f"{case}: {ratio:.1f} times its bytes, {row['peak_gib']:.1f} GiB; 3 and 40 are asked for")
    return said


def table(device: str, seconds: float, only: str, smoke: bool, everything: bool) -> tuple[list[Row], str]:
    """Runs, prints, and says what was checked."""
    warnings.filterwarnings("ignore", "the context of")  # no position of this pattern knows all of a million tokens
    said = "nothing more: the decoding kernel needs a GPU"
    if device == "cuda":
        with torch.inference_mode():
            difference = check(device)
        said = f"logits over fixed buffers against the growing cache, fp32: {difference:.1e}"
        common.refuse([said] if difference > 1e-5 else [])
    print("check:", said)
    rows, late = run(device, seconds, only, smoke, everything)
    for text in [*judged(rows), *(f"left out, {seconds:.0f} s are over: {name}" for name in late)]:
        print(text)
    return rows, said
