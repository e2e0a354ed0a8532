"""What a trained model gives: bits per byte on validation text, and text of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, takewhile
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.models.generation import Sampling
from dilated_attention_pytorch.training.distributed import RankLayout, World
from dilated_attention_pytorch.training.excerpts import document_bounds
from dilated_attention_pytorch.training.sources import BOUNDARY
from dilated_attention_pytorch.training.tokenizer import Tokenizer, utf8


class Evaluation(NamedTuple):
    """Losses on validation text."""

    loss: float  # nats per predicted token, boundaries between documents included
    bits_per_byte: float  # bits to encode text and boundaries, per byte of text
    num_bytes: int  # predicted bytes of text
    by_position: Mapping[int, float]  # loss where 0, 1, 2 to 3, 4 to 7, .. tokens stand before; by the first number


@torch.no_grad()
def evaluate(
    model: nn.Module,
    excerpts: Sequence[NDArray[Any]],
    world: World,
    *,
    batch_size: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    layout: RankLayout | None = None,
    end_token: int | None = BOUNDARY,
    bytes_per_token: float = 1.0,
    packed: bool = False,
) -> Evaluation:
    """Predict each token of the excerpts from those before it in its excerpt; every token weighs the same.

    Args:
        model: tokens `(B, N)` to logits `(B, N, vocab_size)`.
        excerpts: from `validation_excerpts`; dealt out over the ranks in turn.
        world: the processes that share the work; all get the result.
        batch_size: excerpts per batch; unequal lengths never share one.
        autocast: makes a context manager to run the model in.
        layout: of processes that share sequences; by default each reads its own.
        end_token: ends a document, and is no text.
        bytes_per_token: of text.
        packed: predict from the same document alone.
    """
    layout = layout or RankLayout(world.rank, world.size)
    was_training = model.training
    model.eval()
    buckets = 1 + max(map(len, excerpts)).bit_length()
    # Tokens of text, then nats and tokens by position; in fp64 the order of the sums over ranks does not show.
    totals = torch.zeros(1 + 2 * buckets, dtype=torch.float64, device=world.device)
    batches = [_batches(excerpts[reader :: layout.data_size], batch_size) for reader in range(layout.data_size)]
    mine, idle = batches[layout.data_rank], []
    if layout.mesh is not None:
        # Each forward gathers sharded parameters: every rank runs as many, the last ones on text that does not count.
        idle = [list(excerpts[:1])] * (max(map(len, batches)) - len(mine))
    for number, alike in enumerate(mine + idle):
        tokens = torch.from_numpy(np.stack(alike).astype(np.int64)).to(world.device)
        inputs, targets, whole = layout.shard(tokens)
        with autocast():
            logits = predict(model, inputs, end_token if packed else None, **whole)
        if number < len(mine):
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").double()
            before = layout.shard(torch.arange(tokens.shape[1], device=world.device)[None])[0].expand_as(targets)
            bucket = (before > 0) + before.double().clamp(min=1).log2().long()
            totals[0] += (targets != (-1 if end_token is None else end_token)).sum()
            totals.index_add_(0, 1 + bucket.flatten(), losses)
            totals.index_add_(0, 1 + buckets + bucket.flatten(), torch.ones_like(losses))
    model.train(was_training)
    text, *sums = world.sum(totals).tolist()
    nats, counts = sums[:buckets], sums[buckets:]
    num_bytes = text * bytes_per_token
    by_position = {1 << i >> 1: nats[i] / counts[i] for i in range(buckets) if counts[i]}
    bits_per_byte = sum(nats) / math.log(2) / max(1.0, num_bytes)
    return Evaluation(sum(nats) / sum(counts), bits_per_byte, round(num_bytes), by_position)


def predict(model: nn.Module, inputs: Tensor, end_token: int | None = None, **whole: int) -> Tensor:
    """Logits `(B, N, vocab_size)` of tokens `(B, N)`; with `end_token`, each document is a sequence of its own."""
    if end_token is None:
        logits: Tensor = model(inputs, **whole)
        return logits
    logits = model(inputs.flatten(), cu_seqlens=document_bounds(inputs, end_token))
    return logits.view(*inputs.shape, -1)


def _batches(excerpts: Sequence[NDArray[Any]], batch_size: int) -> list[list[NDArray[Any]]]:
    """Excerpts in order, `batch_size` at a time; unequal lengths never share a batch."""
    batches: list[list[NDArray[Any]]] = []
    for _, alike in groupby(excerpts, key=len):
        same = list(alike)
        batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
    return batches


def text_stream(
    model: LongNetLM, tokenizer: Tokenizer, prompt: str, max_tokens: int, **sampling: Unpack[Sampling]
) -> Iterator[str]:
    """Continue a prompt as the start of a document, piece by piece, until the model ends the document.

    Args:
        model: a model of `Trainer`.
        tokenizer: of its text.
        prompt: any text, or none.
        max_tokens: the most tokens to add.
        sampling: as in `LongNetLM.stream`.

    Returns:
        Pieces of the new text; the replacement character stands for bytes that are not UTF-8.
    """
    device, end = next(model.parameters()).device, tokenizer.end_token
    # A document starts where another has ended.
    tokens = torch.tensor([[end, *tokenizer.encode([utf8(prompt)])[0].tolist()]], device=device)
    pieces = model.stream(tokens, max_tokens, **Sampling(eos_token=end, **sampling))
    return tokenizer.decode(takewhile(lambda token: token != end, (int(piece) for piece in pieces)))
