"""A tokenizer.json of a stranger takes no unbounded time or memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from archdsl.data import tokenizer_limits
from archdsl.data.tokenizers import byte_level, encode, read_tokenizer
from archdsl.data.types import DataError

PLAIN: dict[str, Any] = json.loads(byte_level().to_str())
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LATE = {"type": "Replace", "pattern": {"Regex": "a*b"}, "content": "c"}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 60}}, "more than 32 times"),
    ({"decoder": {"type": "Sequence", "decoders": [DOUBLED] * 60}}, "more than 32 times"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}}, "more than 32 times"),
    ({"decoder": LATE}, "decoder: replaces a regular expression"),
    ({"pre_tokenizer": split("(a+)+b")}, r"'\(a\+\)\+b' repeats a group"),
    ({"pre_tokenizer": split("((a)(b|a*)){2,}x")}, "repeats a group"),
    ({"normalizer": {**LATE, "pattern": {"Regex": "(?:a|aa)*b"}}}, "repeats a group"),
    (
        {"added_tokens": [{"id": 256, "content": "a" * 20_000, "special": True, **ADDED}]},
        "a token of 20,000 characters",
    ),
]


def written(folder: Path, **changed: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(PLAIN | changed))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(("changed", "error"), HOSTILE)
def test_what_grows_or_may_take_any_time_is_refused(
    tmp_path: Path, changed: dict[str, Any], error: str
) -> None:
    with pytest.raises(DataError, match=error):
        read_tokenizer(written(tmp_path, **changed))


def test_too_large_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(tokenizer_limits, "MAX_ADDED", 0)
    with pytest.raises(DataError, match="has 1 added tokens, more than 0"):
        read_tokenizer(path)
    monkeypatch.setattr(tokenizer_limits, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="is larger than 0 MiB"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"'(?i:[sdmt]|ll|ve)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?| ?[^(\s|[.,!?])]+|\s+(?!\S)",
    ],
)
def test_what_real_tokenizers_have_is_read(tmp_path: Path, pattern: str) -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), level]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    [(tokens, size)] = encode(read_tokenizer(tmp_path / "tokenizer.json"), ["It was."])
    assert len(tokens) > size


def slow() -> Tokenizer:
    """Each of many starts of a search takes long, but no group is repeated."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("a*a*a*a*b"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def test_encoding_that_takes_far_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_limits, "GRACE", 0.2)
    started = time.monotonic()
    with pytest.raises(DataError, match="the tokenizer needs more than 1 s for"):
        list(encode(slow(), ["".join(["a" * 110, "c"] * 20) + "b"]))
    assert time.monotonic() - started < 10


def test_a_search_that_the_library_gives_up_is_an_error() -> None:
    with pytest.raises(DataError, match=r"cannot encode this text: .*retry-limit"):
        list(encode(slow(), ["a" * 1000 + "c b"]))
