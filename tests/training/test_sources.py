"""Every kind of data: the same documents from each, cut at any place; what is none is named."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dilated_attention_pytorch.training import Corpus, build_corpus, sources
from dilated_attention_pytorch.training.sources import Part, find_sources
from dilated_attention_pytorch.training.tokenizer import load_tokenizer

TEXTS = [f"document {i}, déjà vu 漢: ".strip() * (i + 3) for i in range(100)]


def joined(parts: list[Part]) -> list[bytes]:
    """The documents of parts."""
    documents, held = [], b""
    for part in parts:
        held += part.data
        if part.ends and held:
            documents.append(held)
            held = b""
    assert held == b""
    return documents


def read(path: Path, at: int = 0, field: str = "text") -> list[Part]:
    (source,) = find_sources(path)
    return list(source.parts(at, field))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n\n" for i, text in enumerate(TEXTS)))


def write_parquet(path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=7)


def write_fasta(path: Path) -> None:
    path.write_text("".join(f">{i}\n{text[:7]}\n{text[7:]}\n" for i, text in enumerate(TEXTS)))


def write_dataset(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))


def compressed(opener: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        plain = path.with_name("plain.jsonl")
        write_jsonl(plain)
        with opener(path, "wb") as stream:
            stream.write(plain.read_bytes())

    return write


KINDS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.parquet": write_parquet,
    "sequences.fasta": write_fasta,
    "dataset": write_dataset,
    "rows.jsonl.gz": compressed(gzip.open),
    "rows.jsonl.xz": compressed(lzma.open),
}


@pytest.mark.parametrize("name", KINDS)
def test_records_are_documents_from_any_place_on(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    parts = read(tmp_path / name)
    wanted = [text.encode() for text in TEXTS]
    assert joined(parts) == wanted
    for number in (0, 41, 98, 99):
        ends = [i for i, part in enumerate(parts) if part.ends and part.data]
        assert joined(read(tmp_path / name, parts[ends[number]].after)) == wanted[number + 1 :]
    corpus = build_corpus(tmp_path / name, cache=tmp_path / "cache", val_fraction=0.3)
    assert corpus.documents["train"] + corpus.documents["val"] == len(TEXTS)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "one.fa"])
def test_long_documents_come_in_parts_from_any_of_them_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART", 64)
    letter, other = ("A", "C") if name == "one.fa" else ("漢", "é")
    lines = "".join(letter * (31 * i % 150) + ("\n" if i % 3 else other) for i in range(60))
    text = lines.replace("\n", "") if name == "one.fa" else lines
    content = (">one\n" + lines if name == "one.fa" else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    parts = read(tmp_path / name)
    assert joined(parts) == [text.encode()] and len(parts) > 20
    assert all(len(part.data) < 64 + 64 for part in parts)
    for i, part in enumerate(parts[:-1]):
        assert read(tmp_path / name, part.after) == parts[i + 1 :]


@pytest.mark.parametrize("size", [63, 64, 65, 128])
def test_a_document_as_long_as_a_part(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no line to cut at, and with its last byte a line's end."""
    monkeypatch.setattr(sources, "PART", 64)
    for i, text in enumerate((b"a" * size, b"a" * (size - 1) + b"\n")):
        (tmp_path / f"{i}.txt").write_bytes(text)
        parts = read(tmp_path / f"{i}.txt")
        assert joined(parts) == [text] and len(parts) == -(-size // 64)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.fasta"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 32)
    write = {".txt": lambda path: path.write_text("\n".join(TEXTS)), ".jsonl": write_jsonl, ".fasta": write_fasta}
    write[Path(name).suffix](tmp_path / name)
    plain = read(tmp_path / name)
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (tmp_path / name).read_bytes())
    marked = read(tmp_path / name)
    assert joined(marked) == joined(plain)
    at = marked[0].after
    assert joined([marked[0], *read(tmp_path / name, at)]) == joined(plain)


def test_endings_count_in_any_case(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "A.JSONL.GZ", "wt") as stream:
        stream.write(json.dumps({"text": "a text"}) + "\n")
    assert joined(read(tmp_path / "A.JSONL.GZ")) == [b"a text"]
    with (tmp_path / "A.NPY").open("wb") as file:
        np.save(file, np.arange(3))
    assert [source.read for source in find_sources(tmp_path / "A.NPY")] == [None]


def test_a_dataset_that_is_saved_anew_is_read_anew(tmp_path: Path) -> None:
    """Its folder's own size and time stay, since its files are written over."""
    write_dataset(tmp_path / "rows")
    first = build_corpus(tmp_path / "rows", cache=tmp_path / "cache")
    (file,) = (tmp_path / "rows").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"document", b"DOCUMENT"))
    again = build_corpus(tmp_path / "rows", cache=tmp_path / "cache")
    assert again.fingerprint != first.fingerprint and again.train[:8].tobytes() == b"DOCUMENT"


def test_compressed_text_is_read_by_what_it_begins_with(tmp_path: Path) -> None:
    for opener in (gzip.open, bz2.open, lzma.open):
        with opener(tmp_path / "any.name", "wb") as stream:
            stream.write(b"a text")
        assert joined(read(tmp_path / "any.name")) == [b"a text"]
    (tmp_path / "any.name").write_bytes(gzip.compress(bytes(range(200)) * 50)[:-9])
    with pytest.raises(ValueError, match=r"expected .*any\.name to be what its name and start say, got: Compressed"):
        read(tmp_path / "any.name")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\0\0", "binary"),
        (b"PK\x03\x04\x14\xff", "binary"),
        ("déjà vu\n".encode("latin-1"), "Latin-1"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"text\n" * 1000 + b"\xff", "Latin-1"),
    ],
)
def test_what_is_no_text_is_named(content: bytes, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 64)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "file").write_bytes(content)
    assert read(folder / "file")[-1].left_out == kind
    with pytest.raises(ValueError, match=rf"expected text in both splits, got none in 'train': .*1 {kind}"):
        build_corpus(folder / "file", cache=tmp_path / "cache")
    for i in range(20):
        (folder / f"text{i}").write_text(f"a text {i}" * 30)
    corpus = build_corpus(folder, cache=tmp_path / "cache")
    assert corpus.documents[kind] == 1 and corpus.left_out[kind] == [str(folder / "file")]
    assert corpus.documents["train"] == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"tex', r"expected JSON in the line at byte 14 of .*a\.jsonl, got "),
        ("a.jsonl", b'{"body": "a"}\n', r"expected field to name one of \['body'\] in .*a\.jsonl, got 'text'"),
        ("a.jsonl", b"[1]\n", r"expected field to name one of \[\] in .*a\.jsonl, got 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"expected text in the line at byte 0 of .*a\.jsonl, got int"),
        ("a.fa", b"ACGT\n", r"expected FASTA in .*a\.fa, got a first line without >"),
        ("a.npy", b"ACGT\n", r"expected an array of tokens in .*a\.npy, got: "),
        ("a.parquet", b"ACGT\n", r"expected .*a\.parquet to be what its name and start say, got: "),
    ],
)
def test_what_is_not_what_its_name_says_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_corpus(tmp_path / name, cache=tmp_path / "cache")


def test_a_field_of_parquet_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"expected field to name one of \['n', 'text'\] in .*, got 'body'"):
        build_corpus(tmp_path / "a.parquet", field="body", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"expected text in row 0 of .*, got int"):
        build_corpus(tmp_path / "a.parquet", field="n", cache=tmp_path / "cache")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of some hundred tokens, the end of a document among them."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_of_ones_own(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    corpus = build_corpus(tmp_path / "a.jsonl", tokenizer=bpe, cache=tmp_path / "cache", val_fraction=0.3)
    tokenizer = corpus.tokenizer
    assert tokenizer is not None and corpus.vocab_size == tokenizer.vocab_size > 300
    assert corpus.end_token == tokenizer.end_token == 0 and corpus.train[:5].dtype == np.uint16
    for stream in (corpus.train, corpus.val):
        tokens = np.asarray(stream)
        ends = np.flatnonzero(tokens == 0)
        found = ["".join(tokenizer.decode(part[:-1].tolist())) for part in np.split(tokens, ends[:-1] + 1)]
        assert found == [text for text in TEXTS if text in found] and len(found) > 8
    val = np.asarray(corpus.val)
    text = sum(len(x.encode()) for x in found)
    assert corpus.bytes_per_token == pytest.approx(text / (val.size - len(found))) and corpus.bytes_per_token > 2
    plain = build_corpus(tmp_path / "a.jsonl", cache=tmp_path / "cache", val_fraction=0.3)
    assert plain.fingerprint != corpus.fingerprint and plain.bytes_per_token == 1.0
    with pytest.raises(ValueError, match=r"expected .*a\.jsonl to be a tokenizer\.json, got: "):
        load_tokenizer(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "none")


def test_long_lines_are_cut_for_the_tokenizer_and_nothing_is_lost(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    texts = ["ab cd\n" * 10_000, "x" * 50_000, "", "déjà\n"]
    found = tokenizer.encode([text.encode() for text in texts])
    assert ["".join(tokenizer.decode(tokens.tolist())) for tokens in found] == texts


def test_a_vocabulary_without_an_end_gets_one(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_token == 3 and tokenizer.vocab_size == 4
    assert tokenizer.encode([b"a b c"])[0].tolist() == [0, 1, 2]


def test_tokens_are_used_where_they_are(bpe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    random = np.random.default_rng(0)
    parts = [random.integers(1, 300, 500).astype(np.int32), random.integers(1, 300, 700).astype(np.uint16)]
    for i, part in enumerate(parts):
        part[49::50] = 0
        np.save(folder / f"{i}.npy", part)
    corpus = build_corpus(folder, cache=tmp_path / "cache", val_fraction=0.1)
    assert corpus.tokenizer is None and corpus.end_token is None and corpus.bytes_per_token == 1.0
    assert corpus.vocab_size == 1 + max(int(part.max()) for part in parts)
    assert corpus.train.size + corpus.val.size == 1200 and corpus.documents["train"] == 2
    assert np.array_equal(corpus.val, np.concatenate([part[-part.size // 10 :] for part in parts]))
    assert not list(corpus.folder.glob("?????.npy"))
    ended = build_corpus(folder, tokenizer=bpe, cache=tmp_path / "cache", val_fraction=0.1)
    assert ended.end_token == 0 and ended.tokenizer is not None and ended.vocab_size == ended.tokenizer.vocab_size
    assert np.array_equal(ended.val, corpus.val)
    for bad in (np.zeros((2, 2), int), np.zeros(3), np.array([-1, 2])):
        np.save(folder / "0.npy", bad)
        with pytest.raises(ValueError, match=r"expected (ints \(tokens,\) in .*0\.npy, got|tokens of at least 0)"):
            build_corpus(folder, cache=tmp_path / "cache")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("pyarrow.parquet", "datasets", "tokenizers"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    message = r"expected {}, which is not installed: pip install 'dilated-attention-pytorch\[data\]'"
    for data, name in ((tmp_path / "a.parquet", "pyarrow"), ("hf:some/name", "datasets")):
        with pytest.raises(ImportError, match=message.format(name)):
            build_corpus(data, cache=tmp_path / "cache")
    with pytest.raises(ImportError, match=message.format("tokenizers")):
        load_tokenizer(tmp_path)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 100)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("line\n" * (1000 * i + 1000))
    monkeypatch.setattr("dilated_attention_pytorch.training.shards._BATCH", 1000)
    told: list[tuple[int, int]] = []
    corpus = build_corpus(tmp_path, cache=tmp_path / "cache", progress=lambda *x: told.append(x))
    assert len(told) > 20 and told == sorted(told) and told[-1] == (30_000, 30_000)
    told.clear()
    assert isinstance(build_corpus(tmp_path, cache=tmp_path / "cache"), Corpus) and not told
    assert corpus.train.size + corpus.val.size == 30_003
