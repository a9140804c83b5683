"""Sources of text, and how their documents are divided into training, validation and test splits.

A document is a row of a dataset or a whole .txt file. No text is in two splits:

- The embedded corpus is split by year (archdsl/data/corpus/README.md).
- Splits that a dataset already has are used. So are splits named by files, if one is named train.
- If validation or test is missing, 5% of the training documents are moved to it. They are selected
  by the hash of their content, so that equal documents are in the same split.
- If there are fewer than 20 different documents, the end of each document is moved instead: first
  the part for validation, then the part for test.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from archdsl.data.types import DataError, Split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Texts = Callable[[], Iterator[str]]  # each call returns a new iterator over the documents

EMBEDDED = "sotu"
SPLITS: tuple[Split, ...] = get_args(Split)
OTHER_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".xz", ".gz")
HELD_OUT_SHARE = 20  # one document in 20 for each missing split
ACCEPTED = (
    "expected nothing (the embedded corpus), a file or folder of .txt, .jsonl, .json or .parquet "
    "(also .xz or .gz), hf:DATASET/CONFIG, or skill:NAME"
)


@dataclass(frozen=True)
class TextSource:
    """A source of text: its name, a SHA-256 of its content and splits, and its documents."""

    name: str
    digest: str
    read: Callable[[], dict[Split, Texts]]


def find_source(source: str | None, cache: Path) -> TextSource:
    """Finds the source of text of that name. Files are hashed, but not parsed.

    ``source``: see `archdsl.load_data`. ``cache``: the folder for parsed datasets. Raises DataError
    if there is no such source or it cannot be read.
    """
    if source is None or source == EMBEDDED:
        return _embedded(cache)
    if source.startswith("hf:"):
        return _from_hub(source, cache)
    return _from_files(Path(source).expanduser(), cache)


def _embedded(cache: Path) -> TextSource:
    path = Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
    digest = _file_digest(path)

    def read() -> dict[Split, Texts]:
        rows = _load("json", {"train": [str(path)]}, digest, cache)["train"]
        splits = [_split_of_year(year) for year in rows["year"]]
        return _select_by_split(partial(_texts, rows, "text"), splits)

    return TextSource(EMBEDDED, digest, read)


def _split_of_year(year: int) -> Split:
    return "validation" if year % 20 == 9 else "test" if year % 20 == 19 else "train"


def _from_files(path: Path, cache: Path) -> TextSource:
    found = _find_files(path)
    loaders = sorted({LOADERS[_ending(file)] for file in found})
    if len(loaders) > 1:
        raise DataError(f"{str(path)!r} mixes {' and '.join(loaders)} files; use one format")
    by_split: dict[str, list[str]] = {}
    digest = hashlib.sha256(loaders[0].encode())
    for file, split in zip(found, _splits_from_names(found), strict=True):
        by_split.setdefault(split, []).append(str(file))
        digest.update(f"{split} {_file_digest(file)}\n".encode())
    key = digest.hexdigest()
    return TextSource(str(path), key, lambda: _splits_of(_load(loaders[0], by_split, key, cache)))


def _find_files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(path.rglob("*"))
        if found := [file for file in inside if _ending(file) in LOADERS and file.is_file()]:
            return found
        raise DataError(f"no {', '.join(LOADERS)} file in the folder {str(path)!r}")
    if not path.is_file():
        raise DataError(f"no file or folder {str(path)!r}; {ACCEPTED}")
    if _ending(path) not in LOADERS:
        raise DataError(f"{str(path)!r} does not end in {', '.join(LOADERS)}; {ACCEPTED}")
    return [path]


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _splits_from_names(found: list[Path]) -> list[str]:
    """Returns the split of each file.

    Names such as train.jsonl, valid.jsonl and test-00000-of-00002.parquet decide if there is a
    train file; otherwise all files are training data.
    """
    names = [file.name.split(".")[0].split("-")[0] for file in found]
    names = [OTHER_NAMES.get(name, name) for name in names]
    told = "train" in names
    return [name if told and name in SPLITS else "train" for name in names]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _load(loader: str, by_split: dict[str, list[str]], digest: str, cache: Path) -> DatasetDict:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    # datasets identifies a file by its time stamp; a folder for each content is never out of date
    folder = str(cache / "datasets" / digest[:32])
    options = {"sample_by": "document"} if loader == "text" else {}
    with _quiet():
        try:
            return load_dataset(loader, data_files=by_split, cache_dir=folder, **options)
        except (DatasetsError, OSError, ValueError) as error:
            where = ", ".join(name for names in by_split.values() for name in names[:3])
            raise DataError(f"{where} is not readable as {loader}: {_first_cause(error)}") from None


def _from_hub(source: str, cache: Path) -> TextSource:
    dataset = _fetch(source, cache)
    digest = hashlib.sha256()
    splits = _splits_of(dataset)
    for split in SPLITS:
        for text in splits[split]():
            content = text.encode()
            digest.update(f"{split} {len(content)}\n".encode() + content)
    return TextSource(source, digest.hexdigest(), lambda: splits)


def _fetch(source: str, cache: Path) -> DatasetDict:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    failed: Exception | None = None
    for name, config in _hub_names(source):
        if Path(name).exists():
            raise DataError(
                f"{source!r}: the local file or folder {name!r} has the same name; rename it, or "
                "pass its path without hf:"
            )
        with _quiet():
            try:
                return load_dataset(name, config, cache_dir=str(cache / "datasets" / "hub"))
            except (DatasetNotFoundError, ConnectionError) as error:
                failed = error
            except (DatasetsError, OSError, ValueError) as error:
                raise DataError(f"{source!r}: {_first_cause(error)}") from None
    raise DataError(
        f"{source!r} could not be fetched: {failed}. Check the name and the network "
        "(HF_HUB_OFFLINE must not be set), or download the text and pass its path"
    )


def _hub_names(source: str) -> list[tuple[str, str | None]]:
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


def _splits_of(dataset: DatasetDict) -> dict[Split, Texts]:
    named = {OTHER_NAMES.get(name, name): rows for name, rows in dataset.items()}
    if "train" not in named:
        raise DataError(f"there is no split named train; the splits are {', '.join(dataset)}")
    found: dict[Split, Texts] = {
        split: partial(_texts, named[split], _text_column(named[split]))
        for split in SPLITS
        if split in named
    }
    missing = [split for split in SPLITS if split not in named]
    return found | divide(found["train"], missing) if missing else found


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
        share = len(text) // HELD_OUT_SHARE
        begin = len(text) - share * len(missing)
        if wanted != "train":
            begin += share * missing.index(wanted)
            yield text[begin : begin + share]
        else:
            yield text[:begin]


def _text_column(rows: Dataset) -> str:
    strings = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        columns = ", ".join(rows.column_names)
        raise DataError(
            f"expected a column 'text' or only one column of strings; the columns are {columns}"
        )
    return strings[0]


def _texts(rows: Dataset, column: str) -> Iterator[str]:
    for some in rows.select_columns([column]).iter(batch_size=64):
        yield from (text for text in some[column] if text is not None)


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
