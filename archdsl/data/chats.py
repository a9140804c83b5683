"""Chats as text, by the chat template that an imported model came with.

The template is a program of a stranger. transformers runs it in a sandbox; here its time and its
memory are bounded as well.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

from archdsl.data.text_format import TextFormat, text_format_beside
from archdsl.data.tokenizer_limits import Allowance
from archdsl.data.types import DataError
from archdsl.errors import describe

CHAT_COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # other names of roles, beside `from` and `value`
MAX_MEMORY = 2**30  # bytes that rendering one chat may add
MEMORY = Path("/proc/self/statm")  # how much memory this process has; Linux only
NEEDS = "chats need transformers: pip install 'archdsl[transformers]'"


class Chat(str):
    """A rendered chat: what looks like a special token in it is one."""

    def __getitem__(self, key: SupportsIndex | slice) -> Chat:
        """Returns a part of the chat, which is a chat, too."""
        return Chat(super().__getitem__(key))


class ChatTemplate:
    """Renders chats with the template of a model."""

    def __init__(self, text_format: TextFormat) -> None:
        """Takes a format that has a chat template."""
        self.template = text_format.chat_template
        self.special_tokens = text_format.special_tokens
        self.allowance, self.spent = Allowance("the chat template", "render"), 0.0

    def render(self, messages: Any, place: str) -> Chat:
        """Returns the whole chat as text.

        ``messages``: a list of objects with ``role`` and ``content``, or ``from`` and ``value``.
        ``place``: where it stands, for errors. Raises DataError if it is none, or if the template
        fails or takes too long or too much memory.
        """
        chat, rendered = _messages(messages, place), self._renderer
        size = sum(len(str(value)) for message in chat for value in message.values())
        self.allowance.started = time.monotonic() - self.spent  # nothing else is counted
        try:
            with _bounded_memory():
                return Chat(self.allowance.run(lambda: rendered(chat), size))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        finally:
            self.spent = time.monotonic() - self.allowance.started

    @cached_property
    def _renderer(self) -> Callable[[list[dict[str, Any]]], str]:
        """Imports transformers, which takes long, once there is a chat."""
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise DataError(NEEDS) from None

        render: Any = render_jinja_template
        words: dict[str, Any] = {str(name): word for name, word in self.special_tokens.items()}
        words["chat_template"] = self.template
        return lambda chat: str(render(conversations=[chat], **words)[0][0])


def renderer(tokenizer: Path) -> Callable[[Any, str], str] | None:
    """Returns what turns chats into text, if there is a chat template beside the tokenizer.json."""
    text_format = text_format_beside(tokenizer)
    return ChatTemplate(text_format).render if text_format and text_format.chat_template else None


def _messages(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{place}: a chat must be a list of messages, got {describe(value)}")
    return [_message(one, f"{place}: message {number}") for number, one in enumerate(value, 1)]


def _message(value: Any, place: str) -> dict[str, Any]:
    """Returns a message without the fields that a table fills up with nulls."""
    if isinstance(value, dict):
        given = {str(name): field for name, field in value.items() if field is not None}
        if "role" not in given and isinstance(given.get("from"), str) and "value" in given:
            role = given.pop("from")
            given |= {"role": ROLES.get(role, role), "content": given.pop("value")}
        if isinstance(given.get("role"), str):
            return given
    raise DataError(
        f'{place}: expected an object such as {{"role": "user", "content": "Hi"}}, got '
        f"{describe(value)}"
    )


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Lets an allocation beyond MAX_MEMORY more than now fail, instead of the whole machine."""
    if not MEMORY.exists():
        yield
        return
    now = int(MEMORY.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([now + MAX_MEMORY, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
