"""Text as two streams of tokens, for training and for validation, kept under what it was made from.

The hash of a document's bytes decides its split, so copies never stand on both sides; equal documents are kept once.
Where documents are too few for that, each gives its end to validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilated_attention_pytorch.core.files import check_path, checksum
from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.core.validation import check_float, check_instance
from dilated_attention_pytorch.training import shards
from dilated_attention_pytorch.training.excerpts import TokenStream
from dilated_attention_pytorch.training.sources import find_sources
from dilated_attention_pytorch.training.tokenizer import FILE, Tokenizer, load_tokenizer

# Validation documents to expect, at least, for a split by documents: fewer are none too often.
_MANY = 8


@dataclass(frozen=True)
class Corpus:
    """The two splits of a corpus."""

    fingerprint: str  # of the documents, their order, the tokenizer and the split; names of files do not enter
    train: TokenStream  # (tokens,), memory-mapped
    val: TokenStream  # the same, for validation
    documents: dict[str, int]  # documents per split ("train", "val") and left out ("copies", "binary", "Latin-1", ..)
    left_out: dict[str, list[str]]  # the first files of each kind
    vocab_size: int
    end_token: int | None  # ends a document; None of tokens whose tokenizer is not known
    bytes_per_token: float  # of validation text, the ends of documents left out; 1 where only tokens are known
    folder: Path  # in the cache
    made_from: dict[str, Any] = field(default_factory=dict)  # arguments of `build_corpus`, in types that JSON has

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What the tokens were made with; None if that is not known."""
        if self.end_token is None:
            return None
        return load_tokenizer(self.folder if (self.folder / FILE).is_file() else "bytes")

    @classmethod
    def load(cls, folder: Path, val_fraction: float = 0.05) -> Corpus:
        """Open a corpus that `build_corpus` left in `folder`.

        Raises:
            ValueError: a damaged file, a build that was not ended, or no text in a split.
        """
        meta = shards.read_meta(folder)
        if not meta["complete"]:
            raise ValueError(f"expected a whole corpus in {folder}, got one whose build was stopped")
        maps, tables = [], [np.zeros(0, shards.DOCUMENT)]
        for number, shard in enumerate(meta["shards"]):
            files = folder / shard["file"], folder / shards.documents_of(number)
            for file, want in zip(files, shard["crc32"], strict=True):
                # The user's own tokens are known by size and time, as text is.
                if file.parent == folder and (found := checksum(file)) != want:
                    raise ValueError(f"expected bytes of CRC-32 {want} in {file}, got {found}; {shards.AGAIN}")
            maps.append(shards.map_tokens(files[0]))
            tables.append(np.load(files[1], allow_pickle=False))
        table: NDArray[Any] = np.concatenate(tables)
        ends = np.cumsum(table["tokens"])
        first = np.zeros(table.size, bool)
        first[np.unique(table["key"], return_index=True)[1]] = True
        kept = table["kept"] & first
        counts = {"copies": int((table["kept"] & ~first).sum()), "binary": 0}
        counts |= {kind: one["number"] for kind, one in meta["left_out"].items()}
        table, ends = table[kept], ends[kept]
        begins = ends - table["tokens"]
        cuts = _cuts(table, ends, val_fraction)
        for split, chosen in (("train", cuts > begins), ("val", cuts < ends)):
            counts[split] = int(chosen.sum())
            if not chosen.any():
                left = ", ".join(f"{n} {kind}" for kind, n in counts.items() if kind not in ("train", "val"))
                raise ValueError(
                    f"expected text in both splits, got none in {quoted(split)}: {table.size} different documents of "
                    f"{int(table['tokens'].sum())} tokens in all (left out: {left}), val_fraction {val_fraction}; "
                    "give more text or another fraction"
                )
        text = table[cuts < ends]
        ended = text.size if meta["end_token"] is not None else 0
        digest = hashlib.sha256(repr((shards.FORMAT, meta["digest"])).encode())
        for values in (table["key"], cuts - begins, ends - cuts):
            digest.update(np.ascontiguousarray(values).tobytes())
        return cls(
            fingerprint=digest.hexdigest()[:32],
            train=TokenStream(maps, np.stack([begins, cuts], 1)),
            val=TokenStream(maps, np.stack([cuts, ends], 1)),
            documents=counts,
            left_out={kind: one["first"] for kind, one in meta["left_out"].items()},
            vocab_size=meta["vocab_size"] or 0,
            end_token=meta["end_token"],
            bytes_per_token=float(text["bytes"].sum() / max(1, text["tokens"].sum() - ended)),
            folder=folder,
        )


def _cuts(table: NDArray[Any], ends: NDArray[np.int64], val_fraction: float) -> NDArray[np.int64]:
    """Where the training text of each document ends and its validation text begins."""
    chosen = (table["key"] >> np.uint64(32)) < val_fraction * 2**32
    if table.size * min(val_fraction, 1 - val_fraction) >= _MANY and 0 < chosen.sum() < table.size:
        return np.where(chosen, ends - table["tokens"], ends)
    return ends - (table["tokens"] * val_fraction).astype(np.int64)


def default_cache() -> Path:
    """The folder of all corpora, under `XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dilated-attention-pytorch" / "corpora"


def build_corpus(
    folder: Path | str | None = None,
    *,
    suffixes: Sequence[str] = (),
    val_fraction: float = 0.05,
    cache: Path | str | None = None,
    field: str = "text",
    tokenizer: Path | str = "bytes",
    progress: shards.Progress = lambda done, total: None,
) -> Corpus:
    """The corpus of a file or a folder, tokenised if the cache does not hold it.

    Documents keep the order of the files and of the records in them. Hidden files, hidden folders and symbolic links
    are skipped, and so is what is no text.

    Args:
        folder: text, jsonl, parquet, FASTA, each also compressed, by its name's ending; a folder of any of them; a
            folder of `datasets.save_to_disk`, or `hf:NAME` or `hf:NAME:CONFIG` of a hub (its split "train"); or `.npy`
            files of tokens, which are used where they are. The standard library's sources when absent.
        suffixes: endings of the file names to take, such as `.md`; all files when empty.
        val_fraction: the share of documents to hold out, in (0, 1); of each document, where there are few.
        cache: where to keep the result; `default_cache()` when absent.
        field: of records, the one with the text.
        tokenizer: `"bytes"`, or a `tokenizer.json` or a folder with one. Of `.npy` files it says what ends a document.
        progress: called with bytes read so far and bytes in all, now and then.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a fraction out of range, a split that came out empty, or a file that is not what its name says.
        TypeError: an argument of the wrong type.
        ImportError: a package of the extra `data` is not installed.
    """
    check_instance("suffixes", suffixes, list, tuple)
    texts = {"field": field} | {f"suffixes[{i}]": suffix for i, suffix in enumerate(suffixes)}
    for name, text in texts.items():
        check_instance(name, text, str)
    for name, path in (("folder", folder or ""), ("tokenizer", tokenizer)):
        check_path(name, path)
    if not 0.0 < check_float("val_fraction", val_fraction) < 1.0:
        raise ValueError(f"expected val_fraction in (0, 1), got {val_fraction}")
    sources = find_sources(folder, suffixes)
    mapped = bool(sources) and all(source.read is None for source in sources)
    # Of mapped tokens a tokenizer says what ends a document; bytes would not be theirs.
    coder = None if mapped and str(tokenizer) == "bytes" else load_tokenizer(tokenizer)
    made_from = repr((shards.FORMAT, coder and coder.digest, field, [source.identity() for source in sources]))
    place = Path(cache) if cache is not None else default_cache()
    place /= hashlib.sha256(made_from.encode()).hexdigest()[:32]
    if not ((place / shards.META).is_file() and shards.read_meta(place)["complete"]):
        shards.build(place, sources, coder, field, progress)
    local = folder is not None and not str(folder).startswith("hf:")
    made = {"folder": str(Path(str(folder)).absolute()) if local else folder, "field": field, "suffixes": [*suffixes]}
    made |= {"tokenizer": "bytes" if str(tokenizer) == "bytes" else str(Path(tokenizer).absolute())}
    try:
        return replace(Corpus.load(place, val_fraction), made_from=made | {"val_fraction": val_fraction})
    except FileNotFoundError as error:
        raise ValueError(f"expected the files of a corpus in {place}, got {error}; {shards.AGAIN}") from error
