"""`archdsl tokenize`: text becomes shards of tokens, in several processes, resumable after a kill.

The source is cut into parts (archdsl/data/parts.py). In the folder ``unfinished`` a process writes
the tokens of a part as pieces, each with a record that is written last. As soon as enough pieces
are there, they are joined in the order of the source to shards, and deleted. index.json is written
last of all. What the shards hold depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from archdsl.data.chats import renderer
from archdsl.data.documents import SPLITS, find_all, named_column
from archdsl.data.hub_stream import find_streams
from archdsl.data.parts import (
    Division,
    Item,
    Part,
    cut,
    division_of,
    hashes_of,
    measure,
    span_is_of_text,
)
from archdsl.data.shard_index import (
    INDEX,
    TOKENIZER,
    UNFINISHED,
    Settings,
    Shard,
    ShardIndex,
    read_index,
)
from archdsl.data.text_format import text_format_of
from archdsl.data.tokenizers import (
    cuts_at_words,
    encode,
    end_of_document,
    make_tokenizer,
    read_tokenizer,
    tokenizer_key,
    vocab_size,
)
from archdsl.data.types import DataError, Split
from archdsl.errors import ArchdslError
from archdsl.files import (
    WriteError,
    atomic_file,
    disk_fault,
    exclusive,
    make_folder,
    read_bytes,
    remove_temporary_files,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHARD_TOKENS = 100_000_000
SMALLEST_PIECE, LARGEST_PIECE, PIECES = 2**20, 2**25, 64  # bytes of text; pieces of a small source

Tell = Callable[[str, int, int], None]  # what is done, and the bytes so far and in all


class Piece(BaseModel):
    """What a process wrote of a part: for each split, tokens, documents and bytes of text.

    ``items``: how many documents or pieces of long ones it has read. ``last``: whether the part
    ends with it.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    items: int
    last: bool
    counts: dict[Split, tuple[int, int, int]]


@dataclass(frozen=True)
class Plan:
    """What each process needs to know to tokenize a part. ``size``: bytes of a part."""

    folder: Path
    parts: Sequence[Part]
    column: str | None
    size: int
    division: Division

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.folder / UNFINISHED

    @property
    def largest(self) -> int:
        """The bytes of text of a piece; only a compressed part has more."""
        return 2 * self.size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        return read_tokenizer(self.folder / TOKENIZER)

    @cached_property
    def dtype(self) -> Any:
        """The type of a token."""
        return np.dtype("<u2" if vocab_size(self.tokenizer) <= 2**16 else "<u4")

    def items(self, number: int) -> Iterator[Item]:
        """Yields the documents of a part, by their splits."""
        render = renderer(self.folder / TOKENIZER)
        return self.division.pieces(self.parts[number], self.column, render)

    def path(self, number: int, piece: int, ending: str) -> Path:
        """Returns the path of a file of a piece."""
        return self.work / f"{number:07d}-{piece:05d}.{ending}"

    def records(self, number: int) -> list[Piece]:
        """Returns the records of the pieces of a part that are complete."""
        found: list[Piece] = []
        while (path := self.path(number, len(found), "json")).exists():
            found.append(Piece.model_validate_json(read_bytes(path, DataError)))
        return found

    def scan(self, number: int) -> None:
        """Writes the hashes of the documents of a part."""
        path = self.work / f"{number:07d}.hashes"
        if not path.exists():
            render = renderer(self.folder / TOKENIZER)
            found = hashes_of(self.parts[number], self.column, render)
            with _created(path) as file:
                file.write(found.data)

    def tokenize(self, number: int) -> None:
        """Writes the pieces of a part that are not there yet."""
        records = self.records(number)
        if records and records[-1].last:
            return
        items = islice(self.items(number), sum(record.items for record in records), None)
        pieces, last = _encoded(self.tokenizer, items), False
        while not last:
            last = self._write(number, len(records), pieces).last
            records = [*records, Piece(items=0, last=last, counts={})]

    def _write(self, number: int, piece: int, items: Iterator[Encoded]) -> Piece:
        """Writes the next piece, of about ``largest`` bytes of text, or less."""
        end = np.array([end_of_document(self.tokenizer)], self.dtype)
        counts = {split: [0, 0, 0] for split in SPLITS}
        read = total = 0
        with ExitStack() as stack:
            files = {
                split: stack.enter_context(_created(self.path(number, piece, f"{split}.bin")))
                for split in SPLITS
            }
            for split, tokens, length, ends in items:
                own = tokens.astype(self.dtype)
                files[split].write(own.data)
                if ends:
                    files[split].write(end.data)
                for i, more in enumerate((len(own) + ends, int(ends), length)):
                    counts[split][i] += more
                read, total = read + 1, total + length
                if total >= self.largest:
                    break
        last = total < self.largest
        record = Piece(
            items=read, last=last, counts={split: (n[0], n[1], n[2]) for split, n in counts.items()}
        )
        write_text(self.path(number, piece, "json"), record.model_dump_json())
        return record


Encoded = tuple[Split, Any, int, bool]  # the split, the tokens, bytes of text, whether it ends


def _encoded(tokenizer: Tokenizer, items: Iterator[Item]) -> Iterator[Encoded]:
    ahead: deque[Item] = deque()  # the tokenizer reads several texts before it answers

    def texts() -> Iterator[str]:
        for item in items:
            ahead.append(Item(item.split, "", item.ends))
            yield item.text

    for tokens, length in encode(tokenizer, texts()):
        item = ahead.popleft()
        yield item.split, tokens, length, item.ends


@contextmanager
def _created(path: Path) -> Iterator[Any]:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        yield file


# the processes


_plan: Plan | None = None  # of a worker


def _begin(plan: Plan, parent: Connection) -> None:
    """Prepares a worker, which ends as soon as the process that started it has ended."""
    global _plan
    _plan = plan
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        parent.poll(None)  # nothing is ever sent: it answers once the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(name: str, number: int) -> int:
    assert _plan is not None
    getattr(_plan, name)(number)
    return number


def _run(plan: Plan, name: str, workers: int, done: Callable[[int], None]) -> None:
    """Calls the method ``name`` of the plan for all parts; ``done`` is told which is finished."""
    numbers = range(len(plan.parts))
    if workers == 1 or len(numbers) == 1:
        for number in numbers:
            getattr(plan, name)(number)
            done(number)
        return
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(workers, len(numbers)), context, initializer=_begin, initargs=(plan, receiver)
    )
    try:
        left = {pool.submit(_work, name, number) for number in numbers}
        while left:
            finished, left = wait(left, return_when=FIRST_COMPLETED)
            for number in sorted(future.result() for future in finished):
                done(number)
        pool.shutdown()
    except BrokenProcessPool:
        raise ArchdslError(
            "a worker was ended from outside, probably because the memory was full: the same "
            "command goes on, and needs less memory with fewer --workers"
        ) from None
    finally:
        sender.close()
        receiver.close()
        pool.shutdown(cancel_futures=True)


# shards


class Joiner:
    """Joins the pieces of finished parts to shards, in the order of the source."""

    def __init__(self, plan: Plan, shard_tokens: int) -> None:
        self.plan, self.shard_tokens = plan, shard_tokens
        self.finished: set[int] = set()
        self.next = 0
        self.waiting: dict[Split, list[tuple[Path, tuple[int, int, int]]]] = {
            split: [] for split in SPLITS
        }
        self.shards: list[Shard] = []

    def add(self, number: int) -> None:
        """Takes note that a part is finished, and writes the shards that are full now."""
        self.finished.add(number)
        while self.next in self.finished:
            for piece, record in enumerate(self.plan.records(self.next)):
                for split, counts in record.counts.items():
                    self._append(split, self.plan.path(self.next, piece, f"{split}.bin"), counts)
            self.next += 1

    def finish(self) -> list[Shard]:
        """Writes what is left, and returns all shards by split."""
        for split in SPLITS:
            if self.waiting[split]:
                self._write(split)
        return sorted(self.shards, key=lambda shard: (SPLITS.index(shard.split), shard.file))

    def _append(self, split: Split, path: Path, counts: tuple[int, int, int]) -> None:
        waiting = self.waiting[split]
        if not counts[0]:
            with writing(path):
                path.unlink(missing_ok=True)
            return
        if waiting and sum(c[0] for _, c in waiting) + counts[0] > self.shard_tokens:
            self._write(split)
        self.waiting[split].append((path, counts))

    def _write(self, split: Split) -> None:
        pieces, self.waiting[split] = self.waiting[split], []
        number = sum(shard.split == split for shard in self.shards)
        name = f"{split}-{number:05d}.bin"
        record = self.plan.work / f"{name}.json"
        if record.exists():
            shard = Shard.model_validate_json(read_bytes(record, DataError))
        else:
            tokens, documents, text_bytes = map(sum, zip(*(c for _, c in pieces), strict=True))
            begin = b""
            if number == 0:
                end = end_of_document(self.plan.tokenizer)
                begin, tokens = np.array([end], self.plan.dtype).tobytes(), tokens + 1
            crc32 = _join(self.plan.folder / name, begin, [path for path, _ in pieces])
            shard = Shard(
                file=name,
                split=split,
                tokens=tokens,
                documents=documents,
                text_bytes=text_bytes,
                crc32=crc32,
            )
            write_text(record, shard.model_dump_json())
        self.shards.append(shard)
        for path, _ in pieces:
            with writing(path):
                path.unlink(missing_ok=True)


def _join(path: Path, begin: bytes, pieces: Sequence[Path]) -> int:
    """Writes the beginning and then the pieces into a file, and returns its checksum."""
    crc32 = zlib.crc32(begin)
    with _created(path) as file:
        file.write(begin)
        for piece in pieces:
            with piece.open("rb") as content:
                while block := content.read(2**20):
                    crc32 = zlib.crc32(block, crc32)
                    file.write(block)
    return crc32


# the whole


def tokenize(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    column: str | None = None,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    tell: Tell = lambda what, done, total: None,
) -> ShardIndex:
    """Writes the tokens of texts as shards into the folder ``out``; see `archdsl.data.shards`.

    The same call goes on after an interruption. ``sources``: files and folders, which are read as
    if they stood in one folder, or one data set of the Hub, which is read without storing it.
    ``tokenizer``, ``column``: see `archdsl.load_data`. ``workers``: the number of
    processes; default: one for each processor. ``shard_tokens``: the most tokens of a shard, but
    for one of a single longer piece. ``tell`` is told how far it is. Raises DataError if a source
    or the tokenizer is wrong, or ``out`` holds something else; WriteError if the disk is full.
    """
    workers = workers or len(os.sched_getaffinity(0))
    key = tokenizer_key(tokenizer)
    found = _found(sources, column, workers)
    settings = Settings(source=found.digest, tokenizer=key, shard_tokens=shard_tokens)
    if index := _finished(out, settings):
        return index
    make_folder(out / UNFINISHED)
    refusal = ArchdslError(f"another process is tokenizing into {out}: wait until it ends")
    with _full_disk(out), exclusive(out / UNFINISHED, refusal):
        remove_temporary_files(out)
        remove_temporary_files(out / UNFINISHED)
        _same_settings(out, settings)
        plan = _planned(found, out, tokenizer, key, workers, shard_tokens, tell)
        index = _tokenized(plan, settings, workers, tell)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return index


class Found(NamedTuple):
    """What is to be tokenized: a SHA-256 of it, its bytes on disk if known, and its parts.

    ``parts`` is called with the bytes of a part and whether texts may be cut.
    """

    digest: str
    bytes: int
    column: str | None
    parts: Callable[[int, bool], Sequence[Part]]


def _found(sources: Sequence[str], column: str | None, workers: int) -> Found:
    """Finds the files, or the data set of the Hub. Raises DataError if there is no such thing."""
    name, own = named_column(sources[0], column)
    if len(sources) == 1 and name.startswith("hf:"):
        streams, digest = find_streams(name, own)
        parts = [Part(split, (), 0, one) for split, some in streams.items() for one in some]
        return Found(digest, PIECES * LARGEST_PIECE, own, lambda *_: parts)
    files = find_all(sources, column, workers)
    total = sum(file.stat().st_size for some in files.by_split.values() for file in some)
    return Found(files.digest, total, files.column, partial(cut, files.by_split))


@contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """Says what a disk that took no more means for the shards."""
    try:
        yield
    except (WriteError, OSError) as error:
        if isinstance(error, WriteError) or disk_fault(error):
            told = error if isinstance(error, WriteError) else f"{out}: {disk_fault(error)}"
            raise WriteError(
                f"{told}. What is finished is kept; once there is room, the same command goes on"
            ) from None
        raise


def _finished(out: Path, settings: Settings) -> ShardIndex | None:
    """Returns the index of a folder that is complete already.

    Raises DataError if the folder holds something else, or was made with other settings.
    """
    if (out / INDEX).exists():
        index = read_index(out)
        _refuse_others(out, index.settings, settings)
        return index
    begun = (out / UNFINISHED / "settings.json").exists()
    if out.exists() and not begun and (not out.is_dir() or _names(out) - {UNFINISHED}):
        raise DataError(f"{str(out)!r} is not an empty folder: choose another --out")
    return None


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _same_settings(out: Path, settings: Settings) -> None:
    """Keeps the settings, or raises DataError if the folder was begun with others."""
    path = out / UNFINISHED / "settings.json"
    if path.exists():
        begun = Settings.model_validate_json(read_bytes(path, DataError))
        _refuse_others(out, begun, settings)
    else:
        write_text(path, settings.model_dump_json())


def _refuse_others(out: Path, stood: Settings, given: Settings) -> None:
    pairs = {
        "--tokenizer": (stood.tokenizer, given.tokenizer),
        "--shard-tokens": (stood.shard_tokens, given.shard_tokens),
        "the text": (stood.source, given.source),
    }
    for what, (before, now) in pairs.items():
        if before != now:
            change = "" if what == "the text" else f" ({before} then, {now} now)"
            raise DataError(
                f"{str(out)!r} holds shards of other settings: {what} differs{change}. Choose "
                "another --out, or delete that folder"
            )


def _planned(
    found: Found,
    out: Path,
    choice: str,
    key: str,
    workers: int,
    shard_tokens: int,
    tell: Tell,
) -> Plan:
    """Cuts the files into parts, divides their documents into splits, and writes the tokenizer."""
    size = min(max(found.bytes // PIECES, SMALLEST_PIECE), LARGEST_PIECE, -(-shard_tokens // 2))
    own = None if key.startswith("bpe:") else make_tokenizer(choice, ())
    if own is not None:
        _write_tokenizer(out, own)
    cut_texts = own is None or cuts_at_words(own)
    parts = found.parts(size, cut_texts)
    plan = Plan(out, parts, found.column, size, Division(missing=[]))
    plan = replace(plan, division=_division(plan, workers, tell))
    if own is None and not (out / TOKENIZER).exists():
        tell("training the tokenizer", 0, 0)
        items = (item for number in range(len(plan.parts)) for item in plan.items(number))
        _write_tokenizer(out, make_tokenizer(choice, (i.text for i in items if i.split == "train")))
    return plan


def _write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    with writing(out):
        if text_format := text_format_of(tokenizer):
            text_format.write(out)
    write_text(out / TOKENIZER, tokenizer.to_str(pretty=True))


def _division(plan: Plan, workers: int, tell: Tell) -> Division:
    """Returns how the training text is divided; reads all of it if a split is missing."""
    path = plan.work / "division.json"
    if path.exists():
        return Division.model_validate_json(read_bytes(path, DataError))
    splits = {part.split for part in plan.parts}
    missing = [split for split in SPLITS if split not in splits]
    if not missing:
        return Division(missing=[])
    training = [part for part in plan.parts if part.split == "train"]
    scanned = replace(plan, parts=training)
    _run(scanned, "scan", workers, _counting(training, "dividing the documents", tell))
    spans: dict[str, list[Any]] = {}
    for span in (span for part in training for span in part.spans):
        if span.of > 1 and span_is_of_text(span):
            spans.setdefault(str(span.file), []).append(span)
    long = {name: measure(own) for name, own in spans.items()}
    files = [plan.work / f"{number:07d}.hashes" for number in range(len(training))]
    hashes = np.concatenate([np.fromfile(file, np.uint64) for file in files])
    division = division_of(hashes, long, missing)
    write_text(path, division.model_dump_json())
    for file in files:
        file.unlink()
    return division


def _counting(parts: Sequence[Part], what: str, tell: Tell) -> Callable[[int], None]:
    """Returns what is called with the number of each part that is done."""
    total, done = sum(part.bytes for part in parts), 0

    def count(number: int) -> None:
        nonlocal done
        done += parts[number].bytes
        tell(what, done, total)

    tell(what, 0, total)
    return count


def _tokenized(plan: Plan, settings: Settings, workers: int, tell: Tell) -> ShardIndex:
    """Writes the shards and then the index. Raises DataError if a split is empty."""
    joiner = Joiner(plan, settings.shard_tokens)
    count = _counting(plan.parts, "tokenizing", tell)

    def done(number: int) -> None:
        joiner.add(number)
        count(number)

    _run(plan, "tokenize", workers, done)
    shards = joiner.finish()
    if missing := [split for split in SPLITS if all(s.split != split for s in shards)]:
        raise DataError(
            f"too little text: the split {missing[0]} is empty. What is missing is taken from the "
            "training text, which needs 20 different documents, or one of 20 characters"
        )
    index = ShardIndex(
        dtype=plan.dtype.str,
        tokenizer=hashlib.sha256((plan.folder / TOKENIZER).read_bytes()).hexdigest(),
        settings=settings,
        shards=shards,
    )
    write_text(plan.folder / INDEX, json.dumps(index.model_dump(mode="json"), indent=1) + "\n")
    return index
