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
) -> Evaluation:
    """Predicts each byte of the excerpts from those before it in its excerpt; every byte weighs the same.

    Args:
        model: tokens `(B, N)` to logits `(B, N, 256)`.
        excerpts: from `held_out_excerpts`; dealt out over the ranks in turn.
        world: the processes that share the work; all get the result.
        batch_size: excerpts at a time; unequal lengths never share a batch.
        autocast: makes a context manager to run the model in.
    """
    was_training = model.training
    model.eval()
    # Nats, tokens, bytes of text: fp64, so that the order of the sums over ranks does not show.
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    mine = list(excerpts[world.rank :: world.size])
    while mine:
        alike = [excerpt for excerpt in mine[:batch_size] if excerpt.size == mine[0].size]
        mine = mine[len(alike) :]
        tokens = torch.from_numpy(np.stack(alike).astype(np.int64)).to(world.device)
        targets = tokens[:, 1:].flatten()
        with autocast():
            logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        totals += torch.stack([losses.double().sum(), losses.new_tensor(losses.numel()), (targets != BOUNDARY).sum()])
    model.train(was_training)
    nats, tokens_seen, text = world.sum(totals).tolist()
    return Evaluation(nats / tokens_seen, nats / math.log(2) / max(1.0, text), int(text))
