"""Every format gives its text as it is written, and what is no text is refused with its place."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archdsl.data.folders import find_files
from archdsl.data.loading import load_data
from archdsl.data.reading import Span, json_rows, read_texts
from archdsl.data.types import DataError
from tests.texts import document, documents, load_text, text_of, write_jsonl


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def parquet(column: str, text: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: pa.array([text])}), sink)
    return sink.getvalue().to_pybytes()


def arrow(column: str, text: Any) -> bytes:
    return streamed(pa.table({column: pa.array([text])}))


def streamed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_file(column: str, text: Any) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.table({column: pa.array([text])})
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


def lines(column: str, text: Any) -> bytes:
    return (json.dumps({column: text, "year": 1}) + "\n").encode()


WRITERS: dict[str, Callable[[str, Any], bytes]] = {
    "a.txt": lambda _, text: text.encode(),
    "a.jsonl": lines,
    "b.jsonl": lambda column, text: b"\xef\xbb\xbf\n" + lines(column, text).strip(),
    "a.ndjson": lines,
    "a.json": lambda column, text: json.dumps([{column: text}], indent=1).encode(),
    "b.json": lambda column, text: json.dumps({column: text}, indent=1).encode(),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "b.arrow": arrow_file,
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_text(name: str, compression: str, tmp_path: Path) -> None:
    text = document(0, 100)
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSORS[compression](WRITERS[name]("text", text)))
    assert list(read_texts([path])) == [text]


def test_kinds_may_be_mixed_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [document(seed, 400) for seed in range(len(WRITERS))]
    for text, (name, write) in zip(texts, WRITERS.items(), strict=True):
        (folder / f"{name}.bz2").write_bytes(bz2.compress(write("text", text)))
    found = documents(load_text(folder, tmp_path / "cache").tokens["train"])
    assert sorted(text[:900] for text in found) == sorted(text[:900] for text in texts)


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    rows = {name: datasets.Dataset.from_dict({"text": [name * 9]}) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    data = load_text(tmp_path / "saved", tmp_path / "cache")
    assert documents(data.tokens["test"]) == ["test" * 9]
    kept = rows["train"].filter(lambda row: False)
    datasets.concatenate_datasets([rows["test"], kept]).select([0]).save_to_disk(tmp_path / "one")
    assert text_of(load_text(tmp_path / "one", tmp_path / "cache")) == "test" * 9


# columns


@pytest.mark.parametrize("column", ["text", "content", "document"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_column_is_text_by_its_name(name: str, column: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](column, "It was"))
    assert list(read_texts([tmp_path / name])) == ["It was"]


def row_of(name: str, row: dict[str, Any]) -> bytes:
    if name == "a.jsonl":
        return json.dumps(row).encode()
    table = pa.Table.from_pylist([row])
    if name == "a.arrow":
        return streamed(table)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


CHAT = [{"role": "user", "content": "hi"}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"id": "x", "messages": CHAT},
        "column 'messages' holds chats.*chat template.* are 'id', 'mess",
    ),
    ({"id": "x", "conversations": CHAT}, "column 'conversations' holds chats"),
    ({"id": "x", "input_ids": [1, 2]}, "column 'input_ids' holds tokens. Pass the text"),
    ({"url": "http", "text": ["a", "b"]}, "the column 'text' holds "),
    ({"url": "http", "content": 3}, "the column 'content' holds "),
    ({"story": "x"}, "has no column text, content or document: name .* --column; .* are 'story'"),
    ({"content": "x", "document": "y"}, "content and document may both .* choose one with --col"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_no_other_column_is_taken_for_the_text(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(row_of(name, row))
    with pytest.raises(DataError, match=message) as error:
        load_data(tmp_path, cache=tmp_path / "cache")
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_column_may_be_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(row_of(name, {"text": "no", "story": document(0, 100)}))
    data = load_data(tmp_path / name, column="story", cache=tmp_path / "cache")
    assert data.name == f"{tmp_path / name}::story"
    again = load_text(data.name, tmp_path / "cache")  # as the name stands in a checkpoint
    assert (again.fingerprint, text_of(again)) == (data.fingerprint, document(0, 100))
    with pytest.raises(DataError, match="has no column 'stori'; the columns are 'text', 'story'"):
        load_data(tmp_path / name, column="stori", cache=tmp_path / "cache")


@pytest.mark.parametrize("source", [None, "sotu", "skill:p-hop", "a.txt"])
def test_a_column_of_data_without_columns_is_refused(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    with pytest.raises(DataError, match="has no column 'story'"):
        load_data(source, column="story")
    with pytest.raises(DataError, match="has no column 'story'"):
        load_data(f"{source or 'sotu'}::story")


# values


def test_text_stays_as_it_is_written(tmp_path: Path) -> None:
    texts = ["2024-01-05", "2024-01-06T10:00:00Z", "12", "1e5", "true", "null", "a\u2028b\r\n\t"]
    path = tmp_path / "a.jsonl"
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_texts([path])) == texts


def test_null_is_no_document_also_in_all_of_the_first_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(row_of(name, {"text": None}))
    (tmp_path / "d.jsonl").write_bytes(lines("text", "It was"))
    assert list(read_texts(sorted(tmp_path.iterdir()))) == ["It was"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_type_of_string_is_text(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array(["It was", None], pa.string()).cast(kind)
    (tmp_path / "a.arrow").write_bytes(streamed(pa.table({"text": column})))
    assert list(read_texts([tmp_path / "a.arrow"])) == ["It was"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines("text", "x") + lines("text", 3), "line 2: the column 'text' holds 3; expected a te"),
        (lines("text", "x") + b'"x"\n', "line 2 is 'x'; expected an object with a text, such as"),
        (lines("text", "x") + b'{"text": "y\n', "line 2 is not JSON: "),
        (lines("text", "x") + b'{"text": "y', "line 2 is not JSON: .* may be cut off"),
        (lines("text", "x") + b'{"text": "\xff"}', "line 2 is not UTF-8 text: .* byte 10 of it"),
        (lines("text", "x") + lines("messages", []), "line 2: .* 'messages' holds chats"),
        (b'{"text": "\\ud800"}', "line 1: .* holds half of a surrogate pair"),
        (b'[{"text": "x"}, {"text": 3}]', "row 2: the column 'text' holds 3"),
        (b'[{"text": "x"}, {"te', "is not JSON: .* cut off"),
    ],
)
def test_the_line_of_what_is_no_text_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"a.jsonl'.* {message}"):
        list(read_texts([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "name",
    [f"a.txt{ending}" for ending in COMPRESSORS if ending]
    + ["a.parquet", "a.arrow", "b.arrow", "a.parquet.gz"],
)
def test_a_cut_off_file_is_named(name: str, share: float, tmp_path: Path) -> None:
    inner, compression = Path(name), ""
    if inner.suffix in COMPRESSORS:
        inner, compression = inner.with_suffix(""), inner.suffix
    content = COMPRESSORS[compression](WRITERS[inner.name]("text", document(0, 5000)))
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        DataError, match=f"{name}' is (cut off|damaged or cannot be read): \\w"
    ) as e:
        load_data(path, cache=tmp_path / "cache")
    assert "\n" not in str(e.value)
    assert "cache" not in str(e.value).replace(str(tmp_path), "")


def test_a_stream_that_ends_between_two_tables_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(arrow("text", "It was")[:-8])
    with pytest.raises(DataError, match="the end of the stream is missing"):
        list(read_texts([path]))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_whose_name_says_a_wrong_compression_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_text("plain text, not compressed at all")
    with pytest.raises(DataError, match=f"a.txt{ending}' is damaged or cannot be read: "):
        list(read_texts([path]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("write", [arrow, arrow_file, parquet])
def test_a_damaged_table_does_not_end_the_process(
    write: Callable[[str, Any], bytes], seed: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(seed)
    content = np.frombuffer(write("text", document(0, 30)), np.uint8).copy()
    content[random.integers(len(content), size=5)] = random.integers(256, size=5)
    path = tmp_path / f"a.{'parquet' if write is parquet else 'arrow'}"
    path.write_bytes(content.tobytes())
    with contextlib.suppress(DataError):
        assert len(list(read_texts([path]))) <= 1


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_the_same_name_are_refused(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match="2 columns are called 'text': rename all but one"):
        list(read_texts([file]))


def test_the_mark_before_a_utf_8_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfIt was")
    assert list(read_texts([tmp_path / "a.txt"])) == ["It was"]


@pytest.mark.parametrize(("most", "times"), [(2**28, 1), (100, 4)])
def test_rows_are_parsed_once_unless_they_are_too_many_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, times: int
) -> None:
    lines = "".join(json.dumps({"text": document(n)}) + "\n" for n in range(60))
    (tmp_path / "a.jsonl").write_text(lines)
    whole = load_text(tmp_path / "a.jsonl", tmp_path / "whole")
    parsed: list[Span] = []

    def noted(span: Span) -> Iterator[tuple[str, Any]]:
        parsed.append(span)
        return json_rows(span)

    monkeypatch.setattr("archdsl.data.documents.MAX_KEPT", most)
    monkeypatch.setattr("archdsl.data.reading.json_rows", noted)
    data = load_text(tmp_path / "a.jsonl", tmp_path / "cache")
    assert len(parsed) == times
    assert text_of(data) == text_of(whole)


def test_all_kinds_of_files_of_a_folder_are_read_together(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "a.jsonl", [document(1)])
    (folder / "b.csv").write_text('id,text\n7,"two\nlines, ""quoted"""\n8,\n')
    (folder / "c.tsv").write_text("text\tid\nby, tabs\t1\n")
    (folder / "d.md").write_text("# A title")
    texts = list(read_texts(sorted(folder.iterdir())))
    assert texts == [document(1), 'two\nlines, "quoted"', "", "by, tabs", "# A title"]
    assert set(find_files(folder).by_split["train"]) == set(folder.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,name\n1,x\n", "has no column text, content or document: name the column"),
        ('text\n"open', "is damaged or cannot be read: unexpected end of data"),
    ],
)
def test_a_wrong_csv_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_texts([tmp_path / "a.csv"]))
