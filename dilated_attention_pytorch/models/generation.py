"""Generation: sampling from a causal model token by token, with a cache."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.models import decoding
from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.models.decoding import Steps

# Positions of prompts to compute together, where rows are taken apart: they keep a GPU busy.
_AT_ONCE = 1 << 16


class Sampling(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`."""

    row_start: Tensor | None  # int (B,), first real position of each left-padded row; see `left_pad`
    greedy: bool  # take the likeliest token; temperature, top_k and top_p then mean nothing and are refused
    temperature: float  # divides the logits; above 0, 1 by default
    top_k: int | None  # sample from the k likeliest tokens only
    top_p: float | None  # sample from the fewest tokens that together have at least this probability, in (0, 1]
    seed: int | None  # of the samples; drawn from torch's generator when absent
    generator: torch.Generator | None  # to sample with, in place of a seed
    eos_token: int | None  # a row that has produced it repeats it; generation stops when every row has
    prefill_chunk: int | None  # positions of the prompt to compute at a time, which bounds memory; all by default
    graphed: bool | None  # a token is one replay of a CUDA graph; None, the default, where it can be one


def check_sampling(prompt: Tensor, sampling: Sampling, vocab_size: int) -> None:
    """Raises for a prompt or an option that is unknown, out of range or of the wrong type."""
    if prompt.shape[1] == 0:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    if prompt.numel() and (int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size):
        raise ValueError(f"expected tokens in [0, {vocab_size}), got {int(prompt.min())} to {int(prompt.max())}")
    if (row_start := sampling.get("row_start")) is not None:
        check.check_values("row_start", row_start)
        check.check_row_start(row_start, prompt.shape[0])
        if not bool(((row_start >= 0) & (row_start < prompt.shape[1])).all()):
            raise ValueError(f"expected row_start in [0, {prompt.shape[1]}), got {check.quoted(row_start.tolist())}")
    generator = sampling.get("generator")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected generator to be a torch.Generator, got {check.shown(generator)}")
    if unknown := sorted(set(sampling) - set(Sampling.__annotations__)):
        raise TypeError(f"expected options of {sorted(Sampling.__annotations__)}, got {check.quoted(unknown)}")
    temperature, top_k, top_p = sampling.get("temperature", 1.0), sampling.get("top_k"), sampling.get("top_p")
    check.check_bool("greedy", sampling.get("greedy", False))
    if sampling.get("greedy", False) and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("expected no temperature, top_k or top_p with greedy=True, which draws nothing")
    check.check_positive_int("top_k", 1 if top_k is None else top_k)
    eos_token, seed = sampling.get("eos_token"), sampling.get("seed")
    if eos_token is not None and check.check_int("eos_token", eos_token, 0) >= vocab_size:
        raise ValueError(f"expected eos_token in [0, {vocab_size}), got {eos_token}")
    if sampling.get("prefill_chunk") is not None:
        check.check_positive_int("prefill_chunk", sampling["prefill_chunk"])
    if sampling.get("graphed") is not None:
        check.check_bool("graphed", sampling["graphed"])
    if top_p is not None:
        check.check_float("top_p", top_p)
    if check.check_float("temperature", temperature) <= 0.0:
        raise ValueError(f"expected temperature above 0, got {temperature}; greedy=True takes the likeliest token")
    if temperature < 1e-30:  # logits would overflow
        raise ValueError(f"expected temperature of at least 1e-30, got {temperature}; greedy=True takes the likeliest")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"expected top_p in (0, 1], got {top_p}")
    if seed is not None and sampling.get("generator") is not None:
        raise ValueError("expected seed or generator, got both")
    check.check_int("seed", 0 if seed is None else seed, -(2**63))


class Sampler:
    """Draws tokens from logits, and knows which rows have ended."""

    def __init__(self, batch: int, device: torch.device, sampling: Sampling) -> None:
        names = ("temperature", "top_k", "top_p")
        self._filters: Any = {name: sampling.get(name) for name in names if name in sampling}
        self._greedy = sampling.get("greedy", False)
        eos_token, generator, seed = sampling.get("eos_token"), sampling.get("generator"), sampling.get("seed")
        self.eos_token = None if eos_token is None else operator.index(eos_token)
        self._generator = generator
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(operator.index(seed))
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def generator(self) -> torch.Generator | None:
        """What a GPU draws from; None for greedy tokens."""
        device = self.finished.device
        default = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        return None if self._greedy else self._generator or default

    def draw(self, logits: Tensor) -> Tensor:
        """The next tokens, int64 `(B,)`, of logits `(B, vocab_size)`; a row that has ended repeats its end."""
        if self._greedy:
            new = logits.argmax(-1)
        elif logits.is_cuda and torch.cuda.is_current_stream_capturing():
            # What torch.multinomial does for one token, without its assertions, whose failure would end the process.
            probabilities = token_probabilities(logits, **self._filters)
            noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
            new = (probabilities / noise).argmax(-1)
        else:
            probabilities = token_probabilities(logits, **self._filters)
            new = torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]
        if self.eos_token is not None:
            new = new.masked_fill(self.finished, self.eos_token)
            self.finished |= new == self.eos_token
        return new

    def end(self, tokens: Sequence[Tensor]) -> int | None:
        """How many of consecutive steps' tokens there are until all rows have ended; None if some row goes on."""
        if self.eos_token is None:
            return None
        ended = (torch.stack(list(tokens)) == self.eos_token).all(1).tolist()
        return ended.index(True) + 1 if True in ended else None


def sample(model: Any, prompt: Tensor, count: int, sampling: Sampling) -> Iterator[Tensor]:
    """Draws up to `count` tokens int64 `(B,)` from a `LongNetLM`, which is in evaluation mode meanwhile."""
    training = [module for module in model.modules() if module.training]
    sampler = Sampler(prompt.shape[0], prompt.device, sampling)
    steps: Steps | None = None
    used = 0
    try:
        for module in training:
            module.training = False
        # Inference mode is entered anew each time: while the caller has the iterator, its own grad mode holds.
        with torch.inference_mode():
            cache, logits = begin(model, prompt, prompt.shape[1] + count, sampling)
            block = [sampler.draw(logits)]
        while True:
            end = sampler.end(block)
            for new in block[:end]:
                used += 1
                yield new.clone()  # outside inference mode, so that it is a tensor like any other
            count -= len(block)
            if end is not None or count == 0:
                return
            used = 0
            with torch.inference_mode():
                steps = steps or decoding.steps(model, cache, sampler, block[0])
                block = steps.take(min(count, steps.ahead))
    finally:
        if steps is not None:
            steps.rewind(used)
        for module in training:
            module.training = True


def begin(
    model: Any, prompt: Tensor, longest: int, sampling: Sampling
) -> tuple[KeyValueCache | decoding.DecodingCache, Tensor]:
    """A cache that has seen a prompt `(B, N)`, and logits `(B, vocab_size)` of what follows.

    Buffers of fixed size are filled by a few rows at a time: a prompt's growing cache is many times larger.
    """
    row_start, chunk = sampling.get("row_start"), sampling.get("prefill_chunk")
    if not sampling.get("graphed", False):
        cache = model.make_cache(row_start=row_start)
        return cache, prefill(model, cache, prompt, chunk)
    batch, length = prompt.shape
    starts = 0 if row_start is None else row_start.to(prompt.device, torch.int64)
    fixed = decoding.DecodingCache(model, torch.full((batch,), length, device=prompt.device) - starts, longest)
    logits, at_once = [], max(1, _AT_ONCE // length)
    for first in range(0, batch, at_once):
        rows = slice(first, first + at_once)
        growing = model.make_cache(row_start=None if row_start is None else row_start[rows])
        logits.append(prefill(model, growing, prompt[rows], chunk))
        fixed.take(growing, rows)
    return fixed, torch.cat(logits)


def prefill(model: Any, cache: KeyValueCache, prompt: Tensor, chunk: int | None) -> Tensor:
    """Takes a prompt `(B, N)` into a cache, `chunk` positions at a time; logits `(B, vocab_size)` of what follows."""
    for part in prompt.split(prompt.shape[1] if chunk is None else operator.index(chunk), 1):
        last = model.hidden(part, cache=cache)[:, -1]
    logits: Tensor = model.logits(last)
    return logits


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution fp32 (fp64) `(B, vocab_size)` that tokens are drawn from, of logits of that shape.

    The temperature divides the logits; of the `top_k` likeliest tokens the fewest stay that together have at least the
    probability `top_p`, always one.
    """
    logits = logits.to(accumulator(logits.dtype)) / float(temperature)
    if top_k is None and top_p is None:
        return logits.softmax(-1)
    size = logits.shape[-1]
    best, tokens = logits.topk(size if top_k is None else min(int(top_k), size), -1)  # the likeliest first
    probabilities = best.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p) & (tokens != tokens[:, :1]), 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, tokens, probabilities)


def left_pad(sequences: Sequence[Tensor], pad_token: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch for `generate`.

    Args:
        sequences: int tensors `(N_b,)`, none empty.
        pad_token: fills the front; no query sees it.

    Returns:
        int64 `(B, N)`, and `row_start` int64 `(B,)`.

    Raises:
        ValueError: no sequence, an empty one, or one on another device than the first.
        TypeError: one that is no int tensor.
    """
    check.check_instance("sequences", sequences, list, tuple)
    pad_token = check.check_int("pad_token", pad_token, -(2**63))
    for i, x in enumerate(sequences):
        check.check_values(f"sequences[{i}]", x)
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expected sequences[{i}] of dtype int32 or int64, got {x.dtype}")
        if x.device != sequences[0].device:
            raise ValueError(f"expected sequences[{i}] on the first one's device {sequences[0].device}, got {x.device}")
    if not sequences or any(x.dim() != 1 or x.numel() == 0 for x in sequences):
        shapes = [tuple(x.shape) for x in sequences]
        raise ValueError(f"expected sequences to be non-empty tensors of shape (N,), got shapes {shapes}")
    longest = max(len(x) for x in sequences)
    batch = torch.full((len(sequences), longest), pad_token, dtype=torch.int64, device=sequences[0].device)
    for row, x in zip(batch, sequences, strict=True):
        row[longest - len(x) :] = x
    return batch, torch.tensor([longest - len(x) for x in sequences], device=batch.device)
