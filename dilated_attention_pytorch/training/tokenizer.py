"""Text to tokens and back: bytes, or any `tokenizer.json` of the library `tokenizers`."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.training.sources import BOUNDARY, needed

FILE = "tokenizer.json"
# Names of the token that ends a document, the first that a vocabulary has.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]", "<end_of_turn>")
# Long texts are slow to tokenise and take a hundred times their size: they are cut at the ends of lines.
_PIECE = 1 << 14


class Bytes:
    """A byte per token; the zero byte, which no text holds, ends a document."""

    digest = "bytes"  # of all that decides the tokens
    vocab_size = 256  # the end of a document included
    end_token = BOUNDARY
    dtype: Any = np.uint8  # of tokens in files

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """The tokens of each text: the bytes themselves."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text, piece by piece as characters are whole; the replacement character stands for what is not UTF-8."""
        return codecs.iterdecode((bytes([token]) for token in tokens), "utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`, or that of a folder. A vocabulary without an end of documents gets one more token."""

    def __init__(self, path: Path) -> None:
        library = needed("tokenizers", "tokenizers")
        self.path = path / FILE if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(f"expected a tokenizer.json at {self.path}, found none")
        content = self.path.read_bytes()
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no class of its own
            raise ValueError(f"expected {self.path} to be a tokenizer.json, got: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.digest = hashlib.sha256(content).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values())
        self.end_token = next((vocabulary[name] for name in _ENDS if name in vocabulary), size)
        self.vocab_size = max(size, self.end_token + 1)
        self.dtype: Any = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Tokens; a text is cut at line ends into pieces, which are tokenised in parallel."""
        pieces = [[*_cut(text.decode())] for text in texts]
        found = iter(self._tokenizer.encode_batch_fast([*chain(*pieces)], add_special_tokens=False))
        return [np.array([i for _ in some for i in next(found).ids], dtype=self.dtype) for some in pieces]

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text, special tokens left out."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return (piece for token in tokens if (piece := stream.step(self._tokenizer, token)))


Tokenizer = Bytes | FileTokenizer


def load_tokenizer(name: str | Path = "bytes") -> Tokenizer:
    """The tokenizer that a name stands for: `"bytes"`, a `tokenizer.json` or a folder with one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that `tokenizers` does not read.
        ImportError: `tokenizers` is not installed.
    """
    return Bytes() if str(name) == "bytes" else FileTokenizer(Path(name))


def utf8(text: str) -> bytes:
    """The bytes of a text to continue; a ValueError for what a shell gave that is no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected prompt to be text in UTF-8, got {quoted(text)}") from None


def _cut(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = at + _PIECE
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        yield text[at:end]
        at = end
