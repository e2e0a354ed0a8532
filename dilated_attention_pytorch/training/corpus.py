"""A folder of text as two memory-mapped byte streams, built once and kept under a fingerprint of its content.

One zero byte follows each document and occurs nowhere else: files that hold one, or that are not UTF-8, are skipped as
binary. The hash of a document's bytes decides its split, so copies of a file never stand on both sides; equal files are
kept once.

An *excerpt* is `context + 1` consecutive bytes: `context` inputs and the byte after each. The excerpts of a step are a
pure function of seed and step, a rank's share of them one of the rank: a run that is resumed, or spread over another
number of ranks, reads the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dilated_attention_pytorch.core.files import parse_json

BOUNDARY = 0
_FORMAT = 1  # of the cached files; part of their fingerprint
_SPLITS = ("train", "val")
Splits = dict[str, list[tuple[str, Path]]]  # hash and place of each document

# Tests, and parts of the standard library that some systems ship apart or not at all: without them the corpus differs
# little between machines. The build data names the machine that Python was built on.
_NOT_EVERYWHERE = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
)
_BUILD_DATA = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """The two splits of a corpus."""

    fingerprint: str  # of the documents and the split; names and places of files do not enter
    train: NDArray[np.uint8]  # (bytes,), a read-only memory map
    val: NDArray[np.uint8]  # the same, for validation
    documents: dict[str, int]  # documents per split ("train", "val") and files left out ("copies", "binary")

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Open a corpus that `build_corpus` left in `folder`; a ValueError names a damaged file."""
        path = folder / "corpus.json"
        again = "remove the folder, it will be built again"
        try:
            meta = parse_json(path.read_text(encoding="utf-8"))
            fingerprint = str(meta["fingerprint"])
            documents = {name: int(meta["documents"][name]) for name in (*_SPLITS, *meta["documents"])}
            wanted = [int(meta["bytes"][split]) for split in _SPLITS]
            sums = [int(meta.get("crc32", {}).get(split, -1)) for split in _SPLITS]  # older ones have none
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected {path} to describe a corpus, got {type(error).__name__}; {again}") from error
        paths = [folder / f"{split}.bin" for split in _SPLITS]
        for file, size in zip(paths, wanted, strict=True):
            if file.stat().st_size != size:
                raise ValueError(f"expected {size} bytes in {file}, got {file.stat().st_size}; {again}")
        train, val = (np.memmap(file, dtype=np.uint8, mode="r") for file in paths)
        for file, stream, want in zip(paths, (train, val), sums, strict=True):
            found = zlib.crc32(stream.data)
            if want not in (found, -1):
                raise ValueError(f"expected bytes of CRC-32 {want} in {file}, got {found}; {again}")
        return cls(fingerprint, train, val, documents)


def standard_library() -> Iterator[Path]:
    """The `.py` files of Python's standard library, without tests and the parts that some systems do not have."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, (".py",)):
        if not _NOT_EVERYWHERE.intersection(path.relative_to(root).parts) and not path.name.startswith(_BUILD_DATA):
            yield path


def default_cache() -> Path:
    """The folder of all corpora, under `XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dilated-attention-pytorch" / "corpora"


def build_corpus(
    folder: Path | str | None = None,
    *,
    suffixes: Sequence[str] = (),
    val_fraction: float = 0.05,
    cache: Path | str | None = None,
) -> Corpus:
    """The corpus of a folder, built if the cache does not hold it.

    The folder is read once to know its content; hidden files, hidden folders and symbolic links are skipped. Documents
    stand in the order of their hashes, so equal contents give equal streams anywhere.

    Args:
        folder: any folder of text, or one text file; the standard library's sources when absent.
        suffixes: endings of the file names to take, such as `.md`; all files when empty.
        val_fraction: the share of documents to hold out, in (0, 1).
        cache: where to keep the result; `default_cache()` when absent.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a fraction out of range, or a split that came out empty.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"expected val_fraction in (0, 1), got {val_fraction}")
    if folder is not None and not Path(folder).exists():
        raise FileNotFoundError(f"expected a folder of text, found nothing at {Path(folder)}")
    documents, counts = _scan(standard_library() if folder is None else _walk(Path(folder), suffixes))
    splits: Splits = {"train": [], "val": []}
    for digest, path in documents:
        splits["val" if int(digest[:8], 16) < val_fraction * 2**32 else "train"].append((digest, path))
    for split, chosen in splits.items():
        if not chosen:
            raise ValueError(
                f"expected text files in both splits of {folder or 'the standard library'}, got none in {split!r}: "
                f"{len(documents)} different text files, {counts['binary']} binary, val_fraction {val_fraction}; "
                "give more files or another fraction"
            )
    names = repr((_FORMAT, [(split, [digest for digest, _ in chosen]) for split, chosen in splits.items()]))
    fingerprint = hashlib.sha256(names.encode()).hexdigest()[:32]
    place = (Path(cache) if cache is not None else default_cache()) / fingerprint
    if not (place / "corpus.json").is_file():
        counts |= {split: len(chosen) for split, chosen in splits.items()}
        _write(place, fingerprint, splits, counts)
    corpus = Corpus.load(place)
    if corpus.fingerprint != fingerprint:
        raise ValueError(
            f"expected {place / 'corpus.json'} to describe the corpus {fingerprint}, got {corpus.fingerprint}; "
            "remove the folder, it will be built again"
        )
    return corpus


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    if root.is_file():
        yield root
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(parent, name)
            wanted = not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes)))
            if wanted and path.is_file() and not path.is_symlink():
                yield path


def _scan(paths: Iterator[Path]) -> tuple[list[tuple[str, Path]], dict[str, int]]:
    """The distinct documents in the order of their hashes, and the numbers of files left out."""
    found: dict[str, Path] = {}
    counts = {"copies": 0, "binary": 0}
    for path in paths:
        data = path.read_bytes()
        try:
            is_text = BOUNDARY not in data and data.decode("utf-8") is not None
        except UnicodeDecodeError:
            is_text = False
        if not is_text:
            counts["binary"] += 1
        elif data:
            digest = hashlib.sha256(data).hexdigest()
            counts["copies"] += digest in found
            found.setdefault(digest, path)
    return sorted(found.items()), counts


def _write(place: Path, fingerprint: str, splits: Splits, counts: dict[str, int]) -> None:
    """Write beside the final place and move the folder there whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.TemporaryDirectory(prefix=f".{fingerprint}.", dir=place.parent, ignore_cleanup_errors=True)
    with hidden as name:
        temporary = Path(name)
        sizes: dict[str, int] = {}
        sums = dict.fromkeys(splits, 0)
        for split, documents in splits.items():
            with (temporary / f"{split}.bin").open("wb") as stream:
                for digest, path in documents:
                    data = path.read_bytes()
                    if hashlib.sha256(data).hexdigest() != digest:
                        raise ValueError(f"expected {path} to stay as it is while it is read, but it changed")
                    data += bytes([BOUNDARY])
                    stream.write(data)
                    sums[split] = zlib.crc32(data, sums[split])
                sizes[split] = stream.tell()
        meta: dict[str, Any] = {"fingerprint": fingerprint, "bytes": sizes, "crc32": sums, "documents": counts}
        (temporary / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:  # another process was first, and wrote the same under this fingerprint
            if not (place / "corpus.json").is_file():
                raise


def training_excerpts(
    stream: NDArray[np.uint8], *, context: int, seed: int, step: int, batch_size: int, first: int = 0, count: int = -1
) -> Tensor:
    """Some of the excerpts of one step.

    An epoch cuts the stream, from a random start, into excerpts whose inputs do not overlap, and takes each once in
    random order. So the excerpts of a step share no bytes, unless it ends an epoch and begins the next.

    Args:
        stream: uint8 `(bytes,)`.
        context: inputs per excerpt.
        seed: of the order.
        step: from 0.
        batch_size: excerpts per step, over all ranks.
        first: number of the first excerpt to return.
        count: number of excerpts; the rest of the step by default.

    Returns:
        int64 `(count, context + 1)`.

    Raises:
        ValueError: a stream shorter than two excerpts.
    """
    if stream.size < 2 * context + 1:
        raise ValueError(
            f"expected at least {2 * context + 1} bytes of training text for a context of {context}, got {stream.size}"
        )
    count = batch_size - first if count < 0 else count
    # One less than fit: the start may be any number below `context`.
    num_excerpts = (stream.size - 1) // context - 1
    rows, begin = [], step * batch_size + first
    for index in range(begin, begin + count):
        epoch, place = divmod(index, num_excerpts)
        start, order = _epoch(seed, epoch, num_excerpts, context)
        at = start + int(order[place]) * context
        rows.append(stream[at : at + context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def validation_excerpts(stream: NDArray[np.uint8], *, context: int, limit: int = 0) -> list[NDArray[np.uint8]]:
    """The fixed excerpts of every evaluation; their inputs do not overlap.

    Args:
        stream: uint8 `(bytes,)`.
        context: inputs per excerpt.
        limit: the most excerpts, spread evenly over the stream; 0 for all, the shorter last one included.

    Raises:
        ValueError: a stream without an excerpt.
    """
    if stream.size < 2:
        raise ValueError(f"expected at least 2 bytes of validation text, got {stream.size}")
    whole = (stream.size - 1) // context
    if limit <= 0 or limit >= whole:
        return [stream[begin : begin + context + 1] for begin in range(0, stream.size - 1, context)]
    begins = [index * whole // limit * context for index in range(limit)]
    return [stream[begin : begin + context + 1] for begin in begins]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_excerpts: int, context: int) -> tuple[int, NDArray[np.int64]]:
    # Keyed by both numbers: a later epoch needs no draw of the earlier ones.
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(context)), random.permutation(num_excerpts)
