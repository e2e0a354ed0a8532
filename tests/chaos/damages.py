"""Kinds of damage to the files that commands read, each with what has to become of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

NAMED = "named"  # refused in one line that names the file; nothing is changed
MENDED = "mended"  # the command ends as if there had been no damage
WARNED = "warned"  # the command ends well, and says that part of the record is gone


class Damage(NamedTuple):
    """One kind: `change` does it to the file."""

    program: str  # "train" goes on from a half-way state, "generate" reads a finished run
    file: str
    name: str
    change: Callable[[Path], object]
    outcome: str = NAMED


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def damages() -> list[Damage]:
    """All kinds."""
    found = []
    for program, file in (("train", _STATE), ("train", _SHARD), ("generate", "model.safetensors"),
                          ("generate", "config.json")):  # fmt: skip
        found += [Damage(program, file, name, _bytes(change)) for name, change in _ANY.items()]
    found += [Damage("train", _STATE, name, _about(change)) for name, change in _STATES.items()]
    found += [Damage("train", _SHARD, name, _header(change)) for name, change in _HEADERS.items()]
    for file in (_STATE, _SHARD):
        found.append(Damage("train", file, "a flipped bit", _bytes(_flipped(0.5))))
        found.append(Damage("train", file, "code in a pickle", lambda path: torch.save(Code(), path)))
        found.append(Damage("train", file, "absent", Path.unlink))
    found += [Damage("generate", "model.safetensors", name, _header(change)) for name, change in _HEADERS.items()]
    found += [Damage("generate", "config.json", name, _json(change)) for name, change in _CONFIGS.items()]
    found += [Damage("train", "corpus.json", name, _bytes(change)) for name, change in _ANY.items()]
    found += [Damage("train", "corpus.json", name, _json(change)) for name, change in _CORPORA.items()]
    for file in ("00000.npy", "00000.documents.npy"):
        for name in ("empty", "half of it", "a flipped bit"):
            found.append(Damage("train", file, name, _bytes(_ANY.get(name, _flipped(0.5)))))
        found.append(Damage("train", file, "absent", Path.unlink))
    # What a run writes anew.
    found += [Damage("train", file, name, _bytes(_ANY[name]), MENDED) for file in _ANEW for name in ("empty", "text")]
    found += [Damage("train", file, "absent", Path.unlink, MENDED) for file in _ANEW]
    found += [Damage("train", "metrics.jsonl", name, _bytes(change), MENDED) for name, change in _TAILS.items()]
    found += [Damage("train", "metrics.jsonl", name, _bytes(change), WARNED) for name, change in _RECORDS.items()]
    found.append(Damage("train", "metrics.jsonl", "absent", Path.unlink, WARNED))
    return found


def _flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = int(len(data) * share)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return flip


_ANEW = ("train.json",)
_STATE, _SHARD = "step-*/state.json", "step-*/*.safetensors"
_DEEP = b'{"a":' * 100_000
_ANY: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half of it": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data.rstrip()[:-1],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"some text\n",
    "a pickle": lambda data: pickle.dumps({"step": 1}),
    "JSON, a hundred thousand deep": lambda data: _DEEP,
}
_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no keys": lambda s: s.clear(),
    "another version": lambda s: s.update(version=1),
    "a step of 10**9": lambda s: s.update(step=10**9),
    "a step of -3": lambda s: s.update(step=-3),
    "a step that is text": lambda s: s.update(step="4"),
    "another config": lambda s: s["config"].update(d_model=48),
    "another corpus": lambda s: s.update(fingerprint="0" * 32),
    "a file too many": lambda s: s["files"].update(more=1),
    "a file of another checksum": lambda s: s["files"].update(dict.fromkeys(s["files"], 1)),
}
_HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tensor missing": lambda h: h.pop(max(h)),
    "a tensor of another shape": lambda h: h[max(h)].update(shape=[1, *h[max(h)]["shape"]]),
    "a tensor past the end": lambda h: h[max(h)].update(data_offsets=[0, 2**40]),
    "an unknown dtype": lambda h: h[max(h)].update(dtype="F33"),
    "a tensor of ints": lambda h: h[max(h)].update(dtype="I32"),
}
_CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no architecture": lambda c: c.pop("architecture"),
    "an architecture that is a list": lambda c: c.update(architecture=["LongNetLM"]),
    "an unknown key": lambda c: c.update(depths=3),
    "a width of 2**62": lambda c: c.update(d_model=2**62),
    "a width of another model": lambda c: c.update(d_model=64),
    "a width that is text": lambda c: c.update(d_model="32"),
    "a million layers": lambda c: c.update(num_decoder_layers=10**6),
    "no branches": lambda c: c.update(segment_lengths=[], dilation_rates=[]),
    "an epsilon of NaN": lambda c: c.update(layer_norm_eps=float("nan")),
}
_CORPORA: dict[str, Callable[[dict[str, Any]], object]] = {
    "no shards": lambda c: c["shards"].clear(),
    "a vocabulary of 2**70": lambda c: c.update(vocab_size=2**70),
    "another tokenizer": lambda c: c.update(digest="0" * 64),
    "counts that are none": lambda c: c.update(left_out={"binary": "many"}),
}
_TAILS: dict[str, Callable[[bytes], bytes]] = {
    "half a last line": lambda data: data + b'{"step": 99, "lo',
    "lines of steps to come": lambda data: data + b'{"step": 99, "loss": 1.0}\n',
}
_RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a line that is null": lambda data: b"null\n" + data,
    "a line that is not UTF-8": lambda data: b"\xff\xfe\n" + data,
    "a step that is text": lambda data: b'{"step": "1"}\n' + data,
    "JSON, a hundred thousand deep": lambda data: _DEEP + b"\n" + data,
}


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def _about(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of what a state says of itself, with a checksum that fits."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content["about"])
        path.write_text(json.dumps(content | {"crc32": zlib.crc32(json.dumps(content["about"]).encode())}))

    return apply


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of the JSON at the head of a safetensors file."""

    def apply(path: Path) -> None:
        stream = io.BytesIO(path.read_bytes())
        header = json.loads(stream.read(*struct.unpack("<Q", stream.read(8))))
        metadata = header.pop("__metadata__")
        change(header)
        text = json.dumps({"__metadata__": metadata} | header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + stream.read())

    return apply
