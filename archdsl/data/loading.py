"""Data by name: text, tokenized once and memory-mapped, or a skill.

Shapes: B sequences, T tokens, W windows.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from archdsl.data.documents import SPLITS, TextSource, find_source
from archdsl.data.skills import Skill, parse_skill
from archdsl.data.tokenizers import (
    Tokens,
    encode,
    end_of_document,
    make_tokenizer,
    read_tokenizer,
    tokenizer_key,
    vocab_size,
)
from archdsl.data.types import IGNORE, Batch, Data, DataError, HeldOut, Split

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batch", "Data", "DataError", "SkillData", "TextData", "load_data"]

FORMAT = 1  # raise it when the same name comes to mean other tokens
HELD_OUT_SEQUENCES = 1024  # of a skill


def load_data(
    source: str | None = None, *, tokenizer: str = "bytes", cache: Path | None = None
) -> Data:
    """The embedded corpus, a file or folder, ``hf:DATASET/CONFIG``, or ``skill:NAME,option=value``.

    ``tokenizer``: "bytes", "bpe:SIZE" (trained on the training split) or a tokenizer.json; skills
    need none. Tokens are kept under ``cache`` ($ARCHDSL_CACHE, $XDG_CACHE_HOME/archdsl or
    ~/.cache/archdsl). Raises DataError.
    """
    if source is not None and source.startswith("skill:"):
        return SkillData(parse_skill(source.removeprefix("skill:")))
    root = cache or _default_cache()
    choice = tokenizer_key(tokenizer)
    try:
        text = find_source(source, root)
        cached = TokenCache(root / "tokens", _sha256(str(FORMAT), text.digest, choice))
        return cached.open(text.name) or cached.build(text, tokenizer)
    except OSError as error:
        raise DataError(
            f"cache {str(root)!r}: {error}; $ARCHDSL_CACHE names another place"
        ) from None


def _default_cache() -> Path:
    if chosen := os.environ.get("ARCHDSL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archdsl"


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TextData:
    """Documents joined by the token that ends them; it also stands before the first."""

    name: str
    tokenizer: Tokenizer
    fingerprint: str
    tokens: Mapping[Split, Tokens]
    text_bytes: Mapping[Split, int]
    chance: None = None
    token_cache: TokenCache | None = None  # the files that hold it

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes open the same files, and trust them."""
        if self.token_cache is None:
            values = (self.name, self.tokenizer, self.fingerprint, self.tokens, self.text_bytes)
            return TextData, values
        return self.token_cache.open, (self.name, True)

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.tokenizer)

    def save_tokenizer(self, path: Path) -> None:
        self.tokenizer.save(str(path))

    def bytes_per_token(self, split: Split) -> float:
        return self.text_bytes[split] / (len(self.tokens[split]) - 1)

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Windows of the training text, each once an epoch, in an order that the seed decides."""
        tokens = self.tokens["train"]
        windows = (len(tokens) - 1) // context
        if windows == 0:
            raise DataError(
                f"the training text of {self.name} has {len(tokens)} tokens, "
                f"too few for a context of {context}"
            )
        first = index * batch_size
        places = [divmod(n, windows) for n in range(first, first + batch_size)]
        window_B = np.array([_order(windows, seed, epoch)[place] for epoch, place in places])
        return _windows(tokens, window_B * context, context)

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """All of the text, or windows spread evenly over it; the last window may be padded."""
        tokens = self.tokens[split]
        window_W = _spread(-(-(len(tokens) - 1) // context), context, limit_tokens)
        for i in range(0, len(window_W), batch_size):
            yield _windows(tokens, window_W[i : i + batch_size] * context, context)


@lru_cache(maxsize=4)  # an order is drawn once an epoch, not once a batch
def _order(windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _spread(windows: int, context: int, limit_tokens: int | None) -> NDArray[np.int64]:
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens must be at least 1, got {limit_tokens}")
    kept = windows if limit_tokens is None else min(windows, max(1, limit_tokens // context))
    return np.arange(kept) * windows // kept


def _windows(tokens: Tokens, start_B: NDArray[np.int64], context: int) -> Batch:
    place_BT = start_B[:, None] + np.arange(context + 1)
    past_end = place_BT >= len(tokens)
    text_BT = tokens[np.where(past_end, 0, place_BT)].astype(np.int64)
    targets_BT = np.where(past_end, IGNORE, text_BT)[:, 1:]
    return Batch(torch.from_numpy(text_BT[:, :-1].copy()), torch.from_numpy(targets_BT.copy()))


@dataclass(frozen=True)
class SkillData:
    """Fresh sequences from the skill, of the skill's own length, whatever the context."""

    skill: Skill

    @property
    def name(self) -> str:
        options = "".join(f",{key}={value}" for key, value in self.skill.model_dump().items())
        return f"skill:{self.skill.name}{options}"

    @property
    def vocab_size(self) -> int:
        return self.skill.vocab_size

    @property
    def fingerprint(self) -> str:
        return _sha256(str(FORMAT), self.name)

    @property
    def chance(self) -> float:
        return self.skill.chance

    def bytes_per_token(self, split: Split) -> None:
        return None

    def save_tokenizer(self, path: Path) -> None:
        """Nothing: tokens are numbers."""

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        tokens_BT, targets_BT = self._draw("train", (seed, index), batch_size, context)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """The same 1024 sequences each time, or fewer of them."""
        tokens_WT, targets_WT = self._draw(split, (), HELD_OUT_SEQUENCES, context)
        kept_W = _spread(HELD_OUT_SEQUENCES, self.skill.length, limit_tokens)
        for i in range(0, len(kept_W), batch_size):
            some_B = kept_W[i : i + batch_size]
            yield Batch(torch.from_numpy(tokens_WT[some_B]), torch.from_numpy(targets_WT[some_B]))

    def _draw(
        self, split: Split, numbers: tuple[int, ...], batch_size: int, context: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if context < self.skill.length:
            raise DataError(f"{self.name} needs a context of {self.skill.length}, got {context}")
        # the split comes first among the numbers that seed, so that no stream is part of another
        rng = np.random.default_rng([1 + SPLITS.index(split), *numbers])
        return self.skill.generate(rng, batch_size)


class DamagedError(Exception):
    """Cached tokens are not what was written; they are made again."""


class SplitIndex(BaseModel):
    tokens: int
    crc32: int
    text_bytes: int


class CacheIndex(BaseModel):
    """What lies beside the tokens: enough to tell whether they are whole."""

    dtype: Literal["<u2", "<u4"]
    tokenizer: str  # sha256 of tokenizer.json
    splits: dict[Split, SplitIndex] = Field(min_length=len(SPLITS))


@dataclass(frozen=True)
class TokenCache:
    """A file of tokens for each split, the tokenizer, and an index that is written last.

    Workers may build the same files at once: each replaces whole files by equal ones.
    """

    folder: Path
    key: str

    def path(self, name: str) -> Path:
        return self.folder / f"{self.key[:32]}.{name}"

    def open(self, name: str, trusted: bool = False) -> TextData | None:
        """None unless everything is there and undamaged; of trusted files the length will do."""
        try:
            index = CacheIndex.model_validate_json(self.path("json").read_bytes())
            tokens = {split: self._map(split, index, trusted) for split in index.splits}
            tokenizer = self.path("tokenizer.json").read_bytes()
        except (FileNotFoundError, ValidationError, DamagedError):
            return None
        if hashlib.sha256(tokenizer).hexdigest() != index.tokenizer:
            return None
        return TextData(
            name=name,
            tokenizer=read_tokenizer(self.path("tokenizer.json")),
            fingerprint=_sha256(self.key, index.tokenizer),
            tokens=tokens,
            text_bytes={split: entry.text_bytes for split, entry in index.splits.items()},
            token_cache=self,
        )

    def _map(self, split: Split, index: CacheIndex, trusted: bool) -> Tokens:
        path, entry = self.path(f"{split}.bin"), index.splits[split]
        if path.stat().st_size != entry.tokens * np.dtype(index.dtype).itemsize:
            raise DamagedError(path)
        tokens = np.memmap(path, index.dtype, mode="r")
        # after a power failure a file may be as long as it was, and hold zeros
        if not trusted and zlib.crc32(tokens.data) != entry.crc32:
            raise DamagedError(path)
        return tokens

    def build(self, source: TextSource, choice: str) -> TextData:
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = source.read()
        tokenizer = make_tokenizer(choice, texts["train"]())
        dtype: Literal["<u2", "<u4"] = "<u2" if vocab_size(tokenizer) <= 2**16 else "<u4"
        splits = {split: self._write(split, texts[split](), tokenizer, dtype) for split in SPLITS}
        for split, entry in splits.items():
            if entry.text_bytes == 0:
                raise DataError(f"{source.name}: too little text, nothing is left for {split}")
        content = tokenizer.to_str(pretty=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        index = CacheIndex(dtype=dtype, tokenizer=digest, splits=splits)
        for name, written in (
            ("tokenizer.json", content),
            ("json", index.model_dump_json().encode()),
        ):
            with _whole(self.path(name)) as file:
                file.write(written)
        if data := self.open(source.name):
            return data
        raise DataError(
            f"{source.name}: the cache {str(self.folder)!r} does not keep what is written"
        )

    def _write(
        self, split: Split, texts: Iterator[str], tokenizer: Tokenizer, dtype: str
    ) -> SplitIndex:
        end = np.array([end_of_document(tokenizer)], dtype)
        tokens, text_bytes, crc32 = 1, 0, zlib.crc32(end.data)
        with _whole(self.path(f"{split}.bin")) as file:
            file.write(end.data)
            for document, length in encode(tokenizer, filter(None, texts)):
                ended = np.append(document.astype(dtype), end)
                file.write(ended.data)
                tokens, text_bytes = tokens + len(ended), text_bytes + length
                crc32 = zlib.crc32(ended.data, crc32)
        return SplitIndex(tokens=tokens, crc32=crc32, text_bytes=text_bytes)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name once it is complete; several may be written for one name."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
