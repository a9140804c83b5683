"""Held-out files are never trained on, and what is left out is said."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import datasets
import pytest

from archdsl.data.documents import SPLITS
from archdsl.data.folders import SPLIT_WORDS, find_files
from archdsl.data.types import DataError
from tests.texts import document, documents, load_text, text_of, write_jsonl


def write(folder: Path, names: list[str]) -> Path:
    """Writes a document, which its place in the list makes, under each of the names."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = document(seed)
        path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}) + "\n")
    return folder


NAMED: dict[str, list[str]] = {
    "ptb": ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"],
    "numbered": ["train_0.jsonl", "valid_0.jsonl", "test_0.jsonl"],
    "folders": ["train/a.txt", "valid/a.txt", "test/a.txt"],
    "below other folders": ["x/my-train/a.txt", "x/val 2/a.txt", "y/z/testing_1/a.txt"],
    "at the end": ["wiki-train.txt", "wiki-valid.txt", "wiki-test.txt"],
    "other words": ["training.txt", "dev.txt", "evaluation.txt"],
    "capitals": ["Train.txt", "VALIDATION.txt", "Test.txt"],
    "shards": [f"data/{s}-00000-of-00001.jsonl" for s in ("train", "val", "eval")],
    "formats": ["train.jsonl", "dev.txt", "test.json"],
    "no word for training": ["wiki.txt", "wiki.dev.txt", "wiki.test.txt"],
    "folder before file": ["train/test.txt", "dev/train.txt", "test/notes.txt"],
    "folders and files": ["train/a.txt", "valid.txt", "test.txt"],
}


@pytest.mark.parametrize("case", NAMED)
def test_files_and_folders_that_name_a_split_are_in_that_split(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", NAMED[case])
    data = load_text(folder, tmp_path / "cache")
    assert [documents(data.tokens[split]) for split in SPLITS] == [
        [document(seed)] for seed in range(3)
    ]


@pytest.mark.parametrize("word", ["eval", "dev"])
def test_a_held_out_file_beside_a_training_file_is_not_trained_on(
    word: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "train.jsonl", [document(seed) for seed in range(40)])
    write_jsonl(folder / f"{word}.jsonl", [document(99)])
    data = load_text(folder, tmp_path / "cache")
    assert documents(data.tokens[SPLIT_WORDS[word]]) == [document(99)]
    assert [len(documents(data.tokens[split])) for split in SPLITS] == (
        [38, 1, 2] if word == "dev" else [38, 2, 1]
    )


def test_the_words_that_name_a_split_are_those_of_the_library_datasets() -> None:
    theirs = datasets.data_files.SPLIT_KEYWORDS
    assert {str(split): set(words) for split, words in theirs.items()} == {
        split: {word for word, named in SPLIT_WORDS.items() if named == split} for split in SPLITS
    }


@pytest.mark.parametrize("name", ["latest.txt", "contest/a.txt", "devil.txt", "trainer.txt"])
def test_a_word_within_a_word_names_no_split(name: str, tmp_path: Path) -> None:
    found = find_files(write(tmp_path, [name, "b.txt"]))
    assert {split: len(files) for split, files in found.by_split.items()} == {"train": 2}


@pytest.mark.parametrize("names", [["train-test.txt", "b.txt"], ["train/test/a.txt", "b.txt"]])
def test_a_name_for_two_splits_is_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is named for several splits, test and train: rename it"):
        find_files(write(tmp_path, names))


@pytest.mark.parametrize("names", [["test_1.txt", "test_2.txt"], ["valid.txt", "test.txt"]])
def test_a_folder_of_held_out_text_alone_is_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training text: by its name, .* is held-out text"):
        find_files(write(tmp_path, names))


@pytest.mark.parametrize("names", [["train.txt", "dev.txt"], ["a.txt", "b/a.txt", "test/a.txt"]])
def test_a_held_out_file_that_equals_a_training_file_is_refused(
    names: list[str], tmp_path: Path
) -> None:
    for name in write(tmp_path / "set", names).rglob("*.txt"):
        name.write_text(document(0, 100))
    with pytest.raises(
        DataError, match=r"is held-out text .*, but equal to .*: remove one of them"
    ):
        load_text(tmp_path / "set", tmp_path / "cache")


@pytest.mark.parametrize("names", [["a.txt", "a.txt.gz"], ["a.jsonl.xz", "a.jsonl.zst"]])
def test_a_file_beside_its_compressed_copy_is_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has the same name as .* text would be read twice"):
        find_files(write(tmp_path, names))


def test_equal_files_of_training_text_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", ["a.txt", "a-Copy1.txt", "b.txt"])
    shutil.copy(folder / "a.txt", folder / "a-Copy1.txt")
    note = load_text(folder, tmp_path / "cache").summary()[-1]
    assert re.fullmatch(r"note: '.*a.txt' is equal to '.*a-Copy1.txt'; both are trained on", note)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_no_fault_of_the_cache(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_text(name, tmp_path)


# what is left out


LEFT_OUT: Mapping[str, str] = {
    ".ipynb_checkpoints/": "hidden",
    "a/.git/": "hidden",
    "__MACOSX/": "hidden",
    ".train.txt.swp": "hidden",
    "train.txt~": "temporary",
    "train.txt.tmp": "temporary",
    "#train.txt#": "temporary",
    "train.jsonl.part": "temporary",
    "dataset_info.json": "describes the data",
    "README.md": "describes the data",
    "rows.xlsx": "another format",
    "notes.txt": "named for no split, while others are",
}


def test_copies_and_other_files_are_left_out_and_named(tmp_path: Path) -> None:
    names = [f"{name}train.txt" if name.endswith("/") else name for name in LEFT_OUT]
    folder = write(tmp_path / "set", ["train.txt", *names])
    (folder / "link").symlink_to(folder, target_is_directory=True)
    data = load_text(folder, tmp_path / "cache")
    assert text_of(data) == document(0)
    assert data.source is not None
    expected = {name.rstrip("/"): why for name, why in LEFT_OUT.items()}
    assert dict(data.source.left_out) == {**expected, "link": "a link"}


@pytest.mark.parametrize("name", ["b.zip", "b.jsonl.zip", "b.tar.gz.7z", "b.txt.lz4", "b.tgz"])
def test_an_archive_beside_text_is_refused(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, ["a.txt", name])
    with pytest.raises(
        DataError, match=f"{name}' is in a format that cannot be read, and .*unpack"
    ):
        find_files(folder)


def test_an_unreadable_folder_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, ["a.txt", "b/c.txt"])
    scandir = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(DataError, match=r"the folder '.*b' cannot be read: Permission denied"):
        find_files(folder)


def test_only_the_tables_that_save_to_disk_lists_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    rows = datasets.Dataset.from_dict({"text": [document(0)]})
    rows.save_to_disk(folder)
    table = folder / "data-00000-of-00001.arrow"
    shutil.copy(table, folder / "cache-1234.arrow")  # as the method map leaves it
    found = find_files(folder)
    assert found.by_split == {"train": [table]}
    assert found.left_out["cache-1234.arrow"] == "not listed in state.json"
    table.unlink()
    with pytest.raises(DataError, match=r"lacks 'data-00000-of-00001.arrow', which state.json"):
        find_files(folder)


def test_the_summary_counts_what_is_in_each_split(tmp_path: Path) -> None:
    names = ["train/a.txt", "train/b.txt", "dev.txt", "about.rst"]
    data = load_text(write(tmp_path / "set", names), tmp_path / "cache")
    lengths = [len(data.tokens[split]) for split in SPLITS]
    assert data.summary() == [
        f"train: 2 files, 2 documents, {lengths[0]:,} tokens",
        f"validation: 1 file, 1 document, {lengths[1]:,} tokens",
        f"test: 2 documents, {lengths[2]:,} tokens, taken from the training text",
        "left out: 'about.rst' (another format)",
    ]


# the cache


def test_files_that_change_their_split_are_tokenized_again(tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "set", ["a.txt", "b.txt"]), tmp_path / "cache"
    before = load_text(folder, cache)
    (folder / "b.txt").rename(folder / "b.dev.txt")
    after = load_text(folder, cache)
    assert after.fingerprint != before.fingerprint
    assert documents(after.tokens["validation"]) == [document(1)]


def test_tokens_cached_under_older_rules_of_columns_are_made_again(tmp_path: Path) -> None:
    """Those of text alone are used, because there was no choice."""
    for name, used in (("a.jsonl", False), ("a.txt", True)):
        folder, cache = write(tmp_path / name / "set", [name]), tmp_path / name / "cache"
        before = load_text(folder, cache)
        (index,) = (cache / "tokens").glob("*[!r].json")  # and not the tokenizer.json
        older = json.loads(index.read_text())
        del older["rules"]
        index.write_text(json.dumps(older))
        after = load_text(folder, cache)
        assert after.fingerprint == before.fingerprint
        assert ("rules" not in json.loads(index.read_text())) == used
