"""What a trained model gives: bits per byte on validation text, and text of its own."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, takewhile
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.models.generation import Sampling
from dilated_attention_pytorch.training.corpus import BOUNDARY
from dilated_attention_pytorch.training.distributed import RankLayout, World


class Evaluation(NamedTuple):
    """Losses on validation text."""

    loss: float  # nats per predicted token, boundaries between documents included
    bits_per_byte: float  # bits to encode text and boundaries, per byte of text
    num_bytes: int  # predicted bytes of text


@torch.no_grad()
def evaluate(
    model: nn.Module,
    excerpts: Sequence[NDArray[np.uint8]],
    world: World,
    *,
    batch_size: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    layout: RankLayout | None = None,
) -> Evaluation:
    """Predict each byte of the excerpts from those before it in its excerpt; every byte weighs the same.

    Args:
        model: tokens `(B, N)` to logits `(B, N, 256)`.
        excerpts: from `validation_excerpts`; dealt out over the ranks in turn.
        world: the processes that share the work; all get the result.
        batch_size: excerpts per batch; unequal lengths never share one.
        autocast: makes a context manager to run the model in.
        layout: of processes that share sequences; by default each reads its own.
    """
    layout = layout or RankLayout(world.rank, world.size)
    was_training = model.training
    model.eval()
    # Nats, tokens, bytes of text; in fp64 the order of the sums over ranks does not show.
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    batches = [_batches(excerpts[reader :: layout.data_size], batch_size) for reader in range(layout.data_size)]
    mine, idle = batches[layout.data_rank], []
    if layout.mesh is not None:
        # Each forward gathers sharded parameters: every rank runs as many, the last ones on text that does not count.
        idle = [list(excerpts[:1])] * (max(map(len, batches)) - len(mine))
    for number, alike in enumerate(mine + idle):
        tokens = torch.from_numpy(np.stack(alike).astype(np.int64)).to(world.device)
        inputs, targets, whole = layout.shard(tokens)
        with autocast():
            logits = model(inputs, **whole)
        if number < len(mine):
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            seen = losses.new_tensor(losses.numel())
            totals += torch.stack([losses.double().sum(), seen, (targets != BOUNDARY).sum()])
    model.train(was_training)
    nats, tokens_seen, text = world.sum(totals).tolist()
    return Evaluation(nats / tokens_seen, nats / math.log(2) / max(1.0, text), int(text))


def _batches(excerpts: Sequence[NDArray[np.uint8]], batch_size: int) -> list[list[NDArray[np.uint8]]]:
    """Excerpts in order, `batch_size` at a time; unequal lengths never share a batch."""
    batches: list[list[NDArray[np.uint8]]] = []
    for _, alike in groupby(excerpts, key=len):
        same = list(alike)
        batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
    return batches


def byte_stream(model: LongNetLM, prompt: str, max_bytes: int, **sampling: Unpack[Sampling]) -> Iterator[str]:
    """Continue a prompt as the start of a document, piece by piece, until the model ends the document.

    Args:
        model: a byte model of `Trainer`.
        prompt: any text, or none.
        max_bytes: the most bytes to add.
        sampling: as in `LongNetLM.stream`.

    Returns:
        Pieces of the new text; the replacement character stands for bytes that are not UTF-8.
    """
    device = next(model.parameters()).device
    # A document starts where another has ended.
    tokens = torch.tensor([[BOUNDARY, *prompt.encode("utf-8")]], device=device)
    pieces = model.stream(tokens, max_bytes, **Sampling(eos_token=BOUNDARY, **sampling))
    text = (bytes([int(token)]) for token in takewhile(lambda token: token != BOUNDARY, pieces))
    return codecs.iterdecode(text, "utf-8", "replace")


def write_text(model: LongNetLM, prompt: str, max_bytes: int, **sampling: Unpack[Sampling]) -> str:
    """The prompt and its continuation; arguments as in `byte_stream`."""
    return prompt + "".join(byte_stream(model, prompt, max_bytes, **sampling))
