"""Where text comes from: files, records in files, tokens; read in parts, from any place on.

A document is a file of text, a row of jsonl, parquet or a dataset of Hugging Face, or a sequence of FASTA. Its parts
are small, so no file has to fit into memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import importlib
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from dilated_attention_pytorch.core.files import parse_json
from dilated_attention_pytorch.core.messages import quoted

BOUNDARY = 0  # the byte that ends a document of bytes; no text holds it
PART = 1 << 20  # bytes of a part of a file, at most
_END = 1 << 62  # past every file's
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1b"))

# Tests, and parts of the standard library that some systems ship apart or not at all: without them the corpus differs
# little between machines. The build data names the machine that Python was built on.
_NOT_EVERYWHERE = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
)
_BUILD_DATA = "_sysconfigdata"


class Part(NamedTuple):
    """A stretch of a document."""

    data: bytes  # UTF-8, whole characters
    ends: bool  # whether the document ends here
    after: int  # where its source goes on: a byte of the file as it is read, or a row
    left_out: str = ""  # why the document is none: "binary", "Latin-1" or "UTF-16"


Stretch = tuple[bytes, bool, int]  # the first three of a Part, not yet looked at


@dataclass(frozen=True)
class DataSource:
    """A file, or a data set by name."""

    path: Path
    read: Callable[[Path, int, str], Iterator[Stretch]] | None  # None of tokens, which are mapped

    def parts(self, at: int, field: str) -> Iterator[Part]:
        """The parts from a place on; `field` is that of records."""
        assert self.read is not None
        try:
            for data, ends, after in self.read(self.path, at, field):
                reason = _why_not(data)
                yield Part(data, ends, after) if not reason else Part(b"", True, after if ends else _END, reason)
                if reason and not ends:
                    return
        except (ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            if str(self.path) in str(error):
                raise
            raise ValueError(f"expected {self.path} to be what its name and start say, got: {error}") from error

    def identity(self) -> tuple[str, int, int]:
        """What changes when the content does, without reading it: path, size and time of the last change."""
        if not self.path.exists():  # of a hub
            return str(self.path), 0, 0
        stats = [path.stat() for path in (self.path, *self.path.rglob("*"))]
        return str(self.path.resolve()), sum(x.st_size for x in stats), max(x.st_mtime_ns for x in stats)


def needed(module: str, package: str, how: str = "'dilated-attention-pytorch[data]'") -> Any:
    """An optional module, or an ImportError that says how to get its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"expected {package}, which is not installed: pip install {how}") from error


def standard_library() -> Iterator[Path]:
    """The `.py` files of Python's standard library, without tests and the parts that some systems do not have."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, (".py",)):
        if not _NOT_EVERYWHERE.intersection(path.relative_to(root).parts) and not path.name.startswith(_BUILD_DATA):
            yield path


def find_sources(data: Path | str | None, suffixes: Sequence[str] = ()) -> list[DataSource]:
    """The sources of a data set, in the order of a walk through the folder; `build_corpus` has the arguments."""
    if data is None:  # in the order that the demo's figures were measured in
        hashed = sorted((hashlib.sha256(path.read_bytes()).digest(), path) for path in standard_library())
        return [DataSource(path, _text) for _, path in hashed]
    if str(data).startswith("hf:"):
        return [DataSource(Path(str(data)), _hugging_face)]
    root = Path(data)
    if not root.exists():
        raise FileNotFoundError(f"expected a folder of text, found nothing at {root}")
    if any((root / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):  # of save_to_disk
        return [DataSource(root, _hugging_face)]
    paths = list(_walk(root, suffixes))
    if paths and all(path.suffix.lower() == ".npy" for path in paths):
        return [DataSource(path, None) for path in paths]
    names = [path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".xz") else path for path in paths]
    return [DataSource(path, _READERS.get(name.suffix.lower(), _text)) for path, name in zip(paths, names, strict=True)]


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


def _open(path: Path) -> IO[bytes]:
    """A file, decompressed by what it begins with."""
    with path.open("rb") as stream:
        head = stream.read(8)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)
    return opener(path, "rb")


def _why_not(data: bytes) -> str:
    """Why bytes are no text; empty if they are."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if BOUNDARY in data:
        return "binary"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "binary" if data.translate(None, _CONTROLS) != data else "Latin-1"
    return ""


def _text(path: Path, at: int, field: str) -> Iterator[Stretch]:
    """Stretches that end with a line where there is one; the same ones from whichever of their ends they begin."""
    with _open(path) as stream:
        stream.seek(at)
        block = stream.read(PART + 1)
        if at == 0 and block.startswith(codecs.BOM_UTF8):  # a mark of editors, no text
            at, block = 3, block[3:] + stream.read(3)
        while len(block) > PART:
            cut = block.rfind(b"\n", 0, PART) + 1
            if cut == 0:
                cut = PART
                while cut > PART - 4 and block[cut] & 0xC0 == 0x80:  # within a character
                    cut -= 1
            at += cut
            yield block[:cut], False, at
            block = block[cut:] + stream.read(cut)
        yield block, True, at + len(block)


def _jsonl(path: Path, at: int, field: str) -> Iterator[Stretch]:
    with _open(path) as stream:
        stream.seek(at)
        while line := stream.readline():
            where, at = f"the line at byte {at:,}", at + len(line)
            if not line.strip():
                continue
            try:
                record = parse_json(line.decode())
            except ValueError as error:
                raise ValueError(f"expected JSON in {where} of {path}, got {error}") from error
            _check_field(path, field, sorted(record) if isinstance(record, dict) else [])
            yield _encoded(record[field], path, where), True, at


def _parquet(path: Path, at: int, field: str) -> Iterator[Stretch]:
    with needed("pyarrow.parquet", "pyarrow").ParquetFile(path) as file:
        _check_field(path, field, file.schema_arrow.names)
        rows = (value.as_py() for batch in file.iter_batches(256, columns=[field]) for value in batch.column(0))
        for number, value in enumerate(islice(rows, at, None), at):
            yield _encoded(value, path, f"row {number:,}"), True, number + 1


def _hugging_face(path: Path, at: int, field: str) -> Iterator[Stretch]:
    datasets = needed("datasets", "datasets")
    if path.exists():
        rows = datasets.load_from_disk(str(path))
        rows = rows["train"] if hasattr(rows, "keys") else rows
    else:
        name, _, config = str(path).removeprefix("hf:").partition(":")
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
    if rows.column_names is not None:  # a stream may not know them
        _check_field(path, field, rows.column_names)
    for number, row in enumerate(rows.skip(at) if at != getattr(rows, "num_rows", -1) else (), at):
        yield _encoded(row[field], path, f"row {number:,}"), True, number + 1


def _fasta(path: Path, at: int, field: str) -> Iterator[Stretch]:
    """Sequences without their headers and line ends."""
    with _open(path) as stream:
        stream.seek(at)
        held = b""
        while line := stream.readline(PART):
            header = line.removeprefix(codecs.BOM_UTF8).startswith((b">", b";"))
            if at == 0 and not header:
                raise ValueError(f"expected FASTA in {path}, got a first line without >")
            if (header and at) or len(held) >= PART:
                yield held, header, at
                held = b""
            at += len(line)
            held += b"" if header else line.strip()
        yield held, True, at


def _check_field(path: Path, field: str, known: Sequence[str]) -> None:
    if field not in known:
        raise ValueError(f"expected field to name one of {known} in {path}, got {quoted(field)}")


def _encoded(value: object, path: Path, where: str) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"expected text in {where} of {path}, got {type(value).__name__}")
    return value.encode("utf-8", "replace")  # a lone surrogate is no character


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
_READERS |= dict.fromkeys((".fa", ".fasta", ".fna", ".faa", ".ffn"), _fasta)
