"""Tokens to text while they come: never half a character, never past what stops the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character, or none yet
CONTEXT_TOKENS = 16  # tokens before, for a decoder whose text depends on where it begins


class StreamingDecoder:
    """The text of one token after another, as a continuation of the tokens ``before``."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.said = list(before)[-CONTEXT_TOKENS:]  # tokens whose text is out
        self.held: list[int] = []

    def push(self, token: int) -> str:
        """What has become certain; nothing where a character is incomplete."""
        self.held.append(token)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) else self._release(text)

    def finish(self) -> str:
        """The rest, broken as it is."""
        return self._release(self._text())

    def _text(self) -> str:
        before = self.tokenizer.decode(self.said)
        return self.tokenizer.decode(self.said + self.held)[len(before) :]

    def _release(self, text: str) -> str:
        if text:
            self.said = (self.said + self.held)[-CONTEXT_TOKENS - len(self.held) :]
            self.held = []
        return text


class StopStringFilter:
    """Pieces up to the first of the strings ``stop``, which is not part of the text."""

    def __init__(self, pieces: StreamingDecoder, stop: Sequence[str] = ()) -> None:
        self.pieces = pieces
        self.stop = stop
        self.held = ""  # may be the beginning of what stops it
        self.whole = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """What has become certain."""
        return self._add(self.pieces.push(token))

    def finish(self) -> str:
        """The rest; nothing after a stop."""
        text = self._add(self.pieces.finish()) + self.held
        self.whole += self.held
        self.held = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        text = self.held + text
        # the one that is complete first: so it does not matter how tokens cut the text
        ends = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self.stop if stop in text
        ]
        if ends:
            end, _, self.stopped_by = min(ends)
            sure = end - len(self.stopped_by)
            self.held = ""
        else:
            sure = len(text) - max((_begun(text, stop) for stop in self.stop), default=0)
            self.held = text[sure:]
        self.whole += text[:sure]
        return text[:sure]


def _begun(text: str, stop: str) -> int:
    """How much of ``stop`` the text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
