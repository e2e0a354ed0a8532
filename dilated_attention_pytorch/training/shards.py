"""Sources as shards of tokens, made once and kept in a folder; a build that was stopped goes on where it was.

The folder has `corpus.json`; tokens in `00000.npy` and so on, which numpy maps; beside each the table of the documents
that end in it. A shard counts once `corpus.json` names it, with the place in the sources where the next one begins.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilated_attention_pytorch.core.files import (
    checksum,
    lock,
    parse_json,
    remove_leftovers,
    replace_file,
    replace_text,
)
from dilated_attention_pytorch.training.sources import DataSource, Part
from dilated_attention_pytorch.training.tokenizer import FILE, FileTokenizer, Tokenizer

META = "corpus.json"
FORMAT = 2  # of the folder; part of its name
SHARD = 1 << 24  # tokens of a shard, at least
_BATCH = 1 << 22  # bytes of text that are tokenised at a time
AGAIN = "remove the folder, it will be built again"
# The key is the first eight bytes of the SHA-256 of the text; of a long one, of its parts.
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("key", "<u8"), ("kept", "?")])
Progress = Callable[[int, int], object]  # bytes of the sources read so far, and of all


class _Builder:
    def __init__(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        self.folder = folder
        names = ("digest", "end_token", "vocab_size")
        self.meta: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
        # Where the next shard begins: the source, the place in it, and the document that is not yet ended.
        self.meta |= {"shards": [], "left_out": {}, "complete": False}
        self.meta |= {"next": {"source": 0, "at": 0, "tokens": 0, "bytes": 0, "digest": ""}}
        if (folder / META).is_file():
            self.meta = read_meta(folder)
        self.place = self.meta["next"]
        self.tokens: list[NDArray[Any]] = []
        self.rows: list[tuple[int, int, int, bool]] = []

    def read(self, sources: Sequence[DataSource], tokenizer: Tokenizer, field: str, progress: Progress) -> None:
        sizes = [source.identity()[1] for source in sources]
        batch: list[tuple[Part, DataSource, int]] = []
        held, first = 0, self.place["source"]
        for number in range(first, len(sources)):
            source, identity = sources[number], sources[number].identity()
            at = seen = self.place["at"] if number == first else 0
            for part in source.parts(at, field):
                batch.append((part, source, number))
                held, seen = held + len(part.data), seen + len(part.data)
                if held >= _BATCH or len(batch) >= _BATCH >> 8:
                    self.take(batch, tokenizer)
                    batch, held = [], 0
                    progress(sum(sizes[:number]) + min(seen, sizes[number]), sum(sizes))
            if source.identity() != identity:
                raise ValueError(f"expected {source.path} to stay as it is while it is read, but it changed")
        self.take(batch, tokenizer)
        progress(sum(sizes), sum(sizes))

    def take(self, batch: Sequence[tuple[Part, DataSource, int]], tokenizer: Tokenizer) -> None:
        place = self.place
        end: NDArray[Any] = np.array([tokenizer.end_token], tokenizer.dtype)
        found = tokenizer.encode([part.data for part, *_ in batch])
        for (part, source, number), tokens in zip(batch, found, strict=True):
            digest = hashlib.sha256(bytes.fromhex(place["digest"]) + part.data).hexdigest()
            place |= {"source": number, "at": part.after, "bytes": place["bytes"] + len(part.data), "digest": digest}
            if part.left_out:
                files = self.meta["left_out"].setdefault(part.left_out, {"number": 0, "first": []})
                files |= {"number": files["number"] + 1, "first": [*files["first"], str(source.path)][:3]}
            elif part.ends and place["bytes"]:
                tokens = np.append(tokens, end)
            place["tokens"] += tokens.size
            self.tokens.append(tokens)
            if part.ends:
                if place["tokens"]:
                    self.rows.append((place["tokens"], place["bytes"], int(digest[:16], 16), not part.left_out))
                place |= {"tokens": 0, "bytes": 0, "digest": ""}
        if sum(tokens.size for tokens in self.tokens) >= SHARD:
            self.commit()

    def commit(self, complete: bool = False) -> None:
        """Write what is held as a shard, and then name it."""
        if any(tokens.size for tokens in self.tokens):
            name = f"{len(self.meta['shards']):05}.npy"
            _save(self.folder / name, np.concatenate(self.tokens))
            self.add(name)
        self.meta["complete"] = complete
        sealed = self.meta | {"crc32": zlib.crc32(json.dumps(self.meta).encode())}
        replace_text(self.folder / META, json.dumps(sealed, indent=1) + "\n")
        self.tokens, self.rows = [], []

    def add(self, name: str) -> None:
        table = self.folder / documents_of(len(self.meta["shards"]))
        _save(table, np.array(self.rows, DOCUMENT))
        sums = [checksum(self.folder / name), checksum(table)]
        self.meta["shards"].append({"file": name, "crc32": sums})

    def map(self, source: DataSource) -> None:
        """Take a file of tokens as a shard and a document, where it is. A token counts as a byte of text."""
        tokens = map_tokens(source.path)
        if int(tokens.min(initial=0)) < 0:
            raise ValueError(f"expected tokens of at least 0 in {source.path}, got {int(tokens.min())}")
        self.meta["vocab_size"] = max(self.meta["vocab_size"] or 0, 1 + int(tokens.max(initial=0)))
        digest = hashlib.sha256(checksum(source.path).to_bytes(4, "big")).hexdigest()
        self.rows = [(tokens.size, tokens.size, int(digest[:16], 16), True)]
        self.add(str(source.path.resolve()))


def build(
    folder: Path, sources: Sequence[DataSource], tokenizer: Tokenizer | None, field: str, progress: Progress
) -> None:
    """Make the shards of the sources in a folder, or what is missing of them; another process at it is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):
        remove_leftovers(folder)
        if isinstance(tokenizer, FileTokenizer):
            shutil.copyfile(tokenizer.path, folder / FILE)
        builder = _Builder(folder, tokenizer)
        if not builder.meta["complete"]:
            if all(source.read is None for source in sources):
                for source in sources:
                    builder.map(source)
            else:
                assert tokenizer is not None
                builder.read(sources, tokenizer, field, progress)
            builder.commit(complete=True)


def map_tokens(path: Path) -> NDArray[Any]:
    """The tokens of a `.npy` file, not read but mapped; a ValueError says what else the file holds."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"expected an array of tokens in {path}, got: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"expected ints (tokens,) in {path}, got {tokens.dtype} {tokens.shape}")
    return tokens  # type: ignore[no-any-return]


def read_meta(folder: Path) -> dict[str, Any]:
    """What `corpus.json` says; a ValueError where that is not what was written."""
    path = folder / META
    try:
        meta: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if meta.pop("crc32") != zlib.crc32(json.dumps(meta).encode()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected {path} to describe a corpus, got {type(error).__name__}; {AGAIN}") from error
    return meta


def documents_of(number: int) -> str:
    """The file with the documents that end in a shard."""
    return f"{number:05}.documents.npy"


def _save(path: Path, array: NDArray[Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:  # a path would get another ending
            np.save(stream, array)

    replace_file(path, write)
