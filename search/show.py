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
from archdsl.show import Facts, parameters, short
from archdsl.spec import ModelSpec

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
    return Group(Text(_line(progress)), bar, Text(counts, "dim"), candidates(progress.best))


def candidates(trials: list[Finished]) -> Table:
    """Best first: proxy scores, and what the model costs at full size."""
    table = Table(box=None, pad_edge=False)
    for title in ("trial", "objective"):
        table.add_column(title, justify="right")
    tasks = list(trials[0].rungs[-1]) if trials else []
    for task in tasks:
        table.add_column(task, justify="right")
    for title in ("params", "FLOPs/token"):
        table.add_column(title, justify="right")
    table.add_column("model", overflow="fold")
    for trial in trials:
        receipt = cost(trial.spec)
        scores = [
            _score(trial.rungs[-1][task].loss, trial.rungs[-1][task].accuracy) for task in tasks
        ]
        table.add_row(
            str(trial.number),
            f"{trial.value:.3f}",
            *scores,
            parameters(receipt.params),
            short(receipt.expected),
            in_short(trial.spec),
        )
    return table


def _score(loss: float | None, accuracy: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f} ({accuracy or 0:.0%})"


def in_short(spec: ModelSpec) -> str:
    """The blocks in a few words: ``2x(layer + loop x4 prefix .7/.7/.5) + ...``."""
    from archdsl.search.words import words

    return " + ".join(words(block) for block in spec.blocks)


def result(report: Report) -> RenderableType:
    """What a search ends with."""
    tau, pairs = report.rung_correlation()
    facts = [("verdict", sentence) for sentence in report.sentences()]
    counts = ", ".join(f"{n} {what}" for what, n in report.outcomes.items())
    facts += [
        ("trials", f"{counts}; {report.seconds:.0f} s"),
        ("proxy", report.proxy),
        ("loss", "held-out nats per prediction, (accuracy); the objective is their sum"),
        ("trust", _trust(tau, pairs)),
        ("winner", f"{report.folder / 'winner.yaml'}: archdsl build accepts it"),
        ("also", f"trials.jsonl, result.json{', front.png' if report.plotted else ''} beside it"),
    ]
    if not report.plotted:
        facts.append(("plot", "none: pip install 'archdsl[plots]' and run this again"))
    parts: list[RenderableType] = [Text("Best candidates", "bold"), candidates(report.best[:5]), ""]
    if report.entries:
        parts += [Text("The winner and its controls", "bold"), contestants(report), ""]
    return Group(*parts, Facts(facts))


def _trust(tau: float | None, pairs: int) -> str:
    if tau is None:
        return (
            f"{pairs} trials reached the last rung: too few to say how far the first one is right"
        )
    return f"Kendall's tau between the first and the last rung is {tau:+.2f} over {pairs} trials"


def contestants(report: Report) -> Table:
    """Means over the seeds, and how much higher than the winner's, with the 95% interval."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("params", "FLOPs/token"):
        table.add_column(title, justify="right")
    differences = report.differences()
    for task in report.tasks:
        table.add_column(task, justify="right")
        table.add_column("to the winner", justify="right")
    for entry in report.entries:
        cells = [parameters(entry.receipt.params), short(entry.receipt.expected)]
        for task in report.tasks:
            gap = differences.get(entry.name, {}).get(task)
            cells += [f"{fmean(entry.losses(task)):.3f}", "" if gap is None else str(gap)]
        table.add_row(entry.name, *cells)
    return table
