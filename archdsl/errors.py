"""Errors of archdsl and the texts they are made of: where, what was found, what would be right."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any


class ArchdslError(Exception):
    """The base of all errors that a user can correct, such as a wrong spec or a missing file.

    The command line prints the message without a traceback and exits with ``exit_status``.
    ``setting``: the name of the setting whose value has to be corrected, if it is one.
    ``told_by_another``: whether another process of the same run prints it.
    """

    exit_status = 1
    setting: str | None = None
    told_by_another: bool = False


@contextmanager
def blamed_on(setting: str) -> Iterator[None]:
    """Inside, an error is the fault of that setting: `archdsl.lang.config.say_where` finds it.

    For values that can only be found wrong when they are used, such as the name of a file.
    """
    try:
        yield
    except ArchdslError as error:
        error.setting = error.setting or setting
        raise


@dataclass(frozen=True, order=True)
class Position:
    """A position in a text file. Lines and columns count from 1; line 0 means the whole file."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a spec.

    ``path`` is the dotted path of the wrong value, such as ``blocks.0.steps``. ``position`` is
    where the value stands in its file, if it comes from a file.
    """

    path: str
    message: str
    position: Position | None = None

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.position, self.path, self.message) if part)


class SpecError(ArchdslError):
    """All problems of a spec in one error: one line per problem, in the order of the file."""

    exit_status = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        given = [problems] if isinstance(problems, Problem) else problems
        self.problems = sorted(set(given), key=_position)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def _position(problem: Problem) -> tuple[Position, str, str]:
    return problem.position or Position("", 0, 0), problem.path, problem.message


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'steps'?)`` for the most similar known word, to append to a message.

    Returns an empty string if no known word is similar.
    """
    # The comparison is slow and a hostile file may have very many keys, so both are limited.
    close = difflib.get_close_matches(word[:100], list(islice(known, 1000)), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe(value: Any) -> str:
    """Describes a wrong value at the end of a message: ``a list``, ``true``, ``'on'``."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)
