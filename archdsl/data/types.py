"""The interface between data and training: batches that depend only on their number and a seed.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "validation", "test"]
HeldOut = Literal["validation", "test"]
IGNORE = -100  # the target of a position without a loss; the default ignore_index of torch


class DataError(ArchdslError):
    """The name, the options or the content of a data source is wrong."""

    exit_status = 2


@dataclass(frozen=True)
class Batch:
    """Input tokens and the targets to predict at each position, or IGNORE, both int64 [B, T]."""

    tokens_BT: Tensor
    targets_BT: Tensor


class Data(Protocol):
    """A source of batches. It has no state, so that a run can resume from its step number alone."""

    @property
    def name(self) -> str:
        """The name of the source, as `archdsl.load_data` takes it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of everything that the batches are made of."""

    @property
    def chance(self) -> float | None:
        """The exact-match score of the best constant guess; None for text."""

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns training batch number ``index``, [B, T]. It depends only on the arguments."""

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields batches [B, T] of held-out data, the same for every model.

        ``limit_tokens``: the number of tokens, rounded down to whole windows, but at least one.
        """

    def bytes_per_token(self, split: Split) -> float | None:
        """Returns the mean number of bytes per token; None for skills.

        The bits per byte of a loss in nats are ``loss / ln 2 / bytes_per_token``.
        """

    def save_tokenizer(self, path: Path) -> None:
        """Writes the tokenizer as a tokenizer.json, with its text format; skills write nothing."""
