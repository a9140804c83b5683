"""Data sets of the Hugging Face Hub that are read over the network and never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from archdsl.data.documents import fetched, hub_names, named_splits
from archdsl.data.reading import Render, texts_of_rows
from archdsl.data.types import DataError, Split


class Stream(NamedTuple):
    """Some of the files of one split of a data set: part ``number`` of ``of``.

    ``revision``: the commit of the data set, so that it is the same in every process and later.
    """

    source: str
    revision: str
    split: str
    number: int
    of: int

    def rows(self) -> Any:
        """Returns the rows, which are read while they are iterated over."""
        found = fetched(self.source, revision=self.revision, streaming=True)[self.split]
        return found.shard(self.of, self.number) if self.of > 1 else found

    def texts(self, column: str | None, render: Render | None) -> Iterator[str | None]:
        """Yields the documents, and None for a row without text."""
        place = f"{self.source!r}: split {self.split}, part {self.number + 1} of {self.of}"
        try:
            yield from texts_of_rows(self.rows(), place, column, render)
        except OSError as error:
            raise DataError(f"{place}: {error}; the same command goes on from here") from None


def find_streams(source: str, column: str | None) -> tuple[Mapping[Split, list[Stream]], str]:
    """Returns the parts of each split of a data set, and a SHA-256 of its name and its commit.

    Raises DataError if it cannot be reached.
    """
    dataset = fetched(source, streaming=True)
    revision = revision_of(source)
    named, _ = named_splits(dataset, source)
    found = {
        split: [
            Stream(source, revision, str(rows.split), number, rows.num_shards)
            for number in range(rows.num_shards)
        ]
        for split, rows in named.items()
    }
    content = f"{source}\n{revision}\n{column}"
    return found, hashlib.sha256(content.encode()).hexdigest()


def revision_of(source: str) -> str:
    """Returns the commit that a data set stands at now. Raises DataError if it is not known."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for name, _ in hub_names(source):
        try:
            return str(HfApi().dataset_info(name).sha)
        except (HfHubHTTPError, OSError):
            continue
    raise DataError(f"{source!r}: the commit of the data set cannot be found out")
