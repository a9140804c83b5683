"""A search on the screen: while it runs, and when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from archdsl.cost import cost
from archdsl.search.report import describe
from archdsl.search.words import in_words
from archdsl.show import Facts, parameters, short

if TYPE_CHECKING:
    from archdsl.search.report import Report
    from archdsl.search.run import Progress, Watch
    from archdsl.search.study import Finished

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def watching() -> Iterator[Watch]:
    """A live table in a terminal; elsewhere a line on stderr whenever something is new."""
    if sys.stderr.isatty():
        console = Console(stderr=True)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda progress: live.update(_live(progress), refresh=True)
    else:
        yield _Lines()


class _Lines:
    def __init__(self) -> None:
        self.said, self.at = "", 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.last == self.said and time.monotonic() - self.at < SECONDS_BETWEEN_LINES:
            return
        self.said, self.at = progress.last, time.monotonic()
        print(_line(progress), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    limit = f"/{progress.seconds:.0f}" if progress.seconds else ""
    parts = [f"{progress.elapsed:.0f}{limit} s", progress.phase, progress.last]
    if progress.best:
        parts.append(f"best {progress.best[0].value:.3f} (trial {progress.best[0].number})")
    return "; ".join(part for part in parts if part)


def _live(progress: Progress) -> RenderableType:
    bar = ProgressBar(total=progress.seconds or None, completed=progress.elapsed, width=40)
    counts = ", ".join(f"{n} {what}" for what, n in progress.outcomes.items())
    head = Text(_line(progress))
    best = [candidates(progress.best), models(progress.best)] if progress.best else []
    return Group(head, bar, Text(counts, "dim"), *best)


def candidates(trials: list[Finished]) -> Table:
    """Best first: proxy scores, and what the model costs at full size."""
    tasks = list(trials[0].rungs[-1]) if trials else []
    table = _table("trial", "objective", *tasks, "params", "FLOPs/token")
    for trial in trials:
        receipt = cost(trial.spec)
        last = trial.rungs[-1]
        table.add_row(
            str(trial.number),
            f"{trial.value:.3f}",
            *(_score(last[task].loss, last[task].accuracy) for task in tasks),
            parameters(receipt.params),
            short(receipt.expected),
        )
    return table


def models(trials: list[Finished]) -> RenderableType:
    """Which trial is which model."""
    return Facts([(f"{trial.number:>5}", in_words(trial.spec)) for trial in trials])


def _score(loss: float | None, accuracy: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f} ({accuracy or 0:.0%})"


def result(report: Report) -> RenderableType:
    """What a search ends with."""
    tau, pairs = report.rung_correlation()
    facts = [("verdict", report.verdict())]
    counts = ", ".join(f"{n} {what}" for what, n in report.outcomes.items())
    facts += [
        ("trials", f"{counts}; {report.seconds:.0f} s"),
        ("proxy", describe(report.proxy)),
        ("loss", f"held-out nats per prediction (accuracy); objective = {_sum(report)}"),
        ("trust", _trust(tau, pairs)),
        ("winner", f"{report.folder / 'winner.yaml'}: archdsl build accepts it"),
        ("also", f"trials.jsonl, result.json{', front.png' if report.plotted else ''} beside it"),
    ]
    if not report.plotted:
        facts.append(("plot", "none: pip install 'archdsl[plots]' and run this again"))
    top = report.best[:5]
    parts: list[RenderableType] = [
        Text("Best candidates", "bold"),
        candidates(top),
        models(top),
        "",
    ]
    if report.entries:
        parts += [Text("The winner and its controls", "bold"), contestants(report), ""]
    if report.differences():
        parts += [Text("How far above the winner's loss", "bold"), gaps(report), ""]
    return Group(*parts, Facts(facts))


def _sum(report: Report) -> str:
    weights = {name: task.weight for name, task in report.proxy.tasks.items()}
    return " + ".join(n if weight == 1 else f"{weight:g} x {n}" for n, weight in weights.items())


def _trust(tau: float | None, pairs: int) -> str:
    if tau is None:
        return (
            f"{pairs} trials reached the last rung: too few to say how far the first one is right"
        )
    return f"Kendall's tau between the first and the last rung is {tau:+.2f} over {pairs} trials"


def contestants(report: Report) -> Table:
    """The winner and its controls: means over the seeds."""
    table = _table("", "params", "FLOPs/token", *report.tasks)
    for entry in report.entries:
        table.add_row(
            entry.name,
            parameters(entry.receipt.params),
            short(entry.receipt.expected),
            *(f"{fmean(entry.losses(task)):.3f}" for task in report.tasks),
        )
    return table


def gaps(report: Report) -> Table:
    """By how many nats each control's loss is above the winner's, with the 95% interval."""
    found = report.differences()
    table = _table("", *next(iter(found.values())))
    for name, by_task in found.items():
        table.add_row(name, *(str(gap) for gap in by_task.values()))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
