"""The tables of the gradients command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from archdsl.evaluation.weight_gradients import Use
from archdsl.reports.layout import StackingTable, TwoColumns

if TYPE_CHECKING:
    from archdsl.evaluation.gradients import Gradients, Interval, Row

LEGEND = [
    ("1.2", "layer 1, step 2; 1.all: the gradient of the weight that the steps share, their sum"),
    (
        "spikes",
        "layers whose norm is above those of both neighbours: how many times the larger of these, "
        "and the 95% interval of that",
    ),
    ("easy, hard", "mean nuclear norm of the gradient of the mean loss of a window"),
    ("hard/easy", "the second divided by the first, and its 95% interval"),
    (
        "normalised",
        "the same after division of each norm by that of the loss's gradient at the logits",
    ),
    (
        "matched",
        "the same for tokens of equal losses, equally many in the easy and the hard window of a "
        "pair",
    ),
]


def tables(found: Gradients, each: bool = False) -> Iterator[RenderableType]:
    """The tables of windows and of tokens, with what they mean.

    ``each``: a row for each matrix, in place of the sum of the four.
    """
    yield _facts(found)
    yield Text("\nwhole windows: norms of attention matrices by layer and step", "bold")
    yield _windows(found, each)
    yield Text("\nsingle tokens by decile of their loss: sums over all layers and steps", "bold")
    yield _tokens(found)
    yield ""
    yield TwoColumns(LEGEND)


def _facts(found: Gradients) -> TwoColumns:
    groups = f"the {found.group} of lowest loss are easy, the {found.group} of highest loss hard"
    facts = [("windows", f"{found.windows} of {found.context} tokens; {groups}")]
    for name, one in _models(found):
        facts.append((f"loss {name}".strip(), _losses(one)))
        facts.append((f"matched {name}".strip(), _matched(one)))
        facts.append((f"spikes {name}".strip(), _spikes(one)))
    return TwoColumns(facts)


def _losses(one: Gradients) -> str:
    easy, hard = one.loss_of_groups.easy, one.loss_of_groups.hard
    return f"{one.loss:.4f} nats per token, {one.tokens:,} tokens; easy {easy:.4f}, hard {hard:.4f}"


def _matched(one: Gradients) -> str:
    if one.loss_of_matched is None:
        return "no token of an easy window has the loss of a token of its hard window"
    easy, hard = one.loss_of_matched.easy, one.loss_of_matched.hard
    return f"{one.matched_tokens:,} pairs of tokens; easy {easy:.4f}, hard {hard:.4f}"


def _spikes(one: Gradients) -> str:
    parts = []
    for name, found in (("easy", one.spikes.easy), ("hard", one.spikes.hard)):
        layers = ", ".join(f"layer {spike.layer} ({_interval(spike.height)})" for spike in found)
        parts.append(f"{name}: {layers or 'none'}")
    return "; ".join(parts)


def _interval(found: Interval) -> str:
    return f"{found.value:.2f} {found.low:.2f}-{found.high:.2f}"


def _models(found: Gradients) -> list[tuple[str, Gradients]]:
    """The models with their names, which are needed only where there are two."""
    return [("before", found.before), ("now", found)] if found.before else [("", found)]


def _windows(found: Gradients, each: bool) -> StackingTable:
    models = _models(found)
    named = [*(["matrix"] if each else []), *(["model"] if found.before else [])]
    table = StackingTable("layer", *named, "easy", "hard", "hard/easy", "normalised", "matched")
    rows = [(name, {row.use: row for row in (*one.rows, one.total)}) for name, one in models]
    for use in sorted({use for _, of_one in rows for use in of_one}, key=Use.order):
        if use.layer is not None and (use.matrix == "all") == each:
            continue
        for name, of_one in rows:
            if (row := of_one.get(use)) is not None:
                names = [*([use.matrix] if each else []), *([name] if found.before else [])]
                table.add_row(use.place, *names, *_cells(row))
    return table


def _cells(row: Row) -> Iterator[str]:
    yield _norm(row.raw.easy.value)
    yield _norm(row.raw.hard.value)
    for contrast in (row.raw, row.normalised, row.matched):
        ratio = None if contrast is None else contrast.ratio
        yield "-" if ratio is None else _interval(ratio)


def _norm(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _tokens(found: Gradients) -> StackingTable:
    named = ["model"] if found.before else []
    table = StackingTable("decile", *named, "loss", "norm", "normalised")
    for number in range(len(found.loss_of_deciles)):
        for name, one in _models(found):
            norms = one.total.tokens[number], one.total.tokens_normalised[number]
            cells = (f"{_norm(norm.value)} {_norm(norm.low)}-{_norm(norm.high)}" for norm in norms)
            loss = f"{one.loss_of_deciles[number]:.4f}"
            table.add_row(str(number + 1), *([name] if found.before else []), loss, *cells)
    return table
