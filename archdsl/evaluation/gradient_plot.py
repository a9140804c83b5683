"""A plot of the norms of gradients by layer and step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from archdsl.evaluation.gradient_sample import DECILES
from archdsl.evaluation.weight_gradients import MATRICES
from archdsl.files import atomic_file

if TYPE_CHECKING:
    from archdsl.evaluation.gradients import Contrast, Gradients, Interval, Row

# colours of Okabe and Ito (2008), which colour-blind readers can distinguish
COLOURS = {"easy": "#0072b2", "hard": "#d55e00"}
KINDS = {
    "raw": "whole windows",
    "normalised": "divided by the norm\nat the logits",
    "matched": "tokens of equal losses",
}


def plot(found: Gradients, path: Path) -> None:
    """Write a PNG with a row of panels for each attention matrix.

    Three columns show easy and hard windows (raw, normalised, matched), the last one single tokens
    of the lowest, a middle and the highest decile of the loss, normalised. Bands are 95% intervals.
    The model before is drawn with dashed lines. Raises ImportError if matplotlib is missing (the
    extra ``plots``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    panels = figure.subplots(len(MATRICES), len(KINDS) + 1, sharex=True, squeeze=False)
    models = [(found, "-"), *([(found.before, "--")] if found.before else [])]
    names = dict.fromkeys(_place(row) for one, _ in models for row in _steps(one))
    places = {name: place for place, name in enumerate(sorted(names))}
    for matrix, row_of_panels in zip(MATRICES, panels, strict=True):
        for one, line in models:
            rows = [row for row in _steps(one) if row.matrix == matrix]
            _draw(row_of_panels, rows, [places[_place(row)] for row in rows], line)
        row_of_panels[0].set_ylabel(f"nuclear norm, {matrix}")
    for axes, title in zip(panels[0], [*KINDS.values(), "single tokens, normalised"], strict=True):
        axes.set_title(title, fontsize=9)
    ticks = [".".join(map(str, place)) for place in places]
    for axes in panels[-1]:
        axes.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=7)
        axes.set_xlabel("layer.step")
    panels[0][0].legend(frameon=False, fontsize=8)
    panels[0][-1].legend(frameon=False, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _steps(one: Gradients) -> list[Row]:
    """The rows of single steps."""
    return [row for row in one.rows if row.step is not None]


def _place(row: Row) -> tuple[int, ...]:
    """The layer and the step of a row of a single step."""
    assert row.layer is not None
    assert row.step is not None
    return row.layer, *row.step


def _draw(panels: Any, rows: list[Row], places: list[int], line: str) -> None:
    """Draw the rows of one matrix and one model. ``line``: the style of lines."""
    name = "" if line == "-" else ", before"
    for kind, axes in zip(KINDS, panels, strict=False):
        contrasts: list[Contrast | None] = [getattr(row, kind) for row in rows]
        known = [(x, c) for x, c in zip(places, contrasts, strict=True) if c is not None]
        for side, colour in COLOURS.items():
            figures = [getattr(contrast, side) for _, contrast in known]
            _band(axes, [x for x, _ in known], figures, colour, line, f"{side}{name}")
    for number, colour in ((0, "#56b4e9"), (DECILES // 2, "#999999"), (DECILES - 1, "#cc79a7")):
        figures = [row.tokens_normalised[number] for row in rows]
        _band(panels[-1], places, figures, colour, line, f"decile {number + 1}{name}")


def _band(
    axes: Any, places: list[int], figures: list[Interval], colour: str, line: str, label: str
) -> None:
    axes.plot(places, [f.value for f in figures], line, marker=".", color=colour, lw=1, label=label)
    limits = [f.low for f in figures], [f.high for f in figures]
    axes.fill_between(places, *limits, color=colour, alpha=0.15, lw=0)
