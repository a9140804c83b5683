"""Reads the documents of files: text, JSON, parquet, arrow and CSV, also compressed.

JSON is not read by the library datasets, which infers types: it turns texts that look like dates
into time stamps, and refuses a number among texts without saying where it is.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from archdsl.data.chats import CHAT_COLUMNS
from archdsl.data.folders import COMPRESSED, few, format_of
from archdsl.data.types import DataError
from archdsl.errors import describe

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_COLUMNS = ("text", "content", "document")
CHATS = (
    "chats, which become text by the chat template of a tokenizer. Train a checkpoint that has "
    "one (archdsl import keeps it), or write them as text"
)
NOT_TEXT = {
    **dict.fromkeys(CHAT_COLUMNS, CHATS),
    "input_ids": "tokens. Pass the text that they were made of",
}
COLUMNS_SHOWN = 20  # of an error
LARGEST_FIELD = 2**30  # characters of a field of a .csv
ROWS_AT_ONCE = 64  # limits the memory that a table needs
Render = Callable[[Any, str], str]
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # the last bytes of a stream of arrow tables


class Span(NamedTuple):
    """A part of a file: bytes of a text or of JSON lines, or row groups of a parquet table.

    It is the whole file by default. ``number``, ``of``: its place among the parts of the file.
    """

    file: Path
    begin: int = 0
    end: int | None = None
    number: int = 0
    of: int = 1


def read_texts(
    files: Iterable[Path],
    column: str | None = None,
    render: Render | None = None,
    without_text: dict[Path, int] | None = None,
) -> Iterator[str]:
    """Yields the documents of the files.

    ``column``: that of the text, if it has an unusual name. ``render``: returns the text of a
    chat, given its messages and its place; default: chats are refused. ``without_text`` is given
    the number of rows of each file that have no text, because it is null or missing.
    Raises DataError, which names the file and the place, if something is no text.
    """
    for file in files:
        missing = 0
        for text in read_span(Span(file), column, render):
            if text is None:
                missing += 1
            else:
                yield text
        if without_text is not None:
            without_text[file] = missing


def read_span(
    span: Span, column: str | None = None, render: Render | None = None
) -> Iterator[str | None]:
    """Yields the documents of a part of a file, and None for a row without text.

    See `read_texts`.
    """
    with _blamed_on(span.file):
        yield from READERS[format_of(span.file) or "text"](span, column, render)


@contextmanager
def _blamed_on(file: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise DataError(
            f"{str(file)!r} is cut off: the end of what is compressed is missing; copy or download "
            "it again"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start:,}; convert it"
        ) from None
    except _errors() as error:
        reason = str(error).split("\n")[0][:300]
        raise DataError(f"{str(file)!r} is damaged or cannot be read: {reason}") from None


def _errors() -> tuple[type[Exception], ...]:
    """Returns what damaged files raise. pyarrow is imported only when something has failed."""
    import pyarrow as pa

    return OSError, ValueError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException


def open_bytes(file: Path) -> IO[bytes]:
    """Opens a file, and decompresses it if its name says so."""
    ending = file.suffix.lower()
    if ending == ".zst":
        return _open_zst(file)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(ending, open)(file, "rb")


def _open_zst(file: Path) -> IO[bytes]:
    import pyarrow as pa

    stream: Any = pa.input_stream(str(file), compression="zstd")
    buffered: Any = io.BufferedReader(stream)
    return buffered


def _text(span: Span, column: str | None, render: Render | None) -> Iterator[str]:
    content = open_bytes(span.file)
    if span.end is not None:
        with content:
            content.seek(span.begin)
            content = io.BytesIO(content.read(span.end - span.begin))
    encoding = "utf-8" if span.begin else "utf-8-sig"  # without the mark
    with io.TextIOWrapper(content, encoding=encoding) as characters:
        text = characters.read()
    yield text


def _json(span: Span, column: str | None, render: Render | None) -> Iterator[str | None]:
    name, columns = f"{str(span.file)!r}", dict[str, None]()
    found = span.begin > 0  # the first part of a file tells whether there is such a column
    for place, row in json_rows(span):
        if not isinstance(row, dict):
            raise DataError(
                f"{name}: {place} is {describe(row)}; expected an object with a text, such "
                'as {"text": "It was"}'
            )
        own = column or _known_column(row, name, render)
        if own is not None and own in row:
            found = True
            yield from _checked(row[own], f"{name}: {place}", own, render)
        elif not column and NOT_TEXT.keys() & row:
            raise _no_column(f"{name}: {place}", row, None)
        else:
            columns |= {} if found else dict.fromkeys(row)
            yield None
    if columns and not found:
        raise _no_column(name, columns, column)


def json_rows(span: Span) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file of JSON lines or of one JSON array, with their places in it.

    Of a part of a file, the rows are those of the lines that begin in it.
    """
    name = f"{str(span.file)!r}"
    with open_bytes(span.file) as content:
        lines = enumerate(_lines(content, span), 1)
        first = next((entry for entry in lines if entry[1].strip(b"\xef\xbb\xbf \t\r\n")), None)
        if first is None:
            return
        if span.end is None and _is_document(first[1]):
            whole = _parsed(first[1] + content.read(), name)
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
            return
        after = f" after byte {span.begin:,}" if span.begin else ""
        for number, line in chain([first], lines):
            if line.strip():
                place = f"line {number}{after}"
                yield place, _parsed(line, f"{name}: {place}")


def _lines(content: IO[bytes], span: Span) -> Iterator[bytes]:
    """Yields the lines of a part of a file, which begins and ends with a line."""
    if span.end is None:
        yield from content
        return
    content.seek(span.begin)
    place = span.begin
    while place < span.end and (line := content.readline()):
        place += len(line)
        yield line


def is_json_lines(file: Path) -> bool:
    """Tells whether each line of a JSON file is a row, and the file no array or single object."""
    with open_bytes(file) as content:
        first = next((line for line in content if line.strip(b"\xef\xbb\xbf \t\r\n")), b"[")
        return not _is_document(first)


def _is_document(line: bytes) -> bool:
    """Tells whether a JSON value begins in this line, but does not end in it, or is an array."""
    start = line.removeprefix(b"\xef\xbb\xbf").strip()
    return start.startswith(b"[") or start == b"{"


def _parsed(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8 text: {error.reason} at byte {error.start:,} of it; convert it"
        ) from None
    except (ValueError, RecursionError) as error:
        cut = "" if content.endswith(b"\n") else ". The file may be cut off"
        raise DataError(f"{place} is not JSON: {error}{cut}") from None


def text_column(columns: Iterable[str], place: str) -> str | None:
    """Returns the column that is text by its name; None if there is none.

    Raises DataError if two columns may be meant.
    """
    found = [name for name in TEXT_COLUMNS if name in columns]
    if len(found) > 1 and found[0] != "text":
        raise DataError(
            f"{place}: the columns {' and '.join(found)} may both be the text: choose one "
            "with --column"
        )
    return found[0] if found else None


def _known_column(columns: Iterable[str], place: str, render: Render | None) -> str | None:
    """Returns the column of the text, or else that of chats if they can be rendered."""
    names = list(columns)
    chats = [name for name in CHAT_COLUMNS if render and name in names]
    return text_column(names, place) or (chats[0] if chats else None)


def _no_column(place: str, columns: Iterable[str], wanted: str | None) -> DataError:
    names = few(columns, COLUMNS_SHOWN)
    if wanted:
        return DataError(f"{place} has no column {wanted!r}; the columns are {names}")
    for name, content in NOT_TEXT.items():
        if name in columns:
            return DataError(
                f"{place}: the column {name!r} holds {content}, or name another column with "
                f"--column; the columns are {names}"
            )
    return DataError(
        f"{place} has no column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}: name "
        f"the column of the text with --column; the columns are {names}"
    )


def _checked(value: Any, place: str, column: str, render: Render | None) -> Iterator[str | None]:
    """Yields a value if it is a text or null, and a chat as text."""
    if value is None:
        yield None
        return
    if render and isinstance(value, list):
        value = render(value, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: the column {column!r} holds {describe(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: the column {column!r} holds half of a surrogate pair, which is no character"
        ) from None
    yield value


def texts_of_rows(
    rows: Iterable[Mapping[str, Any]], place: str, column: str | None, render: Render | None
) -> Iterator[str | None]:
    """Yields the texts of rows of a data set, and None for a row without text.

    Raises DataError if there is no such column, or something is no text.
    """
    for number, row in enumerate(rows, 1):
        own = column or _known_column(row, place, render)
        if own is None or own not in row:
            raise _no_column(place, row, column)
        yield from _checked(row[own], f"{place}: row {number}", own, render)


def _csv(span: Span, column: str | None, render: Render | None) -> Iterator[str | None]:
    """Yields the texts of a table of text whose first row names the columns."""
    csv.field_size_limit(LARGEST_FIELD)
    ending = Path(span.file.stem if span.file.suffix in COMPRESSED else span.file.name).suffix
    with io.TextIOWrapper(open_bytes(span.file), encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(
            lines, delimiter="\t" if ending.lower() == ".tsv" else ",", strict=True
        )
        name = f"{str(span.file)!r}"
        names = rows.fieldnames or []
        own = column or text_column(names, name)
        if own is None or own not in names:
            raise _no_column(name, names, column)
        for row in rows:
            yield from _checked(row[own], f"{name}: line {rows.line_num}", own, None)


# tables


def _parquet(span: Span, column: str | None, render: Render | None) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    place = f"{str(span.file)!r}"
    with pq.ParquetFile(_table_bytes(span.file)) as table:
        own = column_of(table.schema_arrow, column, place, render)
        end = table.num_row_groups if span.end is None else span.end
        batches = table.iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=list(range(span.begin, end)), columns=[own]
        )
        before = sum(table.metadata.row_group(group).num_rows for group in range(span.begin))
        yield from _column(batches, own, place, render, before)


def _arrow(span: Span, column: str | None, render: Render | None) -> Iterator[str | None]:
    import pyarrow as pa

    file = span.file
    content = _table_bytes(file)
    if content.read(6) == b"ARROW1":
        table = pa.ipc.open_file(content)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
        own = column_of(table.schema, column, f"{str(file)!r}", render)
    else:
        content.seek(content.size() - len(END_OF_STREAM))
        if content.read() != END_OF_STREAM:
            raise ValueError("the end of the stream is missing; copy or download the file again")
        content.seek(0)
        batches = stream = pa.ipc.open_stream(content)
        own = column_of(stream.schema, column, f"{str(file)!r}", render)
    yield from _column(batches, own, f"{str(file)!r}", render)


def _table_bytes(file: Path) -> pa.NativeFile:
    """Maps a file into memory, or decompresses it there."""
    import pyarrow as pa

    if file.suffix.lower() in (".parquet", ".arrow"):
        return pa.memory_map(str(file))
    with open_bytes(file) as content:
        return pa.BufferReader(content.read())


def _column(
    batches: Iterable[pa.RecordBatch],
    column: str,
    place: str,
    render: Render | None,
    before: int = 0,
) -> Iterator[str | None]:
    row = before
    for batch in batches:
        texts = batch.column(column)
        texts.validate(full=True)  # reading a damaged table may end the process
        for start in range(0, len(texts), ROWS_AT_ONCE):
            for value in texts.slice(start, ROWS_AT_ONCE).to_pylist():
                row += 1
                yield from _checked(value, f"{place}: row {row}", column, render)


def column_of(
    schema: pa.Schema, wanted: str | None, place: str, render: Render | None = None
) -> str:
    """Returns the column of the text of a table. Raises DataError if there is none.

    It may be a column of chats if ``render`` is given.
    """
    import pyarrow.types as kinds

    column = wanted or _known_column(schema.names, place, render)
    if column is None or column not in schema.names:
        raise _no_column(place, schema.names, wanted)
    if (count := schema.names.count(column)) > 1:
        raise DataError(f"{place}: {count} columns are called {column!r}: rename all but one")
    kind = schema.field(column).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null)
    is_chat = render is not None and (kinds.is_list(kind) or kinds.is_large_list(kind))
    if not is_chat and not any(is_text(kind) for is_text in texts):
        raise DataError(
            f"{place}: the column {column!r} holds values of the type {kind}; expected "
            f"texts. The columns are {few(schema.names, COLUMNS_SHOWN)}"
        )
    return column


READERS: dict[str, Callable[[Span, str | None, Render | None], Iterator[str | None]]] = {
    "text": _text,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
}
