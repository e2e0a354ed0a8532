"""The corpus and the excerpts that a run reads from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dilated_attention_pytorch.training import (
    Corpus,
    build_corpus,
    standard_library,
    training_excerpts,
    validation_excerpts,
)
from dilated_attention_pytorch.training import corpus as corpus_module


def write_files(folder: Path, count: int = 40) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"file{i}.txt": f"document {i}: ".encode() * (i + 3) for i in range(count)}
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return texts


def documents(stream: np.ndarray) -> list[bytes]:
    assert stream[-1] == 0
    return bytes(stream).split(b"\0")[:-1]


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
    assert corpus.fingerprint == "140f2e7f770491e1aee40e1b70175d6b"


def test_copies_binaries_hidden_files_and_links_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    texts = write_files(folder)
    plain = build_corpus(folder, val_fraction=0.3, cache=tmp_path / "cache")
    (folder / "sub").mkdir()
    (folder / "sub" / "copy.txt").write_bytes(texts["file3.txt"])
    (folder / "nul.bin").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"config")
    (folder / "link.txt").symlink_to(folder / "file1.txt")
    corpus = build_corpus(folder, val_fraction=0.3, cache=tmp_path / "other")
    assert corpus.fingerprint == plain.fingerprint
    assert bytes(corpus.train) == bytes(plain.train)
    assert corpus.documents == plain.documents | {"copies": 1, "binary": 2}


def test_names_and_places_do_not_matter(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "a")
    for i, text in enumerate(reversed(texts.values())):
        path = tmp_path / "b" / str(i % 3) / f"renamed{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    one, other = (build_corpus(tmp_path / x, val_fraction=0.3, cache=tmp_path / f"cache-{x}") for x in "ab")
    assert one.fingerprint == other.fingerprint
    assert bytes(one.train) == bytes(other.train) and bytes(one.val) == bytes(other.val)


def test_built_once_and_again_when_the_content_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "text")
    calls = []
    write = corpus_module._write
    monkeypatch.setattr(corpus_module, "_write", lambda *a: calls.append(a) or write(*a))
    first = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    assert build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache").fingerprint == first.fingerprint
    assert len(calls) == 1
    (tmp_path / "text" / "file0.txt").write_bytes(b"something else")
    assert build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache").fingerprint != first.fingerprint
    assert len(calls) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "text")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module.json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_suffixes_choose(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "text")
    (tmp_path / "text" / "page.md").write_bytes(b"another kind")
    corpus = build_corpus(tmp_path / "text", suffixes=(".txt",), val_fraction=0.3, cache=tmp_path / "cache")
    assert corpus.documents["train"] + corpus.documents["val"] == len(texts)


def test_a_cut_cache_is_not_taken(tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    path = tmp_path / "cache" / corpus.fingerprint / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected \d+ bytes in .*train\.bin, got \d+"):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_bit_in_the_cache_is_noticed(split: str, tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    folder = tmp_path / "cache" / corpus.fingerprint
    data = bytearray((folder / f"{split}.bin").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / f"{split}.bin").write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"expected bytes of CRC-32 \d+ in .*{split}\.bin, got \d+; remove the folder"
    ):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    meta = json.loads((folder / "corpus.json").read_text())
    del meta["crc32"]  # as an older version wrote it
    (folder / "corpus.json").write_text(json.dumps(meta))
    assert Corpus.load(folder).fingerprint == corpus.fingerprint


def test_the_description_of_another_corpus_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    path = tmp_path / "cache" / corpus.fingerprint / "corpus.json"
    path.write_text(path.read_text().replace(corpus.fingerprint, "0" * 32))
    with pytest.raises(
        ValueError, match=rf"expected .*corpus\.json to describe the corpus {corpus.fingerprint}, got 0+;"
    ):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")


COUNTS = '{"fingerprint": "a", "documents": {"train": "many", "val": 1}, "bytes": {"train": 1, "val": 1}}'
BYTES = '{"fingerprint": "a", "documents": {}, "bytes": {"train": []}}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", BYTES, COUNTS, '{"a":' * 100_000])
def test_a_damaged_description_is_named(text: str, tmp_path: Path) -> None:
    write_files(tmp_path / "text")
    corpus = build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")
    (tmp_path / "cache" / corpus.fingerprint / "corpus.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected .*corpus\.json to describe a corpus, got .*; remove the folder"):
        build_corpus(tmp_path / "text", val_fraction=0.3, cache=tmp_path / "cache")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        build_corpus(tmp_path / "none", cache=tmp_path)
    with pytest.raises(ValueError, match=r"expected val_fraction in \(0, 1\), got 1"):
        build_corpus(tmp_path, val_fraction=1.0, cache=tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "only.txt").write_bytes(b"one")
    with pytest.raises(ValueError, match=r"expected text files in both splits .* 1 different text files"):
        build_corpus(tmp_path / "text", cache=tmp_path / "cache")


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
    with pytest.raises(ValueError, match="expected at least 129 bytes of training text for a context of 64, got 100"):
        training_excerpts(STREAM[:100], context=64, seed=0, step=0, batch_size=1)
    with pytest.raises(ValueError, match="expected at least 2 bytes of validation text, got 1"):
        validation_excerpts(STREAM[:1], context=64)
