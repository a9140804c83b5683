"""Batches of tokenized text.

Shapes: B sequences, T tokens, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from archdsl.data.documents import SPLITS, TextSource
from archdsl.data.folders import few
from archdsl.data.text_format import text_format_of
from archdsl.data.tokenizers import Tokens, end_of_document, vocab_size
from archdsl.data.types import Batch, DataError, HeldOut, Split
from archdsl.errors import blamed_on

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from archdsl.data.token_cache import TokenCache


@dataclass(frozen=True, eq=False)
class TextData:
    """Tokenized text. The end-of-document token is before the first and after every document."""

    name: str
    tokenizer: Tokenizer
    fingerprint: str
    tokens: Mapping[Split, Tokens]
    text_bytes: Mapping[Split, int]
    chance: None = None
    token_cache: TokenCache | None = None  # the files of the tokens
    without_text: int = 0  # rows that were passed over
    source: TextSource | None = None  # what was found, in the process that loaded it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the location of the cached files, which this process has already verified."""
        if self.token_cache is None:
            values = (self.name, self.tokenizer, self.fingerprint, self.tokens, self.text_bytes)
            return TextData, values
        return self.token_cache.open, (self.name, True)

    @property
    def vocab_size(self) -> int:
        """See `Data.vocab_size`."""
        return vocab_size(self.tokenizer)

    def summary(self) -> list[str]:
        """Returns lines that say what each split has, and what is left out and why.

        Documents are counted in the tokens, which takes a second for each gigabyte.
        """
        end = end_of_document(self.tokenizer)
        lines: list[str] = []
        for split in SPLITS:
            tokens = self.tokens[split]
            counts = [(np.count_nonzero(tokens == end) - 1, "document"), (len(tokens), "token")]
            if self.source and (files := self.source.files.get(split)):
                counts.insert(0, (files, "file"))
            words = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in counts)
            taken = self.source and split not in self.source.given
            lines.append(f"{split}: {words}" + ", taken from the training text" * bool(taken))
        left_out: dict[str, list[str]] = {}
        for name, why in self.source.left_out.items() if self.source else ():
            left_out.setdefault(why, []).append(name)
        lines += [f"left out: {few(names)} ({why})" for why, names in left_out.items()]
        lines += [f"note: {note}" for note in (self.source.notes if self.source else ())]
        if rows := self.without_text:
            what = "1 row has no text" if rows == 1 else f"{rows:,} rows have no text"
            lines.append(f"left out: {what} (null or missing)")
        return lines

    def save_tokenizer(self, path: Path) -> None:
        """See `Data.save_tokenizer`."""
        self.tokenizer.save(str(path))
        if text_format := text_format_of(self.tokenizer):
            text_format.write(path.parent)

    def bytes_per_token(self, split: Split) -> float:
        """See `Data.bytes_per_token`."""
        return self.text_bytes[split] / (len(self.tokens[split]) - 1)

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns ``batch_size`` windows of ``context`` tokens of the training text, [B, T].

        Each window is used once per epoch, in an order that depends on the seed. Raises DataError
        if the text is shorter than one window.
        """
        return self.rows(index * batch_size, batch_size, context, seed)

    def rows(self, first: int, count: int, context: int, seed: int) -> Batch:
        """Returns ``count`` windows, from number ``first`` on in the order of training.

        Batches are made of these rows one after another; see `batch`.
        """
        tokens = self.tokens["train"]
        windows = (len(tokens) - 1) // context
        if windows == 0:
            message = (
                f"the training text of {self.name} has {len(tokens)} tokens, "
                f"too few for a context of {context}"
            )
            with blamed_on("context"):
                raise DataError(message)
        places = [divmod(n, windows) for n in range(first, first + count)]
        window_B = np.array([_order(windows, seed, epoch)[place] for epoch, place in places])
        return _windows(tokens, window_B * context, context)

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields batches [B, T] of the whole split, or of windows spread evenly over it.

        What is left after the last whole window is a shorter window in a batch of its own: tokens
        that fill it up would compete for the capacity of routers. Raises DataError if
        ``limit_tokens`` is below 1.
        """
        tokens = self.tokens[split]
        targets = len(tokens) - 1
        start_W = evenly_spaced(-(-targets // context), context, limit_tokens) * context
        whole_W = start_W[start_W + context <= targets]
        for i in range(0, len(whole_W), batch_size):
            yield _windows(tokens, whole_W[i : i + batch_size], context)
        for start in start_W[len(whole_W) :]:
            yield _windows(tokens, start[None], targets - start)


@lru_cache(maxsize=4)  # the order is computed once per epoch, not once per batch
def _order(windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def evenly_spaced(windows: int, context: int, limit_tokens: int | None) -> NDArray[np.int64]:
    """Returns the numbers of windows that are spread evenly over all ``windows``: [W], or fewer.

    ``limit_tokens``: see `Data.held_out`. Raises DataError if it is below 1.
    """
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens must be at least 1, got {limit_tokens}")
    count = windows if limit_tokens is None else min(windows, max(1, limit_tokens // context))
    return np.arange(count) * windows // count


def _windows(tokens: Tokens, start_B: NDArray[np.int64], context: int) -> Batch:
    text_BT = torch.from_numpy(tokens[start_B[:, None] + np.arange(context + 1)].astype(np.int64))
    return Batch(text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous())
