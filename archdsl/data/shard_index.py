"""The index of a folder of shards of tokens; see archdsl/data/shards.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archdsl.data.types import DataError, Split
from archdsl.files import read_bytes

INDEX, TOKENIZER, UNFINISHED = "index.json", "tokenizer.json", "unfinished"
MARK = b'"archdsl_tokens"'  # the first key of an index
SHA256 = r"^[0-9a-f]{64}$"
MOST_SHARDS, MOST_TOKENS = 1_000_000, 2**40


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Shard(_Strict):
    """A file of tokens. Documents and bytes of text are counted where they end, or are cut."""

    file: str = Field(pattern=r"^(train|validation|test)-\d{5,7}\.bin$")
    split: Split
    tokens: int = Field(ge=1, le=MOST_TOKENS)
    documents: int = Field(ge=0, le=MOST_TOKENS)
    text_bytes: int = Field(ge=0, le=2**50)
    crc32: int = Field(ge=0, lt=2**32)


class Settings(_Strict):
    """What the shards were made of: the same settings give the same shards.

    ``source``: a SHA-256 of the files, their splits and columns. ``tokenizer``: as
    `archdsl.data.tokenizers.tokenizer_key` says it.
    """

    source: str = Field(pattern=SHA256)
    tokenizer: str = Field(max_length=100)
    shard_tokens: int = Field(ge=1, le=MOST_TOKENS)


class ShardIndex(_Strict):
    """What index.json holds. ``tokenizer``: the SHA-256 of tokenizer.json."""

    archdsl_tokens: Literal[1] = 1
    dtype: Literal["<u2", "<u4"]
    tokenizer: str = Field(pattern=SHA256)
    settings: Settings
    shards: list[Shard] = Field(min_length=1, max_length=MOST_SHARDS)


def read_index(folder: Path) -> ShardIndex:
    """Reads index.json. Raises DataError if it is damaged."""
    path = folder / INDEX
    try:
        return ShardIndex.model_validate_json(read_bytes(path, DataError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{str(path)!r} is damaged: {where}: {first['msg']}") from None
