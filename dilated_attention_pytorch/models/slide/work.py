"""The work of a run: which files are slides, in which batches they go, and to which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dilated_attention_pytorch.models.slide.files import SlideReader

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = tuple[Path, ...]


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None  # the default one where there are several

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


class Outcome(NamedTuple):
    """What came of a slide.

    Attributes:
        name: of the slide.
        tiles: how many; 0 where that is not known.
        problem: why nothing was written; None for a slide that was.
        said: what was done with the coordinates.
        doubts: what looks wrong, a line each.
        was_there: whether an earlier run wrote it.
    """

    name: str
    tiles: int = 0
    problem: str | None = None
    said: str = ""
    doubts: tuple[str, ...] = ()
    was_there: bool = False


class Scan(NamedTuple):
    """Slides and their tiles, longest first, and the outcomes of those that cannot be read."""

    sizes: dict[Path, int]
    failed: list[Outcome]


def scan(paths: Sequence[Path], reader: SlideReader) -> Scan:
    """Count the tiles of every file, without reading them."""
    sizes: dict[Path, int] = {}
    failed: list[Outcome] = []
    taken: dict[str, list[Path]] = {}
    for path in paths:
        taken.setdefault(path.stem, []).append(path)
    for name, same in taken.items():
        if len(same) > 1:
            names = ", ".join(path.name for path in same)
            failed.append(Outcome(name, problem=f"expected one file of this slide, got {names}"))
            continue
        try:
            sizes[same[0]] = reader.count(same[0])
        except Exception as error:  # half a file can raise anything
            failed.append(Outcome(name, problem=reason(error)))
    longest_first = dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0].name)))
    return Scan(longest_first, failed)


def batches_of(sizes: dict[Path, int], tokens: int) -> list[Batch]:
    """Neighbours by length, as many as fit in `tokens` with padding and a cls token each; at least one."""
    batches: list[list[Path]] = []
    for path in sizes:
        last = batches[-1] if batches else []
        if last and (len(last) + 1) * (sizes[last[0]] + 1) <= tokens:  # the first is the longest
            last.append(path)
        else:
            batches.append([path])
    return [tuple(batch) for batch in batches]


def deal(batches: Sequence[Batch], sizes: dict[Path, int], ranks: int) -> list[list[Batch]]:
    """Batches for each rank: the next longest goes to the rank with the least to do."""
    work = [0] * ranks
    hands: list[list[Batch]] = [[] for _ in range(ranks)]
    for batch in batches:
        least = work.index(min(work))
        hands[least].append(batch)
        work[least] += sum(sizes[path] for path in batch)
    return hands


def reason(error: BaseException) -> str:
    """An error in one line; the library's own as they are."""
    text = (str(error).strip().splitlines() or ["no reason given"])[0]
    return text if text.startswith("expected ") else f"{type(error).__name__}: {text}"
