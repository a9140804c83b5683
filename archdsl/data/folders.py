"""Which files of a folder are read, and to which split each of them belongs.

The words that name a split are those of the library datasets. They stand in the name of a folder or
a file, between characters that are no letters: train.jsonl, valid_0.jsonl, ptb.test.txt, dev/a.txt.

- The name of a folder decides before the name of a file.
- If no file is named as training text, the files without such a word are the training text. If one
  is, they are left out, as datasets does it.
- Hidden, temporary and descriptive files are left out, and so are files of other formats. Archives
  are refused, because they probably hold text that somebody expects to be read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from archdsl.data.types import DataError, Split
from archdsl.files import read_bytes, why_unreadable

SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
LETTER = r"[^\W\d_]"
SPLIT_WORD = re.compile(rf"(?<!{LETTER})({'|'.join(SPLIT_WORDS)})(?!{LETTER})", re.IGNORECASE)
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
READ = f"{', '.join(FORMATS)} (also {', '.join(COMPRESSED)})"
UNREAD = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".lzma", ".br", ".z", ".snappy")
HIDDEN = (".", "__")  # as datasets has it
TEMPORARY = ("~", ".swp", ".swo", ".tmp", ".temp", ".bak", ".orig", ".part", ".crdownload")
DESCRIPTIVE = {  # files that the library datasets writes beside the text
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}  # fmt: skip
ABOUT = ("readme", "license", "licence", "changelog", "contributing", "citation")  # names of .md
ACCEPTED = (
    "expected nothing (the embedded corpus), a file or folder of .txt, .md, .jsonl, .json, "
    ".parquet, .arrow, .csv or .tsv files (also .gz, .bz2, .xz or .zst), hf:DATASET/CONFIG, or "
    "skill:NAME"
)


@dataclass(frozen=True)
class FoundFiles:
    """The files of each split, in the order of their names, and why other files are left out."""

    by_split: Mapping[Split, list[Path]]
    left_out: Mapping[str, str]


def find_files(path: Path) -> FoundFiles:
    """Finds the files to read. A path of a single file is training text, whatever its name.

    Raises DataError if there is nothing to train on, or if it is not clear what is training text.
    """
    if os.path.isdir(path):  # for a name that cannot be one, the methods of Path raise OSError
        return _in_folder(path)
    if why := why_unreadable(path):
        found = (
            f"{str(path)!r} {why}" if os.path.exists(path) else f"no file or folder {str(path)!r}"
        )
        raise DataError(f"{found}; {ACCEPTED}")
    if format_of(path) is None:
        raise DataError(f"{str(path)!r} does not end in {', '.join(FORMATS)}; {ACCEPTED}")
    return FoundFiles({"train": [path]}, {})


def find_in_all(paths: Sequence[Path]) -> FoundFiles:
    """Finds the files of several paths, as if all of them stood in one folder.

    Raises DataError as `find_files`, or if a file is named twice.
    """
    if len(paths) == 1:
        return find_files(paths[0])
    by_split: dict[Split, list[Path]] = {}
    left_out: dict[str, str] = {}
    for path in paths:
        found = find_files(path)
        named = None if path.is_dir() else _named_split(path.parent, Path(path.name))
        for split, files in found.by_split.items():
            by_split.setdefault(named or split, []).extend(files)
        left_out |= found.left_out
    files = [file.resolve() for own in by_split.values() for file in own]
    if twice := next((file for file, n in Counter(files).items() if n > 1), None):
        raise DataError(f"{str(twice)!r} is named twice")
    if "train" not in by_split:
        raise DataError("there is no training text: by their names, all files are held-out text")
    return FoundFiles(by_split, left_out)


def format_of(path: Path) -> str | None:
    """Returns the format that the name of the file says, below a compression; None if none."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return FORMATS.get(inner.suffix.lower())


def _in_folder(folder: Path) -> FoundFiles:
    left_out: dict[str, str] = {}
    named: dict[Path, Split | None] = {}
    files = _walk(folder, left_out)
    unlisted = _unlisted(files)
    for file in files:
        inside = file.relative_to(folder)
        if why := "not listed in state.json" if file in unlisted else _why_left_out(file):
            left_out[str(inside)] = why
        else:
            named[file] = _named_split(folder, inside)
    _refuse_compressed_copies(named)
    if not named:
        skipped = f"; {few(left_out)} cannot be used" if left_out else ""
        raise DataError(f"no {', '.join(FORMATS)} file in the folder {str(folder)!r}{skipped}")
    told = "train" in named.values()
    by_split: dict[Split, list[Path]] = {}
    for file, split in named.items():
        if split is None and told:
            left_out[str(file.relative_to(folder))] = "named for no split, while others are"
        else:
            by_split.setdefault(split or "train", []).append(file)
    if "train" not in by_split:
        held_out = few(str(file.relative_to(folder)) for file in named)
        raise DataError(
            f"{str(folder)!r} has no training text: by its name, everything in it is held-out text "
            f"({held_out}). Add a file or folder named train, or pass one file"
        )
    return FoundFiles(by_split, left_out)


def _walk(folder: Path, left_out: dict[str, str]) -> list[Path]:
    """Returns the files below the folder. Hidden folders and links to folders are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename!r} cannot be read: {error.strerror}")

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        passed_over = {name: "hidden" for name in folders if name.startswith(HIDDEN)}
        passed_over |= {name: "a link" for name in folders if (here / name).is_symlink()}
        left_out |= {
            str((here / name).relative_to(folder)): why for name, why in passed_over.items()
        }
        folders[:] = [name for name in folders if name not in passed_over]
        found += [here / name for name in files]
    return sorted(found)


def _why_left_out(file: Path) -> str | None:
    """Returns why the file is not read, or None. Raises DataError for text that is missing then."""
    name = file.name
    if name.startswith(HIDDEN):
        return "hidden"
    if name.lower().endswith(TEMPORARY) or name.startswith(("~$", "#")):
        return "temporary"
    is_about = name.lower().endswith(".md") and name.lower().startswith(ABOUT)
    if name in DESCRIPTIVE or is_about:
        return "describes the data"
    if name.lower().endswith(UNREAD):
        raise DataError(
            f"{str(file)!r} is in a format that cannot be read, and would be left out: unpack it, "
            f"or move it to another folder. The formats are {READ}"
        )
    if format_of(file) is None:
        return "another format"
    if not file.is_file():
        raise DataError(f"{str(file)!r} is not a file, or a link to a file that does not exist")
    return None


def _unlisted(files: list[Path]) -> set[Path]:
    """Returns the tables that are no data of the folders that ``save_to_disk`` wrote.

    datasets also caches tables there. Raises DataError if a table with data is missing.
    """
    tables = {file for file in files if file.suffix == ".arrow"}
    unlisted: set[Path] = set()
    for state in files:
        if state.name != "state.json":
            continue
        try:
            entries = json.loads(read_bytes(state, DataError))["_data_files"]
            listed = {state.with_name(entry["filename"]) for entry in entries}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{str(state)!r} is not as save_to_disk writes it: {error!r}") from None
        if missing := sorted(file.name for file in listed - tables):
            raise DataError(f"{str(state.parent)!r} lacks {few(missing)}, which state.json lists")
        unlisted |= {table for table in tables if table.parent == state.parent} - listed
    return unlisted


def _refuse_compressed_copies(files: Iterable[Path]) -> None:
    """Raises DataError if a file is there as it is and compressed: it would be read twice."""
    first: dict[Path, Path] = {}
    for file in files:
        inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
        if other := first.get(inner):
            raise DataError(
                f"{str(file)!r} has the same name as {other.name!r} but for the compression: its "
                "text would be read twice. Remove one of them"
            )
        first[inner] = file


def _named_split(folder: Path, inside: Path) -> Split | None:
    """Returns the split that the folders of the file name, or else the file itself, or None."""
    for names in (inside.parts[:-1], inside.parts[-1:]):
        words = [word.lower() for name in names for word in SPLIT_WORD.findall(name)]
        splits = sorted({SPLIT_WORDS[word] for word in words})
        if len(splits) > 1:
            raise DataError(
                f"{str(folder / inside)!r} is named for several splits, {' and '.join(splits)}: "
                "rename it so that its folders, or else its own name, name one"
            )
        if splits:
            return splits[0]
    return None


def few(names: Iterable[str], most: int = 3) -> str:
    """Returns the first of the names in quotes, and how many more there are."""
    some = [repr(name) for name in names]
    more = f" and {len(some) - most} more" if len(some) > most else ""
    return ", ".join(some[:most]) + more
