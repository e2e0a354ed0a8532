"""Text for the examples: the bytes of Python's own standard library, which every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256


def standard_library(num_bytes: int = 1_000_000) -> Tensor:
    """The first bytes of the library's modules, in the order of their names."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= num_bytes:
            break
    return torch.frombuffer(found[:num_bytes], dtype=torch.uint8)


class Excerpts(torch.utils.data.Dataset):
    """Excerpts of `length + 1` bytes at fixed places: `(tokens, the tokens that follow them)`."""

    def __init__(self, text: Tensor, length: int, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.text, self.length = text, length
        self.starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        here = self.text[self.starts[i] : self.starts[i] + self.length + 1].long()
        return here[:-1], here[1:]
