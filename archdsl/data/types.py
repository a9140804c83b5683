"""What training and evaluation ask of data: batches that are pure functions of their number.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from archdsl.errors import ArchdslError

Split = Literal["train", "validation", "test"]
HeldOut = Literal["validation", "test"]
IGNORE = -100  # the target of a position where nothing is asked; torch's own default


class DataError(ArchdslError):
    """A mistake in the name, the options or the content of a data source."""

    exit_status = 2


@dataclass(frozen=True)
class Batch:
    tokens_BT: Tensor  # int64
    targets_BT: Tensor  # int64: what is to be predicted at each position, or IGNORE


class Data(Protocol):
    """One source of batches. It has no state: a run resumes from its step number alone."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """sha256 over what the batches are made of."""

    @property
    def chance(self) -> float | None:
        """Exact-match score of the best guess that does not look, or None for text."""

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Training batch number ``index``: the same for every model that is given the same seed."""

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """The same windows for every model, of ``limit_tokens`` in all, or one."""

    def bytes_per_token(self, split: Split) -> float | None:
        """Turns nats into bits per byte: nats / ln 2 / this. None for skills."""

    def save_tokenizer(self, path: Path) -> None:
        """Writes tokenizer.json; skills have none and write nothing."""
