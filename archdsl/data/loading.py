"""`load_data`: text that is tokenized once and then memory-mapped, or a synthetic task.

Shapes: B sequences, T tokens, W windows.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from archdsl.data.chats import ChatTemplate
from archdsl.data.documents import PLAIN, SPLITS, TextSource, find_source
from archdsl.data.folders import ACCEPTED, few
from archdsl.data.reading import Render
from archdsl.data.skills import Skill, parse_skill
from archdsl.data.text_format import TextFormat, text_format_beside, text_format_of
from archdsl.data.tokenizers import (
    Tokens,
    encode,
    end_of_document,
    make_tokenizer,
    read_tokenizer,
    tokenizer_key,
    vocab_size,
)
from archdsl.data.types import Batch, Data, DataError, HeldOut, Split
from archdsl.errors import blamed_on
from archdsl.files import read_bytes, why_unreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batch", "Data", "DataError", "SkillData", "TextData", "load_data"]

FORMAT = 1  # increase it if the same source and tokenizer give other tokens than before
TAKEN = (  # what a split without files of its own needs
    "It is taken from the training text, which needs 20 different documents, or one of 20 "
    "characters; or name a file or folder after the split"
)
HELD_OUT_SEQUENCES = 1024  # sequences in the validation and in the test split of a skill


def load_data(
    source: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str = "bytes",
    column: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Data:
    """Loads text or a synthetic task for training and evaluation.

    ``source``: a file or folder of text, ``hf:DATASET/CONFIG`` from the Hugging Face Hub, or
    ``skill:NAME,option=value``. The default is the corpus that comes with archdsl. ``tokenizer``:
    "bytes", "bpe:SIZE" (trained on the training split) or the path of a tokenizer.json; skills use
    none. ``column``: the column of the text, if it is not called text, content or document; a
    source ``SOURCE::COLUMN`` means the same. ``cache``: the folder for the tokens; the default is
    $ARCHDSL_CACHE, or else $XDG_CACHE_HOME/archdsl, or else ~/.cache/archdsl. Raises DataError if
    the source or the tokenizer is wrong, or if the cache cannot be written.
    """
    if source is not None and (not isinstance(source, str | os.PathLike) or not os.fspath(source)):
        raise DataError(f"{reprlib.repr(source)} names no data; {ACCEPTED}")
    source = None if source is None else os.fspath(source)
    source, column = _named_column(source, column)
    if source is not None and source.startswith("skill:"):
        if column:
            raise DataError(f"{source} has no column {column!r}: a skill has no columns")
        return SkillData(parse_skill(source.removeprefix("skill:")))
    root = Path(cache) if cache else _default_cache()
    choice = tokenizer_key(tokenizer)
    try:
        text = find_source(source, root, column, _renderer(tokenizer))
        cached = TokenCache(root / "tokens", _sha256(str(FORMAT), text.digest, choice))
        data = cached.open(text.name, rules=text.rules) or cached.build(text, tokenizer)
        return replace(data, source=text)
    except OSError as error:
        raise DataError(
            f"cache {str(root)!r}: {error}; set $ARCHDSL_CACHE to use another folder"
        ) from None


def _renderer(tokenizer: str) -> Render | None:
    """Returns what turns chats into text, if the tokenizer has a chat template."""
    text_format = text_format_beside(Path(tokenizer))
    return ChatTemplate(text_format).render if text_format and text_format.chat_template else None


def _named_column(source: str | None, column: str | None) -> tuple[str | None, str | None]:
    """Divides SOURCE::COLUMN, which is how the names of data say a column."""
    if source is None or column or os.path.exists(source):
        return source, column
    name, _, after = source.rpartition("::")
    return (name, after) if name and after else (source, None)


def _default_cache() -> Path:
    if chosen := os.environ.get("ARCHDSL_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archdsl"
    except RuntimeError:  # a user of a container may be known by a number alone
        raise DataError(
            "there is no home folder for the cache of tokens: set $ARCHDSL_CACHE to a folder"
        ) from None


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TextData:
    """Tokenized text. The end-of-document token is before the first and after every document."""

    name: str
    tokenizer: Tokenizer
    fingerprint: str
    tokens: Mapping[Split, Tokens]
    text_bytes: Mapping[Split, int]
    chance: None = None
    token_cache: TokenCache | None = None  # the files of the tokens
    without_text: int = 0  # rows that were passed over
    source: TextSource | None = None  # what was found, in the process that loaded it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the location of the cached files, which this process has already verified."""
        if self.token_cache is None:
            values = (self.name, self.tokenizer, self.fingerprint, self.tokens, self.text_bytes)
            return TextData, values
        return self.token_cache.open, (self.name, True)

    @property
    def vocab_size(self) -> int:
        """See `Data.vocab_size`."""
        return vocab_size(self.tokenizer)

    def summary(self) -> list[str]:
        """Returns lines that say what each split has, and what is left out and why.

        Documents are counted in the tokens, which takes a second for each gigabyte.
        """
        end = end_of_document(self.tokenizer)
        lines: list[str] = []
        for split in SPLITS:
            tokens = self.tokens[split]
            counts = [(np.count_nonzero(tokens == end) - 1, "document"), (len(tokens), "token")]
            if self.source and (files := self.source.files.get(split)):
                counts.insert(0, (files, "file"))
            words = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in counts)
            taken = self.source and split not in self.source.given
            lines.append(f"{split}: {words}" + ", taken from the training text" * bool(taken))
        left_out: dict[str, list[str]] = {}
        for name, why in self.source.left_out.items() if self.source else ():
            left_out.setdefault(why, []).append(name)
        lines += [f"left out: {few(names)} ({why})" for why, names in left_out.items()]
        lines += [f"note: {note}" for note in (self.source.notes if self.source else ())]
        if rows := self.without_text:
            what = "1 row has no text" if rows == 1 else f"{rows:,} rows have no text"
            lines.append(f"left out: {what} (null or missing)")
        return lines

    def save_tokenizer(self, path: Path) -> None:
        """See `Data.save_tokenizer`."""
        self.tokenizer.save(str(path))
        if text_format := text_format_of(self.tokenizer):
            text_format.write(path.parent)

    def bytes_per_token(self, split: Split) -> float:
        """See `Data.bytes_per_token`."""
        return self.text_bytes[split] / (len(self.tokens[split]) - 1)

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns ``batch_size`` windows of ``context`` tokens of the training text, [B, T].

        Each window is used once per epoch, in an order that depends on the seed. Raises DataError
        if the text is shorter than one window.
        """
        tokens = self.tokens["train"]
        windows = (len(tokens) - 1) // context
        if windows == 0:
            message = (
                f"the training text of {self.name} has {len(tokens)} tokens, "
                f"too few for a context of {context}"
            )
            with blamed_on("context"):
                raise DataError(message)
        first = index * batch_size
        places = [divmod(n, windows) for n in range(first, first + batch_size)]
        window_B = np.array([_order(windows, seed, epoch)[place] for epoch, place in places])
        return _windows(tokens, window_B * context, context)

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields batches [B, T] of the whole split, or of windows spread evenly over it.

        What is left after the last whole window is a shorter window in a batch of its own: tokens
        that fill it up would compete for the capacity of routers. Raises DataError if
        ``limit_tokens`` is below 1.
        """
        tokens = self.tokens[split]
        targets = len(tokens) - 1
        start_W = _evenly_spaced(-(-targets // context), context, limit_tokens) * context
        whole_W = start_W[start_W + context <= targets]
        for i in range(0, len(whole_W), batch_size):
            yield _windows(tokens, whole_W[i : i + batch_size], context)
        for start in start_W[len(whole_W) :]:
            yield _windows(tokens, start[None], targets - start)


@lru_cache(maxsize=4)  # the order is computed once per epoch, not once per batch
def _order(windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _evenly_spaced(windows: int, context: int, limit_tokens: int | None) -> NDArray[np.int64]:
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens must be at least 1, got {limit_tokens}")
    count = windows if limit_tokens is None else min(windows, max(1, limit_tokens // context))
    return np.arange(count) * windows // count


def _windows(tokens: Tokens, start_B: NDArray[np.int64], context: int) -> Batch:
    text_BT = torch.from_numpy(tokens[start_B[:, None] + np.arange(context + 1)].astype(np.int64))
    return Batch(text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous())


@dataclass(frozen=True)
class SkillData:
    """Sequences of a synthetic task. Their length is that of the skill, for every context."""

    skill: Skill

    @property
    def name(self) -> str:
        """The source of this data with all options, as in ``skill:p-hop,length=32,hops=3``."""
        options = "".join(f",{key}={value}" for key, value in self.skill.model_dump().items())
        return f"skill:{self.skill.name}{options}"

    @property
    def vocab_size(self) -> int:
        """See `Data.vocab_size`."""
        return self.skill.vocab_size

    @property
    def fingerprint(self) -> str:
        """See `Data.fingerprint`."""
        return _sha256(str(FORMAT), self.name)

    @property
    def chance(self) -> float:
        """See `Data.chance`."""
        return self.skill.chance

    def bytes_per_token(self, split: Split) -> None:
        """Returns None, because a skill has no text."""

    def save_tokenizer(self, path: Path) -> None:
        """Writes nothing, because a skill has no tokenizer."""

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns new sequences [B, T]. Raises DataError if ``context`` is too short for them."""
        tokens_BT, targets_BT = self._generate("train", (seed, index), batch_size, context)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields the same 1024 sequences at every call, or fewer with ``limit_tokens``.

        Raises DataError if ``context`` is too short or ``limit_tokens`` is below 1.
        """
        tokens_WT, targets_WT = self._generate(split, (), HELD_OUT_SEQUENCES, context)
        selected_W = _evenly_spaced(HELD_OUT_SEQUENCES, self.skill.length, limit_tokens)
        for i in range(0, len(selected_W), batch_size):
            some_B = selected_W[i : i + batch_size]
            yield Batch(torch.from_numpy(tokens_WT[some_B]), torch.from_numpy(targets_WT[some_B]))

    def _generate(
        self, split: Split, numbers: tuple[int, ...], batch_size: int, context: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if context < self.skill.length:
            message = f"{self.name} needs a context of {self.skill.length}, got {context}"
            with blamed_on("context"):
                raise DataError(message)
        # the seed begins with the split, so that the splits have different sequences
        rng = np.random.default_rng([1 + SPLITS.index(split), *numbers])
        return self.skill.generate(rng, batch_size)


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
            fingerprint=_sha256(self.key, index.tokenizer),
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
            with _atomic_file(self.path(name)) as file:
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
        with _atomic_file(self.path(f"{split}.bin")) as file:
            file.write(end.data)
            for document, length in encode(tokenizer, filter(None, texts)):
                ended = np.append(document.astype(dtype), end)
                file.write(ended.data)
                tokens, text_bytes = tokens + len(ended), text_bytes + length
                crc32 = zlib.crc32(ended.data, crc32)
        return SplitIndex(tokens=tokens, crc32=crc32, text_bytes=text_bytes)


@contextmanager
def _atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file and renames it when it is complete. Several processes may do so."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
