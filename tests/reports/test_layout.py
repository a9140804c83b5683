"""Tables and lists at any width: nothing is cut off."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from archdsl.reports.layout import StackingTable, TwoColumns


def at(width: int, shown: RenderableType) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, highlight=False).print(shown)
    return stream.getvalue().splitlines()


def table() -> StackingTable:
    made = StackingTable("", "params", "FLOPs/token", "loss", "")
    made.add_row("equal-parameters plain", "20.9M", "61.7M", "2.345 +- 0.012", Text("PASS"))
    made.add_row("winner", "20.9M", "", "12.345", "")
    return made


def test_a_table_that_fits_stays_one() -> None:
    head, first, second = at(80, table())
    assert head.split() == ["params", "FLOPs/token", "loss"]
    assert first == "equal-parameters plain   20.9M        61.7M  2.345 +- 0.012  PASS"
    assert second.split() == ["winner", "20.9M", "12.345"]


def test_a_table_that_does_not_fit_is_stacked_without_empty_cells() -> None:
    assert at(60, table()) == [
        "equal-parameters plain  PASS",
        "  params 20.9M; FLOPs/token 61.7M; loss 2.345 +- 0.012",
        "winner",
        "  params 20.9M; loss 12.345",
    ]
    assert at(30, table())[:4] == [
        "equal-parameters plain  PASS",
        "  params 20.9M;",
        "  FLOPs/token 61.7M;",
        "  loss 2.345 +- 0.012",
    ]


def test_a_stacked_row_says_what_its_first_cell_is() -> None:
    made = StackingTable("trial", "loss")
    made.add_row("7", "3.229")
    assert at(9, made) == ["trial 7", "  loss", "  3.229"]


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_list_keeps_to_the_width_and_loses_no_word(width: int) -> None:
    facts = [("  blocks.0.body.1.encoding", "null -> {kind: scale}"), ("loss", "one " * 30)]
    lines = at(width, TwoColumns(facts))
    assert max(map(len, lines)) <= width
    words = [word for name, fact in facts for word in f"{name} {fact}".split()]
    assert " ".join(lines).split() == words
