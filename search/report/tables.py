"""A contest as tables: what each costs and scores, and how far from the winner it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from archdsl.reports.tables import TwoColumns, parameters, short
from archdsl.search.analysis.comparison import ComparisonEntry, differences, winner_of
from archdsl.search.analysis.conclusions import ablation_conclusion, conclusion

if TYPE_CHECKING:
    from archdsl.search.analysis.ablation import Ablation
    from archdsl.search.trials.proxy import Proxy


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """A line on stderr: in a terminal one that changes, elsewhere one whenever there is news."""
    started, said = time.monotonic(), [""]

    def tell(text: str) -> None:
        if text != said[-1]:
            said.append(text)
            print(f"{time.monotonic() - started:.0f} s; {text}", file=sys.stderr, flush=True)

    if sys.stderr.isatty():
        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(f"{time.monotonic() - started:.0f} s; {text}")
    else:
        yield tell


def result(found: Ablation) -> RenderableType:
    """What `archdsl ablate` ends with."""
    facts = [("verdict", conclusion(found.entries, found.proxy))]
    if matters := ablation_conclusion(found.entries, found.proxy):
        facts.append(("parts", matters))
    facts += failures(found.entries)
    if found.missing:
        facts.append(("missing", f"{found.missing} trainings; the same command goes on"))
    facts.append(("also", str(found.folder / "result.json")))
    parts: list[RenderableType] = [TwoColumns(facts)]
    if found.entries:
        own = found.entries[0].name
        parts += ["", Text("Held-out loss, mean over the seeds", "bold")]
        parts += [comparison_table(found.entries, found.proxy), ""]
        parts += [Text(f"How far above the {own}'s loss, with the 95% interval", "bold")]
        parts += [difference_table(found.entries, found.proxy)]
    return Group(*parts)


def comparison_table(entries: Sequence[ComparisonEntry], proxy: Proxy) -> Table:
    """Parameters and FLOPs of full size; FLOPs of the proxies as shares of the winner's; losses."""
    own = winner_of(entries)
    table = plain_table("", "params", "FLOPs/token", "trained", *proxy.tasks)
    for entry in entries:
        table.add_row(
            entry.name,
            parameters(entry.receipt.params),
            short(entry.receipt.expected),
            _share(_flops(entry), _flops(own) if own else 0.0),
            *(_mean(entry.losses(task)) for task in proxy.tasks),
        )
    return table


def difference_table(entries: Sequence[ComparisonEntry], proxy: Proxy) -> Table:
    """By how many nats each loss is above the winner's, with the 95% interval; or what failed."""
    found = differences(entries, proxy)
    table = plain_table("", "objective", *proxy.tasks)
    for entry in entries:
        if entry.name in found:
            table.add_row(entry.name, *(str(gap) for gap in found[entry.name].values()))
        elif entry.error:
            table.add_row(entry.name, "failed")
    return table


def failures(entries: Sequence[ComparisonEntry]) -> list[tuple[str, str]]:
    """Who failed, and why."""
    return [("failed", f"{entry.name}: {entry.error}") for entry in entries if entry.error]


def _flops(entry: ComparisonEntry) -> float:
    """Executed by the proxies, per token; zero where that is not known."""
    known = [s.flops_per_token for of_task in entry.scores.values() for s in of_task]
    return fmean([flops or 0.0 for flops in known]) if known else 0.0


def _share(flops: float, of: float) -> str:
    return f"{flops / of:.0%}" if flops and of else ""


def _mean(losses: Sequence[float]) -> str:
    return f"{fmean(losses):.3f}" if losses else ""


def plain_table(first: str, *others: str) -> Table:
    """Without lines; all columns but the first to the right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
