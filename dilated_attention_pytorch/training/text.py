"""Text from a byte model, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Unpack

import torch

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.models.generation import Sampling
from dilated_attention_pytorch.training.corpus import BOUNDARY


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
    return _decode(int(token) for token in pieces)


def write_text(model: LongNetLM, prompt: str, max_bytes: int, **sampling: Unpack[Sampling]) -> str:
    """The prompt and its continuation; arguments as in `byte_stream`."""
    return prompt + "".join(byte_stream(model, prompt, max_bytes, **sampling))


def _decode(tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == BOUNDARY:
            break
        if piece := decoder.decode(bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
