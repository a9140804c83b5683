"""What archdsl says when something is wrong: where, what was found, what would be right."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any


class ArchdslError(Exception):
    """A mistake outside the code; the command line prints it without a traceback."""

    exit_status = 1


@dataclass(frozen=True, order=True)
class Position:
    """A place in a text; lines and columns count from 1, line 0 stands for the whole."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a spec; ``path`` is dotted, such as ``blocks.0.steps``."""

    path: str
    message: str
    position: Position | None = None

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.position, self.path, self.message) if part)


class SpecError(ArchdslError):
    """Everything that is wrong with a spec at once, one line per problem, in reading order."""

    exit_status = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        given = [problems] if isinstance(problems, Problem) else problems
        self.problems = sorted(set(given), key=_position)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def _position(problem: Problem) -> tuple[Position, str, str]:
    return problem.position or Position("", 0, 0), problem.path, problem.message


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, such as `` (did you mean 'steps'?)``, or nothing."""
    # comparing is slow, and a hostile file has very many keys
    close = difflib.get_close_matches(word[:100], list(islice(known, 1000)), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe(value: Any) -> str:
    """What was found, for the end of a message: ``a list``, ``true``, ``'on'``."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)
