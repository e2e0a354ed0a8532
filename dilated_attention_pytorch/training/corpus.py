"""A folder of text as two memory-mapped byte streams, built once and kept under a fingerprint of its content.

One zero byte follows each document and occurs nowhere else: files that hold one, or that are not UTF-8, are skipped as
binary. The hash of a document's bytes decides its split, so copies of a file never stand on both sides; equal files are
kept once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BOUNDARY = 0
_FORMAT = 1  # of the cached files; part of their fingerprint
_SPLITS = ("train", "val")

# Tests, and parts of the standard library that some systems ship apart or not at all: without them the corpus differs
# little between machines. The build data names the machine that Python was built on.
_NOT_EVERYWHERE = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
)
_BUILD_DATA = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """The two splits of a corpus.

    Attributes:
        fingerprint: of the documents and the split; names and places of files do not enter.
        train: uint8 `(bytes,)`, a read-only memory map.
        val: the same, for validation.
        documents: numbers of documents per split and of files left out: keys "train", "val", "copies", "binary".
    """

    fingerprint: str
    train: NDArray[np.uint8]
    val: NDArray[np.uint8]
    documents: dict[str, int]

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Open a corpus that `build_corpus` left in `folder`.

        Raises:
            ValueError: a damaged file.
        """
        path = folder / "corpus.json"
        again = "remove the folder, it will be built again"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, documents = str(meta["fingerprint"]), dict(meta["documents"])
            wanted = [int(meta["bytes"][split]) for split in _SPLITS]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"expected {path} to describe a corpus, got {type(error).__name__}; {again}") from error
        paths = [folder / f"{split}.bin" for split in _SPLITS]
        for file, size in zip(paths, wanted, strict=True):
            if file.stat().st_size != size:
                raise ValueError(f"expected {size} bytes in {file}, got {file.stat().st_size}; {again}")
        train, val = (np.memmap(file, dtype=np.uint8, mode="r") for file in paths)
        return cls(fingerprint, train, val, documents)


class _Document(NamedTuple):
    path: Path
    digest: str
    size: int


def standard_library() -> Iterator[Path]:
    """The `.py` files of Python's standard library.

    Left out: `test` and `tests` folders, idlelib, tkinter, turtledemo, lib2to3, ensurepip, installed packages and build
    data.
    """
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
    documents, counts = _scan(_files(folder, suffixes))
    splits: dict[str, list[_Document]] = {"train": [], "val": []}
    for document in documents:
        splits["val" if int(document.digest[:8], 16) < val_fraction * 2**32 else "train"].append(document)
    for split, chosen in splits.items():
        if not chosen:
            raise ValueError(
                f"expected text files in both splits of {folder or 'the standard library'}, got none in {split!r}: "
                f"{len(documents)} different text files, {counts['binary']} binary, val_fraction {val_fraction}; "
                "give more files or another fraction"
            )
    key = hashlib.sha256(repr((_FORMAT, [(s, [d.digest for d in ds]) for s, ds in splits.items()])).encode())
    fingerprint = key.hexdigest()[:32]
    place = (Path(cache) if cache is not None else default_cache()) / fingerprint
    if not (place / "corpus.json").is_file():
        counts |= {split: len(chosen) for split, chosen in splits.items()}
        _write(place, fingerprint, splits, counts)
    return Corpus.load(place)


def _files(folder: Path | str | None, suffixes: Sequence[str]) -> Iterator[Path]:
    if folder is None:
        return standard_library()
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"expected a folder of text, found nothing at {folder}")
    return iter([folder]) if folder.is_file() else _walk(folder, suffixes)


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(parent, name)
            wanted = not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes)))
            if wanted and path.is_file() and not path.is_symlink():
                yield path


def _scan(paths: Iterator[Path]) -> tuple[list[_Document], dict[str, int]]:
    """The distinct documents in the order of their hashes, and the numbers of files left out."""
    found: dict[str, _Document] = {}
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
            found.setdefault(digest, _Document(path, digest, len(data)))
    return [found[digest] for digest in sorted(found)], counts


def _write(place: Path, fingerprint: str, splits: dict[str, list[_Document]], counts: dict[str, int]) -> None:
    """Write beside the final place and move the folder there whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{fingerprint}.", dir=place.parent))
    try:
        sizes: dict[str, int] = {}
        for split, documents in splits.items():
            with (temporary / f"{split}.bin").open("wb") as stream:
                for document in documents:
                    data = document.path.read_bytes()
                    if hashlib.sha256(data).hexdigest() != document.digest:
                        raise ValueError(f"expected {document.path} to stay as it is while it is read, but it changed")
                    stream.write(data + bytes([BOUNDARY]))
            sizes[split] = sum(d.size + 1 for d in documents)
        meta: dict[str, Any] = {"fingerprint": fingerprint, "bytes": sizes, "documents": counts}
        (temporary / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:  # another process was first, and wrote the same under this fingerprint
            if not (place / "corpus.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
