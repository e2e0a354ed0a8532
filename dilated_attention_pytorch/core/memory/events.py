"""A pool's events as JSON lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dilated_attention_pytorch.core.memory.blocks import Place
from dilated_attention_pytorch.core.memory.handle import Ticket

_VERSION = 1


class EventLog:
    """Writes events; called with the pool's lock held."""

    def __init__(self, path: str | os.PathLike[str], strategy: str, limit: int | None) -> None:
        self.path = Path(path)
        self._file = self.path.open("w", encoding="utf-8", buffering=1)  # a fork copies no half-written line
        self._begun = time.perf_counter()
        self._streams: dict[Hashable, int] = {None: 0}
        self._write(event="begin", version=_VERSION, strategy=strategy, limit=limit)

    def borrow(self, ticket: Ticket, place: Place, *, hit: bool, waited: bool) -> None:
        """A block was lent."""
        self._write(
            event="borrow",
            id=ticket.number,
            bytes=ticket.size,
            device=str(place.device),
            pinned=place.pinned,
            purpose=ticket.purpose,
            stream=self._number(ticket.stream),
            hit=hit,
            waited=waited,
        )

    def release(self, ticket: Ticket, streams: Iterable[Hashable] | None) -> None:
        """A block came back; from a dropped handle without streams."""
        numbers = None if streams is None else sorted({self._number(stream) for stream in streams})
        self._write(event="release", id=ticket.number, streams=numbers)

    def trim(self) -> None:
        """The pool was trimmed."""
        self._write(event="trim")

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _number(self, stream: Hashable) -> int:
        return self._streams.setdefault(stream, len(self._streams))

    def _write(self, **fields: Any) -> None:
        fields["us"] = round((time.perf_counter() - self._begun) * 1e6)
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")


class Event(NamedTuple):
    """One line of a recording.

    Attributes:
        kind: "borrow", "release" or "trim".
        number: the block's.
        size: bytes asked for.
        device: as recorded.
        pinned: whether host memory was page-locked.
        purpose: as recorded.
        streams: small numbers; of a borrow one.
    """

    kind: str
    number: int = -1
    size: int = 0
    device: str = ""
    pinned: bool = False
    purpose: str = ""
    streams: tuple[int, ...] = ()


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a recording.

    Raises:
        ValueError: a file that is none.
    """
    return list(_parsed(Path(path)))


def _parsed(path: Path) -> Iterator[Event]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            kind = fields["event"]
            if number == 1:
                if kind != "begin" or fields["version"] != _VERSION:
                    raise ValueError(f"expected a recording of version {_VERSION}")
            elif kind == "borrow":
                place = fields["device"], bool(fields["pinned"])
                yield Event(kind, fields["id"], fields["bytes"], *place, fields["purpose"], (fields["stream"],))
            elif kind == "release":
                yield Event(kind, fields["id"], streams=tuple(fields["streams"] or ()))
            elif kind == "trim":
                yield Event(kind)
            else:
                raise ValueError(f"expected an event 'borrow', 'release' or 'trim', got {kind!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of a pool's recording ({error})") from error
