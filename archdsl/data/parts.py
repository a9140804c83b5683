"""Cuts files into parts that several processes read independently of each other.

Where a file is cut depends on its content alone. A file of JSON lines is cut at ends of lines, a
parquet table between row groups, and a text, if its tokenizer allows it, at an end of a word
(`archdsl.data.tokenizers.cuts_at_words`). Other files stay whole.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from archdsl.data.documents import HELD_OUT_SHARE, ranges_of
from archdsl.data.folders import COMPRESSED, format_of
from archdsl.data.hub_stream import Stream
from archdsl.data.reading import Render, Span, is_json_lines, read_span
from archdsl.data.tokenizers import WORD_END
from archdsl.data.types import Split

VISIBLE = re.compile(rb"[^\x00-\x20\x7f](?=[ \n])")  # the last byte of what may be a word
BLOCK = 2**20  # bytes that are searched for the end of a word at once
LONGEST_CHARACTER = 4  # bytes


@dataclass(frozen=True)
class Part:
    """Spans of files of one split, which are read one after another.

    ``bytes``: how many bytes of the disk they take. ``stream``: rows to read in place of files.
    """

    split: Split
    spans: tuple[Span, ...]
    bytes: int
    stream: Stream | None = None


class Item(NamedTuple):
    """A document of a split, or a piece of a long one; ``ends``: whether the document ends here."""

    split: Split
    text: str
    ends: bool


class LongText(BaseModel):
    """What `Division` needs to know of a text of several spans: a hash, and their characters."""

    model_config = ConfigDict(strict=True, extra="forbid")
    hash: int
    characters: list[int]


class Division(BaseModel):
    """How training text is divided into splits: see `archdsl.data.documents.divide`.

    ``missing``: the splits to take from it. ``bounds``: the hashes of documents below the first
    bound go to the first of them, and so on; None: each document is cut instead. ``long``: by the
    names of their files.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    missing: list[Split]
    bounds: list[int] | None = None
    long: dict[str, LongText] = {}

    def pieces(self, part: Part, column: str | None, render: Render | None) -> Iterator[Item]:
        """Yields the documents of a part with their splits, in order; empty ones are left out."""
        for streamed in part.stream.texts(column, render) if part.stream else ():
            if streamed:
                yield from self._of_whole(part.split, streamed, True)
        for span in part.spans:
            long = self.long.get(str(span.file)) if span_is_of_text(span) else None
            for text in read_span(span, column, render):
                if text and long:
                    yield from self._of_long(span, text, long)
                elif text:
                    ends = span.number + 1 == span.of or not span_is_of_text(span)
                    yield from self._of_whole(part.split, text, ends)

    def _of_whole(self, split: Split, text: str, ends: bool) -> Iterator[Item]:
        if split != "train" or not self.missing:
            yield Item(split, text, ends)
        elif self.bounds:
            yield Item(self._split_of(hash_of(text)), text, ends)
        else:
            for own, (begin, end) in ranges_of(len(text), self.missing).items():
                if begin < end:
                    yield Item(own, text[begin:end], ends)

    def _of_long(self, span: Span, text: str, long: LongText) -> Iterator[Item]:
        if self.bounds:
            yield Item(self._split_of(long.hash), text, span.number + 1 == span.of)
            return
        before = sum(long.characters[: span.number])
        for own, (begin, end) in ranges_of(sum(long.characters), self.missing).items():
            first, last = max(begin - before, 0), min(end - before, len(text))
            if first < last:
                yield Item(own, text[first:last], last == end - before)

    def _split_of(self, content: int) -> Split:
        for split, bound in zip(self.missing, self.bounds or (), strict=False):
            if content < bound:
                return split
        return "train"


def division_of(
    hashes: np.ndarray, long: Mapping[str, LongText], missing: Sequence[Split]
) -> Division:
    """Returns the division of training text whose documents have these ``hashes``, uint64 [N]."""
    ranked = np.unique(np.append(hashes, np.array([t.hash for t in long.values()], np.uint64)))
    share = len(ranked) // HELD_OUT_SHARE
    bounds = [int(ranked[(i + 1) * share]) for i in range(len(missing))] if share else None
    return Division(missing=list(missing), bounds=bounds, long=dict(long))


def hash_of(text: str) -> int:
    """Returns the first eight bytes of the SHA-256 of a text, which sort as the whole of it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hashes_of(part: Part, column: str | None, render: Render | None) -> np.ndarray:
    """Returns the hashes of the documents of a part, uint64 [N], without those of long texts."""
    texts: Iterator[str | None] = (
        text
        for span in part.spans
        if span.of == 1 or not span_is_of_text(span)
        for text in read_span(span, column, render)
    )
    if part.stream:
        texts = part.stream.texts(column, render)
    return np.fromiter((hash_of(text) for text in texts if text is not None), np.uint64)


def measure(spans: Sequence[Span]) -> LongText:
    """Returns the hash of a text of several spans, and the characters of each."""
    content, characters = hashlib.sha256(), list[int]()
    for span in spans:
        for text in read_span(span):
            content.update((text or "").encode())
            characters.append(len(text or ""))
    return LongText(hash=int.from_bytes(content.digest()[:8], "big"), characters=characters)


def span_is_of_text(span: Span) -> bool:
    """Tells whether a span is of a text, and so of one document."""
    return format_of(span.file) == "text"


def cut(by_split: Mapping[Split, Sequence[Path]], size: int, cut_texts: bool) -> list[Part]:
    """Returns parts of about ``size`` bytes each, in the order of the files.

    ``cut_texts``: whether texts may be cut at ends of words.
    """
    parts: list[Part] = []
    for split, files in by_split.items():
        spans, total = list[Span](), 0
        for file in files:
            for span, own in _spans(file, size, cut_texts):
                if spans and total + own > size:
                    parts.append(Part(split, tuple(spans), total))
                    spans, total = [], 0
                spans.append(span)
                total += own
        if spans:
            parts.append(Part(split, tuple(spans), total))
    return parts


def _spans(file: Path, size: int, cut_texts: bool) -> Iterator[tuple[Span, int]]:
    """Yields the parts of a file, and the bytes of each."""
    total, kind = file.stat().st_size, format_of(file)
    places: list[int] = []
    lengths: list[int] = []
    if total > size and file.suffix.lower() not in COMPRESSED:
        if kind == "parquet":
            places, lengths = _row_groups(file, size)
        elif (kind == "text" and cut_texts) or (kind == "json" and is_json_lines(file)):
            places = _places(file, total, size, kind == "text")
            lengths = [end - begin for begin, end in pairwise(places)]
    if len(places) < 3:
        yield Span(file), total
        return
    for number, ((begin, end), length) in enumerate(zip(pairwise(places), lengths, strict=True)):
        yield Span(file, begin, end, number, len(lengths)), length


def _places(file: Path, total: int, size: int, is_text: bool) -> list[int]:
    """Returns the bytes at which a file is cut, about ``size`` apart, with 0 and its end."""
    places = [0]
    with file.open("rb") as content:
        while places[-1] + size < total:
            content.seek(places[-1] + size)
            place = _word_end(content) if is_text else _line_begin(content)
            if not places[-1] < place < total:
                break
            places.append(place)
    return [*places, total]


def _line_begin(content: io.BufferedReader) -> int:
    content.readline()
    return content.tell()


def _word_end(content: io.BufferedReader) -> int:
    """Returns the place of the next end of a word; 0 if there is none. See `at_words`."""
    place, block = content.tell(), content.read(BLOCK)
    while len(block) > LONGEST_CHARACTER:
        for found in VISIBLE.finditer(block):
            last = block[max(0, found.end() - LONGEST_CHARACTER) : found.end()]
            if WORD_END.search(last.decode(errors="ignore") + " "):
                return place + found.end()
        place += len(block) - LONGEST_CHARACTER
        content.seek(place)
        block = content.read(BLOCK)
    return 0


def _row_groups(file: Path, size: int) -> tuple[list[int], list[int]]:
    """Returns the row groups at which a table is cut, and the bytes between them."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    places, lengths, total = [0], list[int](), 0
    for group in range(metadata.num_row_groups):
        own = metadata.row_group(group).total_byte_size
        if total and total + own > size:
            places.append(group)
            lengths.append(total)
            total = 0
        total += own
    return [*places, metadata.num_row_groups], [*lengths, total]
