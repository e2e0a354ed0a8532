"""A folder of text as two memory-mapped byte streams, built once and kept by what it contains.

Each document is followed by one zero byte, which therefore never occurs inside a document: files that hold one, or
that are not UTF-8, are skipped as binary. A document goes to the held-out split or not by the hash of its bytes, so
copies of a file can never stand on both sides, and equal files are kept once.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUNDARY = 0
_FORMAT = 1  # of the cached files; part of their fingerprint
_SPLITS = ("train", "val")

# Parts of the standard library that a system may ship apart from the rest or not at all, and tests: without them the
# corpus differs little between machines. The build data names the machine Python was built on.
_NOT_EVERYWHERE = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
)
_BUILD_DATA = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """The two splits of a corpus.

    Attributes:
        fingerprint: of the documents and the split, whatever their names and places.
        train: uint8 `(bytes,)`, a read-only memory map.
        val: likewise, held out.
        documents: how many documents each split holds, and how many files were left out: keys "train", "val",
            "copies", "binary".
    """

    fingerprint: str
    train: NDArray[np.uint8]
    val: NDArray[np.uint8]
    documents: dict[str, int]

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Opens a corpus that `build_corpus` left in `folder`."""
        meta = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(folder / f"{split}.bin", dtype=np.uint8, mode="r") for split in _SPLITS)
        for split, stream in (("train", train), ("val", val)):
            if stream.size != meta["bytes"][split]:
                raise ValueError(
                    f"expected {meta['bytes'][split]} bytes in {folder / (split + '.bin')}, got {stream.size}; "
                    "remove the folder, it will be built again"
                )
        return cls(meta["fingerprint"], train, val, meta["documents"])


@dataclass(frozen=True)
class _Document:
    path: Path
    digest: str
    size: int

    def is_held_out(self, val_fraction: float) -> bool:
        return int(self.digest[:8], 16) < val_fraction * 2**32


def standard_library() -> Iterator[Path]:
    """The sources of Python's standard library: every `.py` file but tests, build data and what systems ship apart.

    Left out: `test` and `tests` folders, idlelib, tkinter, turtledemo, lib2to3, ensurepip, installed packages.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, (".py",)):
        if not _NOT_EVERYWHERE.intersection(path.relative_to(root).parts) and not path.name.startswith(_BUILD_DATA):
            yield path


def default_cache() -> Path:
    """Where corpora are kept: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dilated-attention-pytorch" / "corpora"


def build_corpus(
    folder: Path | str | None = None,
    *,
    suffixes: Sequence[str] = (),
    val_fraction: float = 0.05,
    cache: Path | str | None = None,
) -> Corpus:
    """The corpus of a folder, built if the cache does not hold it.

    The folder is read once to know its content; hidden files and folders and symbolic links are not followed. The
    order of the documents follows from their content too, so equal contents give equal streams anywhere.

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
    splits = {
        "train": [d for d in documents if not d.is_held_out(val_fraction)],
        "val": [d for d in documents if d.is_held_out(val_fraction)],
    }
    for split, chosen in splits.items():
        if not chosen:
            raise ValueError(
                f"expected text files in both splits of {folder or 'the standard library'}, got none in {split!r}: "
                f"{len(documents)} different text files, {counts['binary']} binary, val_fraction {val_fraction}; "
                "give more files or another val_fraction"
            )
    key = hashlib.sha256(repr((_FORMAT, [(s, [d.digest for d in ds]) for s, ds in splits.items()])).encode())
    fingerprint = key.hexdigest()[:32]
    root = Path(cache) if cache is not None else default_cache()
    place = root / fingerprint
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
    """The different documents in the order of their hashes, and what was left out."""
    found: dict[str, _Document] = {}
    counts = {"copies": 0, "binary": 0}
    for path in paths:
        data = path.read_bytes()
        if not data:
            continue
        if not _is_text(data):
            counts["binary"] += 1
            continue
        digest = hashlib.sha256(data).hexdigest()
        counts["copies"] += digest in found
        found.setdefault(digest, _Document(path, digest, len(data)))
    return [found[digest] for digest in sorted(found)], counts


def _is_text(data: bytes) -> bool:
    try:
        return BOUNDARY not in data and data.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


def _write(place: Path, fingerprint: str, splits: dict[str, list[_Document]], counts: dict[str, int]) -> None:
    """Writes beside the final place and moves it there whole: an interruption leaves no half of a corpus."""
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
                    stream.write(data)
                    stream.write(bytes([BOUNDARY]))
            sizes[split] = sum(d.size + 1 for d in documents)
        meta: dict[str, Any] = {"fingerprint": fingerprint, "bytes": sizes, "documents": counts}
        (temporary / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:  # another process was first; by the fingerprint's nature it wrote the same
            if not (place / "corpus.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
