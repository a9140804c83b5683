"""Every kind of source gives its text, and no document is in two splits."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import archdsl
from archdsl.data.documents import SPLITS, divide
from archdsl.data.loading import load_data
from archdsl.data.types import DataError
from tests.texts import document, documents, load_text, text_of, write_jsonl


def test_the_embedded_corpus_is_split_by_year(tmp_path: Path) -> None:
    sotu = load_text(None, tmp_path)
    path = Path(archdsl.__file__).parent / "data" / "corpus" / "sotu.jsonl.xz"
    speeches = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
    remainders = {"validation": {9}, "test": {19}, "train": set(range(20)) - {9, 19}}
    for split, count in zip(SPLITS, (210, 11, 12), strict=True):
        found = documents(sotu.tokens[split])
        assert len(found) == count
        assert found == [s["text"] for s in speeches if s["year"] % 20 in remainders[split]]
    assert sum(sotu.text_bytes.values()) == sum(len(s["text"].encode()) for s in speeches)


@given(st.lists(st.integers(0, 40)), st.sampled_from([2, 3]))
def test_equal_documents_are_never_in_two_splits(more: list[int], count: int) -> None:
    texts = [document(seed, 3) for seed in [*range(20), *more]]
    divided = divide(lambda: iter(texts), SPLITS[1:count])
    parts = [list(divided[split]()) for split in SPLITS[:count]]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert sum(len(set(part)) for part in parts) == len(set(texts))
    assert all(parts)


def test_a_twentieth_of_the_documents_is_held_out_in_every_order() -> None:
    texts = [document(seed) for seed in range(100)]
    forth = divide(lambda: iter(texts), ["validation", "test"])
    back = divide(lambda: reversed(texts), ["validation", "test"])
    assert [len(list(forth[split]())) for split in SPLITS] == [90, 5, 5]
    assert all(set(forth[split]()) == set(back[split]()) for split in SPLITS)


def test_a_single_document_is_divided_into_three_parts(tmp_path: Path) -> None:
    text = document(0, 400)
    (tmp_path / "novel.txt").write_text(text)
    data = load_text(tmp_path / "novel.txt", tmp_path)
    parts = [documents(data.tokens[split]) for split in SPLITS]
    assert text_of(data) == text
    assert [len(part[0]) * 20 // len(text) for part in parts] == [18, 0, 0]
    assert len(parts[1][0]) == len(parts[2][0]) == len(text) // 20


def test_splits_named_by_files_are_used(tmp_path: Path) -> None:
    for name, seed in (("train-00-of-01.jsonl", 1), ("valid.jsonl", 2), ("test.jsonl", 3)):
        write_jsonl(tmp_path / "set" / name, [document(seed)])
    data = load_text(tmp_path / "set", tmp_path / "cache")
    assert [documents(data.tokens[split]) for split in SPLITS] == [[document(s)] for s in (1, 2, 3)]


def test_a_single_file_named_test_is_divided_like_any_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", [document(seed) for seed in range(40)])
    data = load_text(tmp_path / "test.jsonl", tmp_path / "cache")
    assert [len(documents(data.tokens[split])) for split in SPLITS] == [36, 2, 2]


def test_only_the_missing_split_is_taken_from_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [document(seed) for seed in range(40)])
    write_jsonl(tmp_path / "set" / "dev.jsonl", [document(99)])
    data = load_text(tmp_path / "set", tmp_path / "cache")
    assert [len(documents(data.tokens[split])) for split in SPLITS] == [38, 1, 2]
    assert documents(data.tokens["validation"]) == [document(99)]


# reading


def test_empty_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": document(seed)} for seed in range(20)] + [{"text": ""}, {"text": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_text(path, tmp_path)
    assert sum(len(documents(data.tokens[split])) for split in SPLITS) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no file or folder '.*'; expected nothing .the embedded corpus., a file"),
        (
            {"": {}},
            "no .txt, .md, .jsonl, .ndjson, .json, .parquet, .arrow, .csv, .tsv file in the folder",
        ),
        ({"/a.pkl": b"x"}, "no .txt, .* file in the folder '.*'; 'a.pkl' cannot be used"),
        ({"/a.txt": b"\xff\xfe"}, "a.txt' is not UTF-8 text: .* at byte 0; convert it"),
        ({"/a.jsonl": b'{"text": '}, "a.jsonl': line 1 is not JSON"),
        ({"/a.json": b'[{"a": "x", "b": "y"}]'}, "a.json' has no column text, .* are 'a', 'b'"),
        ({"/a.json": b'[{"text": 3}]'}, "a.json': row 1: the column 'text' holds 3"),
        ({"/a.txt": b"short"}, "the split validation is empty. It is .* needs 20 different doc"),
        (
            {"/train.txt": b"long enough to be cut", "/dev.jsonl": b'{"text": null}'},
            "too little text, the split validation is empty$",
        ),
        ({"/a.parquet": b"PAR1"}, "a.parquet' is damaged or cannot be read: "),
    ],
)
def test_unreadable_text_gives_an_error_of_one_line(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    for name, what in content.items():
        folder.mkdir(exist_ok=True)
        if what:
            Path(f"{folder}{name}").write_bytes(what)
    with pytest.raises(DataError, match=message) as error:
        load_data(str(folder), cache=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "tokens").glob("*.json"))


def test_a_file_of_an_unknown_format_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not end in \.txt"):
        load_data(__file__)


def test_the_error_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    message = (
        "'hf:wikitext/wikitext-103-raw-v1' could not be fetched: .* download the text and pass"
    )
    with pytest.raises(DataError, match=message):
        load_data("hf:wikitext/wikitext-103-raw-v1", cache=tmp_path)


def test_other_splits_of_a_hub_dataset_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["dev", "validation", "train", "unsupervised", "eval"]
    rows = {n: datasets.Dataset.from_dict({"text": [document(i)]}) for i, n in enumerate(names)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(rows))
    monkeypatch.chdir(tmp_path)
    data = load_text("hf:one", tmp_path)
    assert [documents(data.tokens[split]) for split in SPLITS] == [[document(i)] for i in (2, 1, 4)]
    assert data.summary()[3:] == [
        "left out: 'split dev' (validation is there)",
        "left out: 'split unsupervised' (for no known use)",
    ]


def test_a_column_of_a_hub_dataset_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": datasets.Dataset.from_dict({"id": ["x"], "story": [document(0, 100)]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(rows))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"'hf:one' has no column text, .* the columns are 'id', 'story'"
    ):
        load_data("hf:one", cache=tmp_path)
    assert text_of(load_text("hf:one::story", tmp_path)) == document(0, 100)


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c/d", "hf:a//b"])
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="expected hf:DATASET"):
        load_data(name)


@pytest.mark.parametrize(
    ("name", "found_at"),
    [
        ("hf:one", ("one", None)),
        ("hf:one/two", ("one", "two")),
        ("hf:one/two", ("one/two", None)),
        ("hf:one/two/three", ("one/two", "three")),
    ],
)
def test_the_splits_of_a_hub_dataset_are_used(
    name: str, found_at: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(path: str, config: str | None, cache_dir: str) -> datasets.DatasetDict:
        if (path, config) != found_at:
            raise datasets.exceptions.DatasetNotFoundError(path)
        texts = {"train": first, "validation": document(2), "test": document(3)}
        rows = {name: datasets.Dataset.from_dict({"text": [t]}) for name, t in texts.items()}
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    first, held = document(0), [[document(2)], [document(3)]]
    for text in (first, document(1)):
        data = load_text(name, tmp_path)
        assert [documents(data.tokens[split]) for split in SPLITS] == [[text], *held]
        first = document(1)  # the dataset has changed


def test_a_local_folder_is_not_used_as_a_hub_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "wikitext" / "a.jsonl", [document(0)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the local file or folder 'wikitext' has the same name"):
        load_data("hf:wikitext", cache=tmp_path)
