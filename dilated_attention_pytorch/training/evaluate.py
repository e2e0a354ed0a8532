"""Bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dilated_attention_pytorch.training.corpus import BOUNDARY
from dilated_attention_pytorch.training.distributed import World
from dilated_attention_pytorch.training.parallel import Layout


class Evaluation(NamedTuple):
    """How well a model predicts held-out text.

    Attributes:
        loss: nats per predicted token, boundaries between documents included.
        bits_per_byte: bits to encode the text, boundaries included, per byte of it, boundaries not counted.
        num_bytes: how many bytes of text were predicted.
    """

    loss: float
    bits_per_byte: float
    num_bytes: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    excerpts: Sequence[NDArray[np.uint8]],
    world: World,
    *,
    batch_size: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    layout: Layout | None = None,
) -> Evaluation:
    """Predicts each byte of the excerpts from those before it in its excerpt; every byte weighs the same.

    Args:
        model: tokens `(B, N)` to logits `(B, N, 256)`.
        excerpts: from `held_out_excerpts`; dealt out over the ranks in turn.
        world: the processes that share the work; all get the result.
        batch_size: excerpts at a time; unequal lengths never share a batch.
        autocast: makes a context manager to run the model in.
        layout: of processes that share sequences; by default each reads its own.
    """
    layout = layout or Layout(world.rank, world.size)
    was_training = model.training
    model.eval()
    # Nats, tokens, bytes of text: fp64, so that the order of the sums over ranks does not show.
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    mine = _batches(excerpts[layout.data_rank :: layout.data_size], batch_size)
    if layout.mesh is not None:
        # Sharded parameters are gathered forward by forward: every rank makes as many, with nothing new if need be.
        most = max(len(_batches(excerpts[r :: layout.data_size], batch_size)) for r in range(layout.data_size))
        idle = [list(excerpts[:1])] * (most - len(mine))
    else:
        idle = []
    for number, alike in enumerate(mine + idle):
        tokens = torch.from_numpy(np.stack(alike).astype(np.int64)).to(world.device)
        inputs, targets, whole = layout.shard(tokens)
        targets = targets.flatten()
        with autocast():
            logits = model(inputs, **whole)
        if number < len(mine):
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
            seen = losses.new_tensor(losses.numel())
            totals += torch.stack([losses.double().sum(), seen, (targets != BOUNDARY).sum()])
    model.train(was_training)
    nats, tokens_seen, text = world.sum(totals).tolist()
    return Evaluation(nats / tokens_seen, nats / math.log(2) / max(1.0, text), int(text))


def _batches(excerpts: Sequence[NDArray[np.uint8]], batch_size: int) -> list[list[NDArray[np.uint8]]]:
    """Excerpts in order, `batch_size` at a time; unequal lengths never share a batch."""
    batches, left = [], list(excerpts)
    while left:
        alike = [excerpt for excerpt in left[:batch_size] if excerpt.size == left[0].size]
        left = left[len(alike) :]
        batches.append(alike)
    return batches
