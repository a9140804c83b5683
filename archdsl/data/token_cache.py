"""The cache of tokens: text is tokenized once, and its tokens are memory-mapped from then on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from archdsl.data.documents import PLAIN, SPLITS, TextSource
from archdsl.data.text_data import TextData
from archdsl.data.text_format import TextFormat, text_format_of
from archdsl.data.tokenizers import (
    Tokens,
    encode,
    end_of_document,
    make_tokenizer,
    read_tokenizer,
    tokenizer_key,
    vocab_size,
)
from archdsl.data.types import DataError, Split
from archdsl.files import read_bytes, why_unreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1  # increase it if the same source and tokenizer give other tokens than before
TAKEN = (  # what a split without files of its own needs
    "It is taken from the training text, which needs 20 different documents, or one of 20 "
    "characters; or name a file or folder after the split"
)


def sha256(*parts: str) -> str:
    """Returns the SHA-256 of the parts, as lines."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class DamagedError(Exception):
    """Cached tokens differ from what was written. They are then made again."""


class SplitIndex(BaseModel):
    """The number of tokens, the checksum and the size of the text of one split."""

    tokens: int = Field(ge=1)
    crc32: int
    text_bytes: int


class CacheIndex(BaseModel):
    """The index of cached tokens, which is used to check that the files are complete."""

    dtype: Literal["<u2", "<u4"]
    tokenizer: str  # sha256 of tokenizer.json
    splits: dict[Split, SplitIndex] = Field(min_length=len(SPLITS))
    rules: int = PLAIN  # see `TextSource`
    without_text: int = Field(0, ge=0)
    text_format: TextFormat | None = None  # what belongs to the tokenizer


@dataclass(frozen=True)
class TokenCache:
    """The files of tokenized text: one per split, the tokenizer, and an index, written last.

    Several processes may build the same files at once, because each writes complete, equal files.
    """

    folder: Path
    key: str

    def path(self, name: str) -> Path:
        """Returns the path of one of the files."""
        return self.folder / f"{self.key[:32]}.{name}"

    def open(self, name: str, verified: bool = False, rules: int = PLAIN) -> TextData | None:
        """Opens the files as the data source ``name``; returns None if any is missing or damaged.

        The checksums are not computed if another process has ``verified`` the files before. Files
        that were written under older ``rules`` are not opened.
        """
        try:
            index = CacheIndex.model_validate_json(read_bytes(self.path("json"), DamagedError))
            tokens = {split: self._map(split, index, verified) for split in index.splits}
            tokenizer = read_bytes(self.path("tokenizer.json"), DamagedError)
        except (ValidationError, DamagedError):
            return None
        if index.rules < rules:
            return None
        if hashlib.sha256(tokenizer).hexdigest() != index.tokenizer:
            return None
        return TextData(
            name=name,
            tokenizer=read_tokenizer(self.path("tokenizer.json"), index.text_format),
            fingerprint=sha256(self.key, index.tokenizer),
            tokens=tokens,
            text_bytes={split: entry.text_bytes for split, entry in index.splits.items()},
            token_cache=self,
            without_text=index.without_text,
        )

    def _map(self, split: Split, index: CacheIndex, verified: bool) -> Tokens:
        path, entry = self.path(f"{split}.bin"), index.splits[split]
        if (
            why_unreadable(path)
            or path.stat().st_size != entry.tokens * np.dtype(index.dtype).itemsize
        ):
            raise DamagedError(path)
        tokens = np.memmap(path, index.dtype, mode="r")
        # after a power failure a file may have the right length and hold zeros
        if not verified and zlib.crc32(tokens.data) != entry.crc32:
            raise DamagedError(path)
        return tokens

    def build(self, source: TextSource, choice: str) -> TextData:
        """Tokenizes the text with the tokenizer ``choice`` and writes the files.

        Raises DataError if a split is empty, and OSError if the files cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = source.read()
        tokenizer = make_tokenizer(choice, texts["train"]())
        dtype: Literal["<u2", "<u4"] = "<u2" if vocab_size(tokenizer) <= 2**16 else "<u4"
        splits = {split: self._write(split, texts[split](), tokenizer, dtype) for split in SPLITS}
        for split, entry in splits.items():
            if entry.text_bytes == 0:
                taken = "" if split in source.given else f". {TAKEN}"
                raise DataError(
                    f"{source.name}: too little text, the split {split} is empty{taken}"
                )
        content = tokenizer.to_str(pretty=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        index = CacheIndex(
            dtype=dtype,
            tokenizer=digest,
            splits=splits,
            rules=source.rules,
            text_format=text_format_of(tokenizer),
            without_text=sum(source.without_text.values()),
        )
        for name, written in (
            ("tokenizer.json", content),
            ("json", index.model_dump_json().encode()),
        ):
            with atomic_file(self.path(name)) as file:
                file.write(written)
        if data := self.open(source.name):
            return data
        raise DataError(
            f"{source.name}: files written to the cache {str(self.folder)!r} cannot be read back"
        )

    def _write(
        self, split: Split, texts: Iterator[str], tokenizer: Tokenizer, dtype: str
    ) -> SplitIndex:
        end = np.array([end_of_document(tokenizer)], dtype)
        tokens, text_bytes, crc32 = 1, 0, zlib.crc32(end.data)
        with atomic_file(self.path(f"{split}.bin")) as file:
            file.write(end.data)
            for document, length in encode(tokenizer, filter(None, texts)):
                ended = np.append(document.astype(dtype), end)
                file.write(ended.data)
                tokens, text_bytes = tokens + len(ended), text_bytes + length
                crc32 = zlib.crc32(ended.data, crc32)
        return SplitIndex(tokens=tokens, crc32=crc32, text_bytes=text_bytes)


def common_tokenizer(sources: Sequence[TextSource], choice: str, folder: Path) -> str:
    """Returns the choice of one tokenizer for all ``sources``.

    A BPE is trained on the training text of all of them, one after another, and is kept as a
    tokenizer.json in ``folder``, whose path is returned. Other choices are returned as they are.
    """
    key = tokenizer_key(choice)
    if not key.startswith("bpe:"):
        return choice
    digests = (source.digest for source in sources)
    path = folder / f"{sha256(str(FORMAT), *digests, key)[:32]}.tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = chain.from_iterable(source.read()["train"]() for source in sources)
        with atomic_file(path) as file:
            file.write(make_tokenizer(choice, texts).to_str(pretty=True).encode())
    return str(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file and renames it when it is complete. Several processes may do so."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
