"""Tables and lists that are whole at any width of the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LEAST_ROOM = 24  # columns for the second of two columns; with less it stands below the first
UNBOUNDED = 10_000  # columns


class StackingTable(Table):
    """A table without lines, in which all columns but the first are aligned right.

    Where it is wider than the terminal, each row becomes a few lines: the first cell, and below it
    the other cells, each after the title of its column. So no figure is cut off.
    """

    def __init__(self, first: str, *others: str) -> None:
        super().__init__(box=None, pad_edge=False, header_style="dim")
        self.add_column(first, no_wrap=True)
        for title in others:
            self.add_column(title, justify="right", no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its rows one below the other if it does not fit."""
        whole = Measurement.get(console, options.update(width=UNBOUNDED), self).maximum
        if whole <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            for line in self._stacked(options.max_width):
                yield Text(line, overflow="fold")

    def _stacked(self, width: int) -> Iterator[str]:
        titles = [str(column.header) for column in self.columns]
        for row in zip(*(map(str, column.cells) for column in self.columns), strict=True):
            untitled = [cell for title, cell in zip(titles[1:], row[1:], strict=True) if not title]
            named = f"{titles[0]} {row[0]}".strip() if row[0] else ""
            yield from textwrap.wrap("  ".join(filter(None, [named, *untitled])), width)
            pairs = zip(titles[1:], row[1:], strict=True)
            titled = [f"{title} {cell}" for title, cell in pairs if title and cell]
            glued = [  # a pair stays on one line if it has room there, with its semicolon
                pair.replace(" ", "\N{NO-BREAK SPACE}") if len(pair) < width - 2 else pair
                for pair in titled
            ]
            for line in wrapped("; ".join(glued), width - 2):
                yield f"  {line}".replace("\N{NO-BREAK SPACE}", " ")


@dataclass(frozen=True)
class TwoColumns:
    """A list of names and texts in two columns; the texts are wrapped.

    Where that leaves little room for the texts, each stands below its name.
    """

    facts: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        indent = max((len(name) for name, _ in self.facts), default=0) + 2
        if indent > 12 and options.max_width - indent < LEAST_ROOM:
            yield from self._stacked(options.max_width)
            return
        room = max(8, options.max_width - indent)
        for name, fact in self.facts:
            for i, line in enumerate(wrapped(fact, room)):
                yield Text.assemble(((name if i == 0 else "").ljust(indent), "dim"), line)

    def _stacked(self, width: int) -> Iterator[Text]:
        for name, fact in self.facts:
            if name.strip():
                yield Text(name, "dim", overflow="fold")
            indent = " " * (len(name) - len(name.lstrip()) + 2)
            for line in wrapped(fact, width - len(indent)):
                yield Text(f"{indent}{line}")


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text that is wrapped at blanks; a longer word is cut."""
    return textwrap.wrap(text, max(1, width), break_on_hyphens=False)
