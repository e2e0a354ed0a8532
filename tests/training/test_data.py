"""The corpus and the excerpts that a run reads from it."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dilated_attention_pytorch.training import (
    Corpus,
    build_corpus,
    shards,
    sources,
    standard_library,
    training_excerpts,
    validation_excerpts,
)
from dilated_attention_pytorch.training.excerpts import Stream, TokenStream


def write_files(folder: Path, count: int = 40) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"file{i}.txt": f"document {i}: ".encode() * (i + 3) for i in range(count)}
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return texts


def documents(stream: Stream) -> list[bytes]:
    content = np.asarray(stream).tobytes()
    assert content.endswith(b"\0")
    return content.split(b"\0")[:-1]


def test_every_text_is_in_one_split_by_its_hash(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    train, val = documents(corpus.train), documents(corpus.val)
    assert sorted(train + val) == sorted(texts.values())
    for split, held_out in ((train, False), (val, True)):
        for text in split:
            assert (int(hashlib.sha256(text).hexdigest()[:8], 16) < 0.3 * 2**32) == held_out


def test_the_fingerprint_of_a_text_stays(tmp_path: Path) -> None:
    """Another one would end the resume of every run that was started before."""
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    assert corpus.fingerprint == "503144ae292b002329a033f247e02f1e"


def test_files_keep_their_order(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    for stream in (corpus.train, corpus.val):
        names = {text: name for name, text in texts.items()}
        found = [names[text] for text in documents(stream)]
        assert len(found) > 8 and found == sorted(found)


def test_copies_binaries_hidden_files_and_links_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    texts = write_files(folder)
    plain = build_corpus(folder, val_fraction=0.3, cache=tmp_path / "cache")
    (folder / "sub").mkdir()
    (folder / "sub" / "copy.txt").write_bytes(texts["file3.txt"])
    (folder / "nul.bin").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "wide.txt").write_bytes("wide".encode("utf-16"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"config")
    (folder / "link.txt").symlink_to(folder / "file1.txt")
    corpus = build_corpus(folder, val_fraction=0.3, cache=tmp_path / "other")
    assert corpus.fingerprint == plain.fingerprint
    assert np.array_equal(corpus.train, plain.train)
    assert corpus.documents == plain.documents | {"copies": 1, "binary": 1, "Latin-1": 1, "UTF-16": 1}
    assert corpus.left_out["Latin-1"] == [str(folder / "latin.txt")]


def test_names_and_places_do_not_matter(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "a")
    for name in sorted(texts):
        path = tmp_path / "b" / "sub" / f"renamed {name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts[name])
    one, other = (build_corpus(tmp_path / x, val_fraction=0.3, cache=tmp_path / f"cache-{x}") for x in "ab")
    assert one.fingerprint == other.fingerprint
    assert np.array_equal(one.train, other.train) and np.array_equal(one.val, other.val)


def test_built_once_and_again_when_the_content_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "text")
    calls = []
    read = shards._Builder.read
    monkeypatch.setattr(shards._Builder, "read", lambda *a: calls.append(a) or read(*a))
    first = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    assert build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache").fingerprint == first.fingerprint
    assert build_corpus(tmp_path / "text", val_fraction=0.4, cache=tmp_path / "cache").fingerprint != first.fingerprint
    assert len(calls) == 1
    (tmp_path / "text" / "file0.txt").write_bytes(b"something else")
    assert build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache").fingerprint != first.fingerprint
    assert len(calls) == 2


@pytest.mark.parametrize("one_document", [True, False])
def test_a_build_that_was_stopped_goes_on(one_document: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped again and again, as by a kill: the shards that are there are not made again."""
    monkeypatch.setattr(sources, "PART", 100)
    monkeypatch.setattr(shards, "_BATCH", 200)
    monkeypatch.setattr(shards, "SHARD", 200)
    texts = write_files(tmp_path / "text", 12)
    if one_document:
        (tmp_path / "text" / "file0.txt").write_bytes(b"\n".join(texts.values()))
    whole = build_corpus(tmp_path / "text", cache=tmp_path / "whole")
    assert len(list(whole.folder.glob("0*.documents.npy"))) > 3
    saves: list[str] = []
    stops = 0
    replace = shards.replace_file

    def stop(path: Path, write: Callable[[Path], object]) -> None:
        saves.append(path.name)
        if len(saves) % 4 == 0:
            raise KeyboardInterrupt
        replace(path, write)

    monkeypatch.setattr(shards, "replace_file", stop)
    while True:
        try:
            corpus = build_corpus(tmp_path / "text", cache=tmp_path / "cache")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 1 and saves[:5] == [
        "00000.npy", "00000.documents.npy", "00001.npy", "00001.documents.npy", "00001.npy",
    ]  # fmt: skip
    assert corpus.fingerprint == whole.fingerprint
    assert np.array_equal(corpus.train, whole.train) and np.array_equal(corpus.val, whole.val)
    assert {path.name for path in corpus.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "text")
    identity = sources.DataSource.identity
    calls = iter(range(10**6))
    monkeypatch.setattr(sources.DataSource, "identity", lambda source: (*identity(source), next(calls)))
    with pytest.raises(ValueError, match=r"expected .*file0\.txt to stay as it is while it is read, but it changed"):
        build_corpus(tmp_path / "text", cache=tmp_path / "cache")


def test_suffixes_choose(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "text")
    (tmp_path / "text" / "page.md").write_bytes(b"another kind")
    corpus = build_corpus(tmp_path / "text", suffixes=(".txt",), val_fraction=0.3, cache=tmp_path / "cache")
    assert corpus.documents["train"] + corpus.documents["val"] == len(texts)


@pytest.mark.parametrize("name", ["00000.npy", "00000.documents.npy"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "absent"])
def test_a_damaged_cache_is_not_taken(name: str, damage: str, tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    data = bytearray((corpus.folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (corpus.folder / name).write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "absent":
        (corpus.folder / name).unlink()
    with pytest.raises(ValueError, match=rf"expected .*{name}.*; remove the folder, it will be built again"):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"crc32": 5}', '{"crc32": "many"}', '{"a":' * 100_000])
def test_a_damaged_description_is_named(text: str, tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    (corpus.folder / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected .*corpus\.json to describe a corpus, got .*; remove the folder"):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")


def test_no_number_of_a_description_can_change_unseen(tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    path = corpus.folder / "corpus.json"
    whole = path.read_text()
    for name in ("vocab_size", "end_token", "crc32", "at"):
        changed = re.sub(
            rf'("{name}": \[?\s*)(\d)', lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", whole, count=1
        )
        assert changed != whole
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"expected .*corpus\.json to describe a corpus, got ValueError"):
            Corpus.load(corpus.folder)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        build_corpus(tmp_path / "none", cache=tmp_path)
    with pytest.raises(ValueError, match=r"expected val_fraction in \(0, 1\), got 1"):
        build_corpus(tmp_path, val_fraction=1.0, cache=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer.json at .*, found none"):
        build_corpus(tmp_path, tokenizer=tmp_path / "none", cache=tmp_path)
    wrong: Any = [("suffixes", ".md"), ("suffixes", 3), ("suffixes", [3]), ("folder", 3), ("field", 3)]
    for name, value in [*wrong, ("tokenizer", None), ("val_fraction", True)]:
        with pytest.raises(TypeError, match=f"expected {name}.* to be .*, got"):
            build_corpus(**{"folder": tmp_path, "cache": tmp_path} | {name: value})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "only.txt").write_bytes(b"one")
    with pytest.raises(
        ValueError, match=r"expected text in both splits, got none in 'val': 1 different documents of 4"
    ):
        build_corpus(tmp_path / "text", cache=tmp_path / "cache")
    (tmp_path / "text" / "only.txt").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match=r"got none in 'train': 0 different documents .*1 binary"):
        build_corpus(tmp_path / "text", cache=tmp_path / "cache")
    write_files(tmp_path / "many")
    corpus = build_corpus(tmp_path / "many", cache=tmp_path / "cache")
    meta = shards.read_meta(corpus.folder) | {"complete": False}
    (corpus.folder / "corpus.json").write_text(json.dumps(meta | {"crc32": zlib.crc32(json.dumps(meta).encode())}))
    with pytest.raises(ValueError, match=r"expected a whole corpus in .*, got one whose build was stopped"):
        Corpus.load(corpus.folder)


@pytest.mark.parametrize("number", [1, 2, 19])
def test_few_documents_are_split_by_place(number: int, tmp_path: Path) -> None:
    """Each gives its end: 38 of 100 folders of 19 files had no validation file by their hashes."""
    texts = write_files(tmp_path / "text", number)
    corpus = build_corpus(tmp_path / "text", val_fraction=0.2, cache=tmp_path / "cache")
    assert corpus.documents["train"] == corpus.documents["val"] == number
    train, val = (np.asarray(stream).tobytes() for stream in (corpus.train, corpus.val))
    for name in sorted(texts):
        text = texts[name] + b"\0"
        cut = len(text) - int(0.2 * len(text))
        assert train.startswith(text[:cut]) and val.startswith(text[cut:])
        train, val = train[cut:], val[len(text) - cut :]
    assert train == val == b""


def test_a_stream_reads_as_its_pieces_joined() -> None:
    """Any shards and any pieces of them, against plain arrays."""
    random = np.random.default_rng(0)
    for _ in range(100):
        parts = [random.integers(0, 1000, random.integers(0, 9)).astype(np.uint16) for _ in range(5)]
        whole = np.concatenate(parts)
        bounds = np.sort(random.integers(0, whole.size + 1, 2 * random.integers(0, 6))).reshape(-1, 2)
        wanted = np.concatenate([whole[:0], *(whole[begin:end] for begin, end in bounds)])
        stream = TokenStream(parts, bounds.astype(np.int64))
        assert stream.size == len(stream) == wanted.size and np.array_equal(np.asarray(stream), wanted)
        for start, stop in random.integers(-wanted.size - 1, wanted.size + 2, (10, 2)).tolist():
            assert np.array_equal(stream[start:stop], wanted[start:stop])
    with pytest.raises(ValueError, match="expected a slice of step 1, got 2"):
        stream[::2]


def test_standard_library_is_sources_alone() -> None:
    paths = list(standard_library())
    assert len(paths) > 200 and paths == list(standard_library())
    assert {path.suffix for path in paths} == {".py"}
    parts = {part for path in paths for part in path.parts}
    assert not parts & {"site-packages", "dist-packages", "test", "idlelib", "__pycache__"}
    assert {"json", "email"} <= parts


# A stream whose every pair of bytes tells its place.
STREAM = np.array([value for i in range(3000) for value in divmod(i, 256)], dtype=np.uint8)


def places(excerpts: object, context: int) -> list[int]:
    found = []
    for row in np.asarray(excerpts):
        first = next(i for i in range(len(STREAM)) if np.array_equal(STREAM[i : i + context + 1], row))
        found.append(first)
    return found


def test_excerpts_depend_on_seed_and_step_alone() -> None:
    settings = {"context": 64, "seed": 5, "batch_size": 6}
    whole = training_excerpts(STREAM, step=7, **settings)
    assert whole.shape == (6, 65)
    parts = [training_excerpts(STREAM, step=7, first=2 * rank, count=2, **settings) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(training_excerpts(STREAM, step=8, **settings), whole)
    assert not np.array_equal(training_excerpts(STREAM, step=7, context=64, seed=6, batch_size=6), whole)


def test_an_epoch_reads_each_place_once() -> None:
    context, batch = 64, 4
    per_epoch = (STREAM.size - 1) // context - 1
    steps = per_epoch // batch
    starts: list[int] = []
    for step in range(steps):
        starts += places(training_excerpts(STREAM, context=context, seed=0, step=step, batch_size=batch), context)
    assert len(set(starts)) == len(starts) == steps * batch
    assert len({start % context for start in starts}) == 1  # one grid: inputs do not overlap
    later = places(training_excerpts(STREAM, context=context, seed=0, step=steps + 1, batch_size=batch), context)
    assert len({start % context for start in later}) == 1
    assert later[0] % context != starts[0] % context  # another start in the next epoch


def test_validation_excerpts_cover_or_spread() -> None:
    stream = STREAM[:1000]
    every = validation_excerpts(stream, context=64)
    assert np.array_equal(np.concatenate([x[1:] for x in every]), stream[1:])  # each byte predicted once
    some = validation_excerpts(stream, context=64, limit=4)
    assert len(some) == 4 and all(x.size == 65 for x in some)
    assert len({x.tobytes() for x in some}) == 4


def test_short_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 129 tokens of training text for a context of 64, got 100"):
        training_excerpts(STREAM[:100], context=64, seed=0, step=0, batch_size=1)
    with pytest.raises(ValueError, match="expected at least 2 tokens of validation text, got 1"):
        validation_excerpts(STREAM[:1], context=64)
