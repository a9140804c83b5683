"""What a search prints: its progress while it runs, and its result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from archdsl.costs.receipt import cost
from archdsl.reports.layout import StackingTable, TwoColumns
from archdsl.reports.tables import parameters, short
from archdsl.search.analysis.conclusions import ablation_conclusion
from archdsl.search.report.report import describe_proxy, front_trials, weighted
from archdsl.search.report.tables import (
    comparison_legend,
    comparison_table,
    difference_table,
    failures,
)
from archdsl.search.space.model_summary import model_summary
from archdsl.search.space.objectives import FLOPS
from archdsl.search.study.spending import SEARCH

if TYPE_CHECKING:
    from archdsl.search.engine import SearchProgress, Watch
    from archdsl.search.report.report import SearchReport
    from archdsl.search.studies import DamagedStudy, ListedStudy
    from archdsl.search.study.trial import Trial
    from archdsl.search.trials.proxy import ProxyScore

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def watching() -> Iterator[Watch]:
    """Show the progress: a live table in a terminal, elsewhere a line on stderr for each change."""
    if sys.stderr.isatty():
        console = Console(stderr=True)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda progress: live.update(_live(progress), refresh=True)
    else:
        yield _Lines()


class _Lines:
    def __init__(self) -> None:
        self.said, self.at = "", 0.0

    def __call__(self, progress: SearchProgress) -> None:
        if progress.last == self.said and time.monotonic() - self.at < SECONDS_BETWEEN_LINES:
            return
        self.said, self.at = progress.last, time.monotonic()
        print(_line(progress), file=sys.stderr, flush=True)


def _line(progress: SearchProgress) -> str:
    limit = f"/{progress.seconds:.0f}" if progress.seconds else ""
    parts = [f"{progress.elapsed:.0f}{limit} s", progress.phase, progress.last]
    if progress.best:
        parts.append(f"best {progress.best[0].value:.3f} (trial {progress.best[0].number})")
    if progress.phase == SEARCH and progress.rungs.tau is not None:
        parts.append(f"Kendall's tau between rungs {progress.rungs}")
    return "; ".join(part for part in parts if part)


def _live(progress: SearchProgress) -> RenderableType:
    bar = ProgressBar(total=progress.seconds or None, completed=progress.elapsed, width=40)
    counts = ", ".join(f"{n} {what}" for what, n in progress.outcomes.items())
    head = Text(_line(progress))
    best = [trial_table(progress.best), models(progress.best)] if progress.best else []
    return Group(head, bar, Text(counts, "dim"), *best)


def trial_table(trials: Sequence[Trial]) -> StackingTable:
    """Return a table of proxy losses and full-size costs.

    FLOPs per token are those executed if they were an objective of the search, else the nominal
    ones. Beside a loss in nats stand the bits per byte of a text, or else the accuracy.
    """
    tasks = list(trials[0].rungs[-1]) if trials else []
    titles = [_task_title(trials[0].rungs[-1][task], task) for task in tasks]
    which = "executed" if trials and FLOPS in (trials[0].values or {}) else "nominal"
    table = StackingTable("trial", "objective", *titles, "params", f"{which} FLOPs")
    for trial in trials:
        receipt = cost(trial.spec)
        last = trial.rungs[-1]
        table.add_row(
            str(trial.number),
            f"{trial.value:.3f}",
            *(_score(last[task]) for task in tasks),
            parameters(receipt.params),
            short((trial.values or {}).get(FLOPS, receipt.expected)),
        )
    return table


def models(trials: Sequence[Trial]) -> RenderableType:
    """Return the model of each trial in a line."""
    return TwoColumns([(f"{trial.number:>5}", model_summary(trial.spec)) for trial in trials])


def _task_title(score: ProxyScore, task: str) -> str:
    return f"{task} ({'accuracy' if score.bits_per_byte is None else 'bits/byte'})"


def _score(score: ProxyScore) -> str:
    if score.loss is None:
        return "diverged"
    bits = score.bits_per_byte
    return f"{score.loss:.3f} ({f'{score.accuracy or 0:.0%}' if bits is None else f'{bits:.3f}'})"


def result(report: SearchReport) -> RenderableType:
    """Return what a search prints at its end, the conclusions last, where a screen ends."""
    parts: list[RenderableType] = [
        Text("Pareto front: no other trial is better in both loss and cost", "bold"),
        trial_table(report.front),
        models(report.front),
        "",
    ]
    if report.entries:
        title = "The winner (lowest loss), its baselines, and its ablations"
        parts += [Text(title, "bold"), comparison_table(report.entries, report.proxy), ""]
    if len(report.entries) > 1:
        title = "Loss above that of the winner, with the 95% interval"
        parts += [Text(title, "bold"), difference_table(report.entries, report.proxy), ""]
    said = (Text(sentence, "bold") for sentence in report.sentences)
    return Group(*parts, TwoColumns(_facts(report)), "", *said)


def _facts(report: SearchReport) -> list[tuple[str, str]]:
    counts = ", ".join(f"{n} {what}" for what, n in report.outcomes.items())
    total = report.spending.total
    matters = ablation_conclusion(report.entries, report.proxy)
    facts = [("parts", matters)] if matters else []
    facts += failures(report.entries)
    facts += [
        ("trials", f"{counts}; {report.trained_share:.0%} of them were trained"),
        (
            "spending",
            f"{report.spending.wall:.0f} s, {total.seconds:.0f} s of workers, "
            f"{short(total.train_flops)} FLOPs of training",
        ),
        ("proxy", describe_proxy(report.proxy)),
        ("objective", f"held-out nats per prediction: {weighted(report.proxy)}"),
        *comparison_legend(report.entries),
        ("winner", f"{report.folder / 'winner.yaml'}, a spec for archdsl build and archdsl train"),
        ("files", ", ".join((*report.pictures, "result.json", "trials.jsonl")) + " beside it"),
    ]
    if len(report.pictures) == 1:
        facts.append(("plots", "none; run pip install 'archdsl[plots]' and repeat this command"))
    return facts


def listing(found: Sequence[ListedStudy | DamagedStudy]) -> RenderableType:
    """Return a table with a line for each study, and below it why some cannot be read."""
    table = StackingTable("study", "folder", "trials", "best", "front", "time", "training")
    damaged = []
    for one in found:
        told = one.as_json()
        if "error" in told:
            damaged.append(Text(f"{one.name}: {told['error']}"))
            table.add_row(one.name, told["folder"] or "", "cannot be read", "", "", "", "")
            continue
        top = told["best"]
        table.add_row(
            one.name,
            told["folder"] or "",
            ", ".join(f"{n} {what}" for what, n in told["outcomes"].items()) or "none",
            f"{top['loss']:.3f}" if top else "",
            str(len(told["front"])),
            f"{told['spent']['wall_seconds']:.0f} s",
            f"{short(told['spent']['train_flops'])} FLOPs",
        )
    return Group(table, "", *damaged) if damaged else table


def standing(listed: ListedStudy) -> RenderableType:
    """Return the state of a study: sentences of its last report, its front, its spending."""
    result = listed.result()
    parts: list[RenderableType] = [Text(said, "bold") for said in sentences_of(result)]
    if trials := front_trials(listed.record.finished()):
        parts += ["", Text("Pareto front", "bold"), trial_table(trials), models(trials), ""]
    told = listed.as_json()
    counts = ", ".join(f"{n} {what}" for what, n in told["outcomes"].items())
    spent = told["spent"]
    facts = [
        ("study", listed.name),
        ("trials", f"{counts or 'none'}; {told['under_way']} running"),
        (
            "spending",
            f"{spent['wall_seconds']:.0f} s, {spent['worker_seconds']:.0f} s of workers, "
            f"{short(spent['train_flops'])} FLOPs of training, {spent['processes']} processes",
        ),
    ]
    if listed.folder is not None:
        facts.append(("folder", str(listed.folder)))
    return Group(*parts, TwoColumns(facts))


def sentences_of(result: Mapping[str, Any] | None) -> list[str]:
    """Return the sentences to read first of a result.json, which may be of an earlier version."""
    if result is None:
        return []
    noisy = (result.get("noise") or {}).get("sentence", "")
    told = [result["verdict"], result.get("costs_sentence", ""), noisy, result["trust_sentence"]]
    return [one for one in told if one]
