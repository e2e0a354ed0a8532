"""What a message shows of a value: the one place through which given values get into messages, cut where they are long.

`tests/project/test_messages.py` holds every `raise` of the package to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

import torch
from torch import Tensor

_LONGEST = 200  # characters of a value
_MOST_BITS = 400  # of an int that is written out


def shown(value: object) -> str:
    """A value with its type; of a tensor the dtype in its place."""
    kind = type(value).__name__
    return f"{kind} of {value.dtype}" if isinstance(value, Tensor) else f"{kind} {quoted(value)}".rstrip()


def quoted(value: object) -> str:
    """A value as Python writes it, a path or device as the user does; "" where it cannot be written."""
    if isinstance(value, int) and abs(value) >> _MOST_BITS:  # more digits than Python prints
        return f"an int of {value.bit_length()} bits"
    try:
        return _cut(str(value) if isinstance(value, PurePath | torch.device) else repr(value))
    except Exception:  # a repr that is broken
        return ""


def listed(parts: Iterable[object], separator: str = ", ", most: int = 5) -> str:
    """The parts of a message that come from the user's data; of many the first few, and how many more there are."""
    texts = [quoted(part) if isinstance(part, int) else _cut(str(part)) for part in parts]
    few = texts if len(texts) <= most + 1 else [*texts[:most], f"and {len(texts) - most:,} more"]
    return separator.join(few)


def line(message: str) -> str:
    """A message in one line for a terminal, each of its words cut."""
    return " ".join(_cut(word) for part in message.splitlines() for word in part.split(" "))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
