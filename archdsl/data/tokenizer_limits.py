"""Limits on what a tokenizer.json of a stranger may cost: its size, its time, and what it yields.

- Its file has at most MAX_BYTES, and at most MAX_ADDED added tokens.
- Its parts make a text at most MAX_GROWTH times as long, each beginning of a text has at most
  MAX_SPECIAL special tokens, and a token is at most MAX_TOKEN characters long.
- Its regular expressions repeat no group, as in ``(a+)+``: such a search can take exponential time.
  Decoders, which run after each generated token, have none.
- Texts are encoded within GRACE seconds and one second for each BYTES_PER_SECOND of them.
"""

from __future__ import annotations

import base64
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from archdsl.data.types import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

R = TypeVar("R")

MAX_BYTES = 2**26  # the largest in use, of Gemma, has half of that
MAX_ADDED = 100_000  # models of speech have tens of thousands
MAX_GROWTH = 32
MAX_SPECIAL = 100
MAX_TOKEN = 10_000  # characters
GRACE, BYTES_PER_SECOND = 20.0, 50_000  # a tenth of the speed of a slow computer

# An escaped character, a set of characters, or a group that is repeated without a low limit.
SKIPPED = re.compile(r"\\.|\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]", re.DOTALL)
REPEATED = re.compile(r"\)(?:[*+]|\{\d*,?\d{2,}\}|\{\d*,\})")


def check_content(content: bytes) -> None:
    """Raises DataError if a tokenizer.json is too large to be read."""
    if len(content) > MAX_BYTES:
        raise DataError(f"is larger than {MAX_BYTES >> 20} MiB")
    if (added := content.count(b'"single_word"')) > MAX_ADDED:
        raise DataError(f"has {added:,} added tokens, more than {MAX_ADDED:,}")


def check_parts(tokenizer: Tokenizer) -> None:
    """Raises DataError if a tokenizer may take any amount of time or memory for a short text."""
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        steps = [(name, step) for name in names for step in _steps(_state(tokenizer, name))]
        for name, step in steps:
            _check_regex(step.get("pattern"), name)
        if math.prod(_growth(step) for _, step in steps) > MAX_GROWTH:
            where = " and ".join(names)
            raise DataError(f"{where}: may make a text more than {MAX_GROWTH} times as long")
    if (longest := max(map(len, tokenizer.get_vocab()), default=0)) > MAX_TOKEN:
        raise DataError(f"has a token of {longest:,} characters, more than {MAX_TOKEN:,}")
    if (special := len(tokenizer.encode("").ids)) > MAX_SPECIAL:
        raise DataError(f"post_processor: puts {special:,} tokens before a text")


def _state(tokenizer: Tokenizer, name: str) -> Any:
    part = getattr(tokenizer, name)
    return json.loads(part.__getstate__()) if part else None


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The parts of a sequence, at any depth, or the part itself."""
    if not isinstance(part, dict):
        return
    inner = [part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part]
    if not inner:
        yield part
    for one in inner[0] if inner else ():
        yield from _steps(one)


def _growth(step: dict[str, Any]) -> float:
    """How many times as long, at most, a part makes a text, in characters or bytes."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(content)}:
            return max(1.0, len(content) / max(1, len(found)))
        case {"type": "Replace", "content": str(content)}:
            return 1.0 + len(content)
        case {"type": "Prepend", "prepend": str(content)}:
            return 1.0 + len(content)
        case {"type": "ByteLevel" | "Metaspace"}:
            return 2.0
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            return _growth_of_map(base64.b64decode(encoded))
    return 1.0


def _growth_of_map(content: bytes) -> float:
    """That of a map of characters by SentencePiece: the longest text that one of them becomes."""
    trie = int.from_bytes(content[:4], "little")
    return max(1.0, max(map(len, content[4 + trie :].split(b"\0"))) / 3)


def _check_regex(pattern: Any, where: str) -> None:
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex and where == "decoder":
        raise DataError("decoder: replaces a regular expression, which may take any time")
    if regex and REPEATED.search(SKIPPED.sub("_", regex)):
        raise DataError(
            f"{where}: the regular expression {regex[:100]!r} repeats a group, which may take "
            "exponential time"
        )


class Allowance:
    """The time that encoding, or what ``work`` names, may take, which grows with the texts."""

    def __init__(self, who: str = "the tokenizer", work: str = "encode") -> None:
        self.who, self.work = who, work
        self.started, self.seconds = time.monotonic(), GRACE

    def run(self, work: Callable[[], R], size: int) -> R:
        """Returns what ``work`` returns, which encodes texts of ``size`` bytes.

        It runs in a thread, as the library can be neither interrupted nor given a limit. Raises
        DataError if it takes too long or the library gives up; the thread then goes on until it is
        done or the process ends.
        """
        self.seconds += size / BYTES_PER_SECOND
        results: list[R] = []
        failures: list[BaseException] = []

        def keep() -> None:
            try:
                results.append(work())
            except BaseException as error:  # the library raises a panic, which is no Exception
                failures.append(error)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        thread.join(max(0.0, self.started + self.seconds - time.monotonic()))
        if results:
            return results[0]
        if failures:
            reason = str(failures[0]) or type(failures[0]).__name__
            raise DataError(f"{self.who} cannot {self.work} this text: {reason}") from None
        raise DataError(
            f"{self.who} needs more than {math.ceil(self.seconds):,} s for "
            f"{(self.seconds - GRACE) * BYTES_PER_SECOND / 1e6:,.1f} MB of text: it is given up"
        )
