"""Shards of tokens: a folder that `archdsl tokenize` wrote, and that training maps into memory.

A shard is a file of little-endian tokens, of 2 or 4 bytes each, with nothing before or after: its
length is all that there is to check before it is mapped. What the shards are stands in index.json,
which is written last. The shards of a split, one after another, are one long text, which begins
with an end-of-document token and has one after every document.

A folder may come from a stranger: only what index.json names is read, by names that cannot lead out
of the folder, and nothing is executed.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archdsl.data.documents import SPLITS
from archdsl.data.shard_index import INDEX, MARK, TOKENIZER, UNFINISHED, Shard, read_index
from archdsl.data.text_data import TextData
from archdsl.data.tokenizers import read_tokenizer, tokenizer_key, vocab_size
from archdsl.data.types import DataError, Split
from archdsl.files import read_bytes, why_unreadable


class ShardTokens:
    """The tokens of the shards of a split as one long array, read only where it is indexed.

    The checksum of a shard is computed when something of it is read for the first time in this
    process, so that opening a folder takes no time: about 0.1 s for 100 million tokens.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str, vocab: int) -> None:
        """Checks that each file is as long as the index says. Raises DataError, which names it."""
        self.folder, self.shards, self.dtype, self.vocab = folder, shards, np.dtype(dtype), vocab
        self.ends = np.array([0, *accumulate(shard.tokens for shard in shards)])
        self.maps: dict[int, NDArray[Any]] = {}
        for shard in shards:
            path = folder / shard.file
            if why := why_unreadable(path):
                raise DataError(f"shard {str(path)!r}: {why}; copy or download it again")
            size, right = path.stat().st_size, shard.tokens * self.dtype.itemsize
            if size != right:
                raise _damaged(path, f"it has {size:,} bytes; {right:,} are right")

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self.ends[-1])

    def __getitem__(self, place: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the tokens at some places, in the shape of ``place``.

        Raises DataError, which names the shard, if it is damaged.
        """
        number = np.searchsorted(self.ends, place, side="right") - 1
        found = np.empty(place.shape, self.dtype)
        for shard in np.unique(number):
            here = number == shard
            found[here] = self._mapped(int(shard))[place[here] - self.ends[shard]]
        return found

    def _mapped(self, number: int) -> NDArray[Any]:
        if number not in self.maps:
            shard = self.shards[number]
            path = self.folder / shard.file
            try:
                tokens = np.memmap(path, self.dtype, mode="r", shape=(shard.tokens,))
            except (OSError, ValueError) as error:
                raise _damaged(path, str(error)) from None
            if zlib.crc32(tokens.data) != shard.crc32:
                raise _damaged(path, "its checksum is not that in the index")
            if (largest := int(tokens.max())) >= self.vocab:
                raise _damaged(path, f"it holds the token {largest:,}, which the tokenizer has not")
            self.maps[number] = tokens
        return self.maps[number]


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"shard {str(path)!r} is damaged: {why}; copy or download it again")


@dataclass(frozen=True, eq=False)
class ShardedData(TextData):
    """Text in shards of tokens. See `TextData`."""

    shards: Sequence[Shard] = ()
    folder: Path = field(default_factory=Path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the name of the folder."""
        return open_shards, (self.folder,)

    def summary(self) -> list[str]:
        """Returns lines that say what each split has."""
        lines = []
        for split in SPLITS:
            own = [shard for shard in self.shards if shard.split == split]
            documents, tokens = sum(s.documents for s in own), sum(s.tokens for s in own)
            words = [(len(own), "shard"), (documents, "document"), (tokens, "token")]
            said = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in words)
            lines.append(f"{split}: {said}")
        return lines


def holds_shards(source: str) -> bool:
    """Tells whether a source is a folder of shards of tokens.

    Raises DataError if `archdsl tokenize` has not finished it.
    """
    folder = Path(source)
    try:
        if not folder.is_dir():
            return False
        if (folder / INDEX).is_file():
            with (folder / INDEX).open("rb") as file:
                return MARK in file.read(100)
        unfinished = (folder / UNFINISHED / "settings.json").is_file()
    except (OSError, ValueError):  # a name that cannot be one
        return False
    if unfinished:
        raise DataError(
            f"{source!r} is not finished: run the same archdsl tokenize again, which goes on"
        )
    return False


def open_shards(folder: Path, tokenizer: str | None = None) -> ShardedData:
    """Opens a folder of shards. Their content is read only where it is asked for.

    ``tokenizer``: a choice that must be the tokenizer of the shards; None: any. Raises DataError if
    the index, the tokenizer or the size of a shard is wrong, or the choice is another tokenizer.
    """
    index = read_index(folder)
    path = folder / TOKENIZER
    found = hashlib.sha256(read_bytes(path, DataError)).hexdigest()
    if found != index.tokenizer:
        raise DataError(f"{str(path)!r} is not the tokenizer of the index: copy the folder again")
    own = read_tokenizer(path)
    if tokenizer is not None and tokenizer_key(tokenizer) != index.settings.tokenizer:
        named = Path(tokenizer)
        if not named.is_file() or read_tokenizer(named).to_str() != own.to_str():
            raise DataError(
                f"{str(folder)!r} is tokenized already, by another tokenizer than {tokenizer!r}: "
                "tokenize the text again by that one, or leave --tokenizer out"
            )
    by_split = {split: [s for s in index.shards if s.split == split] for split in SPLITS}
    vocab = vocab_size(own)
    return ShardedData(
        name=str(folder),
        tokenizer=own,
        fingerprint=hashlib.sha256(index.model_dump_json().encode()).hexdigest(),
        tokens=_tokens(folder, by_split, index.dtype, vocab),
        text_bytes={split: sum(s.text_bytes for s in own) for split, own in by_split.items()},
        shards=index.shards,
        folder=folder,
    )


def _tokens(
    folder: Path, by_split: Mapping[Split, Sequence[Shard]], dtype: str, vocab: int
) -> dict[Split, Any]:
    if missing := [split for split, shards in by_split.items() if not shards]:
        raise DataError(f"{str(folder / INDEX)!r} lists no shard of {', '.join(missing)}")
    return {split: ShardTokens(folder, own, dtype, vocab) for split, own in by_split.items()}
