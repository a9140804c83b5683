"""Sources of text, and how their documents are divided into training, validation and test splits.

A document is a row of a dataset or a whole .txt file. No text is in two splits:

- The embedded corpus is split by year (archdsl/data/corpus/README.md).
- Splits that a dataset already has are used. So are splits named by files or folders
  (archdsl/data/folders.py).
- If validation or test is missing, 5% of the training documents are moved to it. They are selected
  by the hash of their content, so that equal documents are in the same split.
- If there are fewer than 20 different documents, the end of each document is moved instead: first
  the part for validation, then the part for test.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from archdsl.data.folders import SPLIT_WORDS, find_files, find_in_all, format_of
from archdsl.data.reading import Render, Span, column_of, json_rows, read_texts
from archdsl.data.types import DataError, Split

if TYPE_CHECKING:
    from datasets import Dataset

Texts = Callable[[], Iterator[str]]  # each call returns a new iterator over the documents

EMBEDDED = "sotu"
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT_SHARE = 20  # one document in 20 for each missing split
NOTES = 3  # at most
MAX_KEPT = 2**28  # characters
PLAIN, BY_NAME = 1, 2  # how text was chosen: there was no choice, or by the name of a column


@dataclass(frozen=True)
class TextSource:
    """A source of text: its name, a SHA-256 of its content and splits, and its documents.

    ``files``: how many files each split has. ``left_out``: files and splits that are not read, and
    why. ``notes``: what may be meant otherwise. ``rules``: tokens that were cached under older
    rules may be of another column.
    """

    name: str
    digest: str
    read: Callable[[], dict[Split, Texts]]
    given: frozenset[Split] = frozenset(SPLITS)  # the other splits are taken from training
    files: Mapping[Split, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rules: int = PLAIN
    without_text: Mapping[Path, int] = field(default_factory=dict)  # rows, of files read so far


def find_source(
    source: str | None, cache: Path, column: str | None = None, render: Render | None = None
) -> TextSource:
    """Finds the source of text of that name. Files are hashed, but not parsed.

    ``source``, ``column``: see `archdsl.load_data`. ``cache``: the folder for datasets of the Hub.
    ``render``: see `archdsl.data.reading.read_texts`. Raises DataError if there is no such source
    or it cannot be read.
    """
    if source is None or source == EMBEDDED:
        if column:
            raise DataError(
                f"the embedded corpus has no column {column!r} to choose: name other data"
            )
        return _embedded()
    name = f"{source}::{column}" if column else source
    if source.startswith("hf:"):
        return _from_hub(name, source, cache, column, render)
    path = Path(os.path.expanduser(source))  # it leaves a user whom nobody knows as it is
    return _from_files(f"{path}::{column}" if column else str(path), path, column, render)


def named_column(source: str, column: str | None) -> tuple[str, str | None]:
    """Divides SOURCE::COLUMN, which is how the names of data say a column."""
    if column or os.path.exists(source):
        return source, column
    name, _, after = source.rpartition("::")
    return (name, after) if name and after else (source, None)


def _embedded() -> TextSource:
    path = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"

    def read() -> dict[Split, Texts]:
        splits = [_split_of_year(row["year"]) for _, row in json_rows(Span(path))]
        return _select_by_split(partial(read_texts, [path]), splits)

    return TextSource(EMBEDDED, _file_digest(path), read)


def _split_of_year(year: int) -> Split:
    return "validation" if year % 20 == 9 else "test" if year % 20 == 19 else "train"


def _from_files(name: str, path: Path, column: str | None, render: Render | None) -> TextSource:
    found = find_files(path)
    formats = {format_of(file) for files in found.by_split.values() for file in files}
    if column and formats == {"text"}:
        raise DataError(f"{str(path)!r} has no column {column!r}: a .txt file has no columns")

    content = {file: _file_digest(file) for files in found.by_split.values() for file in files}
    notes = _equal_files(found.by_split, content)
    without_text: dict[Path, int] = {}

    def read() -> dict[Split, Texts]:
        return _with_missing(
            {
                split: partial(read_texts, files, column, render, without_text)
                for split, files in found.by_split.items()
            }
        )

    return TextSource(
        name,
        _files_digest(found.by_split, content, column),
        read,
        given=frozenset(found.by_split),
        files={split: len(files) for split, files in found.by_split.items()},
        left_out=found.left_out,
        notes=notes,
        rules=PLAIN if formats == {"text"} else BY_NAME,
        without_text=without_text,
    )


@dataclass(frozen=True)
class Files:
    """The files of each split, the column of their text, and a SHA-256 of all of that."""

    by_split: Mapping[Split, list[Path]]
    column: str | None
    digest: str
    left_out: Mapping[str, str]
    notes: Sequence[str]


def find_all(sources: Sequence[str], column: str | None, threads: int) -> Files:
    """Finds the files of several sources, which are read as if they stood in one folder.

    A single file is training text, whatever its name; of several, the names say the splits. They
    are hashed by several threads. Raises DataError as `find_source`.
    """
    named = [named_column(source, column) for source in sources]
    if len({own for _, own in named}) > 1:
        raise DataError("the text must be in the same column of all data: name it with --column")
    for source, _ in named:
        if source.startswith("skill:"):
            raise DataError(f"{source} has no text that could be tokenized")
        if source.startswith("hf:"):
            raise DataError(f"{source} cannot be tokenized together with other data: name it alone")
    column = named[0][1]
    found = find_in_all([Path(os.path.expanduser(source)) for source, _ in named])
    files = [file for own in found.by_split.values() for file in own]
    with ThreadPoolExecutor(threads) as pool:
        content = dict(zip(files, pool.map(_file_digest, files), strict=True))
    notes = _equal_files(found.by_split, content)
    by_split = {split: found.by_split[split] for split in SPLITS if split in found.by_split}
    digest = _files_digest(by_split, content, column)
    return Files(by_split, column, digest, found.left_out, notes)


def _equal_files(by_split: Mapping[Split, list[Path]], content: Mapping[Path, str]) -> list[str]:
    """Names files of training text that are equal, and are trained on more often therefore.

    Raises DataError if a file of training text and one of held-out text are equal.
    """
    trained_on: dict[str, Path] = {}
    notes: list[str] = []
    for file in (file for file in by_split["train"] if file.stat().st_size):
        first = trained_on.setdefault(content[file], file)
        if first != file:
            notes.append(f"{str(file)!r} is equal to {str(first)!r}; both are trained on")
    for split, files in by_split.items():
        for file in files if split != "train" else ():
            if other := trained_on.get(content[file]):
                raise DataError(
                    f"{str(file)!r} is held-out text ({split}), but equal to {str(other)!r}, which "
                    "is trained on: remove one of them"
                )
    return notes[:NOTES] + [f"{len(notes):,} files are such copies"] * (len(notes) > NOTES)


def _files_digest(
    by_split: Mapping[Split, list[Path]], content: Mapping[Path, str], column: str | None
) -> str:
    """Returns the SHA-256 of the files, their splits and formats, and the column.

    For files of one format it is that of older versions, which caches are named after.
    """
    split_of = {file: split for split, files in by_split.items() for file in files}
    digest = hashlib.sha256()
    for kind in sorted({format_of(file) or "" for file in content}):
        digest.update(kind.encode())
        for file in sorted(file for file in content if format_of(file) == kind):
            digest.update(f"{split_of[file]} {content[file]}\n".encode())
    if column:
        digest.update(f"column {column}\n".encode())
    return digest.hexdigest()


def _with_missing(found: dict[Split, Texts]) -> dict[Split, Texts]:
    missing = [split for split in SPLITS if split not in found]
    return found | divide(KeptTexts(found["train"]), missing) if missing else found


class KeptTexts:
    """Documents that stay in memory once they were read, up to MAX_KEPT characters in all.

    Files are parsed once then, and not again for each split that is taken from them.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.kept: list[str] | None = None

    def __call__(self) -> Iterator[str]:
        """Return a new iterator over the documents."""
        return self._read() if self.kept is None else iter(self.kept)

    def _read(self) -> Iterator[str]:
        kept, size = list[str](), 0
        for text in self.texts():
            size += len(text)
            if size <= MAX_KEPT:
                kept.append(text)
            yield text
        if size <= MAX_KEPT:
            self.kept = kept


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _from_hub(
    name: str, source: str, cache: Path, column: str | None, render: Render | None
) -> TextSource:
    named, left_out = named_splits(
        fetched(source, cache_dir=str(cache / "datasets" / "hub")), source
    )
    splits = _with_missing(
        {
            split: partial(
                _texts,
                rows,
                column_of(rows.features.arrow_schema, column, f"{source!r}", render),
                f"{source!r}: split {split}",
                render,
            )
            for split, rows in named.items()
        }
    )
    digest = hashlib.sha256()
    for split in SPLITS:
        for text in splits[split]():
            content = text.encode()
            digest.update(f"{split} {len(content)}\n".encode() + content)
    return TextSource(name, digest.hexdigest(), lambda: splits, frozenset(named), {}, left_out)


def fetched(source: str, **options: Any) -> Any:
    """Returns the splits of a data set of the Hub, by their names.

    ``options``: those of ``datasets.load_dataset``. Raises DataError if it cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    failed: Exception | None = None
    for name, config in hub_names(source):
        if Path(name).exists():
            raise DataError(
                f"{source!r}: the local file or folder {name!r} has the same name; rename it, or "
                "pass its path without hf:"
            )
        with _quiet():
            try:
                return load_dataset(name, config, **options)
            except (DatasetNotFoundError, ConnectionError) as error:
                failed = error
            except (DatasetsError, EOFError, OSError, ValueError) as error:
                raise DataError(f"{source!r}: {_first_cause(error)}") from None
    raise DataError(
        f"{source!r} could not be fetched: {failed}. Check the name and the network "
        "(HF_HUB_OFFLINE must not be set), or download the text and pass its path"
    )


def hub_names(source: str) -> list[tuple[str, str | None]]:
    """Returns the pairs of dataset and configuration to try.

    Three parts are OWNER/DATASET/CONFIG. Two parts are DATASET/CONFIG or else OWNER/DATASET.
    """
    parts = source.removeprefix("hf:").split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(
            f"{source!r}: expected hf:DATASET, hf:DATASET/CONFIG or hf:OWNER/DATASET/CONFIG"
        )
    if len(parts) == 2:
        return [(parts[0], parts[1]), ("/".join(parts), None)]
    return [("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)]


def named_splits(dataset: Any, source: str) -> tuple[dict[Split, Any], dict[str, str]]:
    """Returns the rows of each split, and why other splits are left out.

    A split may have another usual name, such as dev, if none has the name itself.
    """
    named: dict[Split, Any] = {split: dataset[split] for split in SPLITS if split in dataset}
    left_out = {}
    for name, rows in dataset.items():
        split = SPLIT_WORDS.get(name)
        if name in SPLITS:
            continue
        if split is None or split in named:
            left_out[f"split {name}"] = f"{split} is there" if split else "for no known use"
        else:
            named[split] = rows
    if "train" not in named:
        raise DataError(
            f"{source!r}: there is no split named train; the splits are {', '.join(dataset)}"
        )
    return named, left_out


def divide(texts: Texts, missing: Sequence[Split]) -> dict[Split, Texts]:
    """Takes the missing splits from ``texts`` and returns all splits, also the rest for training.

    See the top of this module for the rules.
    """
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts()]
    ranked = sorted(set(hashes))
    share = len(ranked) // HELD_OUT_SHARE
    if share == 0:
        return {
            split: partial(_part_of_each, texts, missing, split) for split in ("train", *missing)
        }
    place: Mapping[bytes, Split] = {
        ranked[i * share + j]: split for i, split in enumerate(missing) for j in range(share)
    }
    return _select_by_split(texts, [place.get(content, "train") for content in hashes])


def _select_by_split(texts: Texts, splits: list[Split]) -> dict[Split, Texts]:
    def of(wanted: Split) -> Iterator[str]:
        return (text for text, own in zip(texts(), splits, strict=True) if own == wanted)

    return {split: partial(of, split) for split in SPLITS if split in splits}


def _part_of_each(texts: Texts, missing: Sequence[Split], wanted: Split) -> Iterator[str]:
    for text in texts():
        begin, end = ranges_of(len(text), missing)[wanted]
        yield text[begin:end]


def ranges_of(length: int, missing: Sequence[Split]) -> dict[Split, tuple[int, int]]:
    """Returns which characters of a document of some length go to training and the missing splits.

    The ends of the document are those of the missing splits.
    """
    share = length // HELD_OUT_SHARE
    rest = length - share * len(missing)
    found: dict[Split, tuple[int, int]] = {"train": (0, rest)}
    for i, split in enumerate(missing):
        found[split] = (rest + i * share, rest + (i + 1) * share)
    return found


def _texts(rows: Dataset, column: str, place: str, render: Render | None) -> Iterator[str]:
    values = (
        value
        for some in rows.select_columns([column]).iter(batch_size=64)
        for value in some[column]
    )
    for row, value in enumerate(values, 1):
        if value is not None:
            chat = isinstance(value, list)
            yield render(value, f"{place}: row {row}") if render and chat else value


def _first_cause(error: BaseException) -> str:
    """Returns the first line of the original error, which datasets wraps in general ones."""
    while error.__cause__:
        error = error.__cause__
    return str(error).split("\n")[0][:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off the progress bars and messages of the datasets library."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
