"""Turn tokens into text while they are generated.

No incomplete character is returned, and no text after a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # a decoder returns it for bytes that do not form a character (yet)
CONTEXT_TOKENS = 16  # earlier tokens to decode with, as the text of a token may depend on them


class StreamingDecoder:
    """Decode tokens one at a time, as a continuation of the tokens ``before``."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.emitted = list(before)[-CONTEXT_TOKENS:]  # tokens whose text has been returned
        self.pending: list[int] = []  # tokens whose text is incomplete

    def push(self, token: int) -> str:
        """Add a token and return the text that is now complete, which may be empty."""
        self.pending.append(token)
        text = self._pending_text()
        return "" if text.endswith(REPLACEMENT) else self._emit(text)

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD in place of an incomplete character."""
        return self._emit(self._pending_text())

    def _pending_text(self) -> str:
        before = self.tokenizer.decode(self.emitted)
        return self.tokenizer.decode(self.emitted + self.pending)[len(before) :]

    def _emit(self, text: str) -> str:
        if text:
            self.emitted = (self.emitted + self.pending)[-CONTEXT_TOKENS - len(self.pending) :]
            self.pending = []
        return text


class StopStringFilter:
    """Pass text on up to the first stop string, which is left out.

    ``text`` holds all text that was returned. ``stopped_by`` is the stop string that was found,
    or None.
    """

    def __init__(self, decoder: StreamingDecoder, stop: Sequence[str] = ()) -> None:
        self.decoder = decoder
        self.stop = stop
        self.pending = ""  # text that may be the beginning of a stop string
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add a token and return the text that cannot belong to a stop string."""
        return self._add(self.decoder.push(token))

    def finish(self) -> str:
        """Return the remaining text. It is empty after a stop string."""
        text = self._add(self.decoder.finish()) + self.pending
        self.text += self.pending
        self.pending = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        text = self.pending + text
        # Take the stop string that is completed first, so that it does not matter where the text
        # is cut into tokens.
        ends = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self.stop if stop in text
        ]
        if ends:
            end, _, self.stopped_by = min(ends)
            safe = end - len(self.stopped_by)
            self.pending = ""
        else:
            safe = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
            self.pending = text[safe:]
        self.text += text[:safe]
        return text[:safe]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the first characters of ``stop`` the text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
