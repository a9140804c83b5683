"""The result of a comparison of given models: tables, result.json, a page and plots."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

import archdsl
from archdsl.costs.receipt import cost
from archdsl.files import write_text
from archdsl.reports.layout import StackingTable, TwoColumns
from archdsl.reports.notebook import as_html
from archdsl.reports.tables import parameters, short
from archdsl.search.analysis import compare_results
from archdsl.search.analysis.compare_plan import SEEDS, ComparePlan
from archdsl.search.analysis.compare_results import TaskResult, finite, task_results
from archdsl.search.analysis.compare_setup import LR_SEED, CompareSetup
from archdsl.search.analysis.comparison import ComparisonEntry
from archdsl.search.report.html import asset
from archdsl.search.report.png import STYLE, save
from archdsl.search.report.report import describe_proxy, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {
    "params": "parameters of the model that was trained",
    "FLOPs": "of a forward pass, per token, as executed on the held-out data",
    "training": "training FLOPs, at the capacities of the routers",
    "tokens/s": "training tokens per second of one worker, while others worked beside it",
    "memory": "the largest of a worker, in bytes",
    "loss": "held-out nats per prediction, with the 95% interval of its mean over the seeds",
    "difference": "of the loss to the reference's, paired by seed; the intervals of all models and "
    "tasks hold together with 95% (Bonferroni)",
    "data": "the share of the tokens after which the model had the reference's final loss, "
    "measured on an eighth of the held-out tokens",
}
PICTURE = "loss.png"


@dataclass(frozen=True)
class CompareReport:
    """The result of ``compare``, which is also written to ``folder``.

    ``entries``: the models, the reference first, each with the scores of all complete seeds.
    ``missing``: the number of trainings that were not done.
    """

    folder: Path
    setup: CompareSetup
    entries: list[ComparisonEntry]
    seeds: int
    missing: int
    interrupted: bool
    command: str = ""

    @cached_property
    def results(self) -> dict[str, dict[str, TaskResult]]:
        """The results by task and model."""
        return task_results(self.setup, self.entries)

    @cached_property
    def sentences(self) -> dict[str, str]:
        """What is found of each model but the reference, by name, and what the intervals are."""
        return compare_results.sentences(self.setup, self.entries)

    def as_json(self) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            "sentences": self.sentences,
            "reference": self.setup.reference,
            "tasks": compare_results.as_json(self.setup, self.entries),
            "specs": {
                task: {name: spec.to_yaml() for name, spec in specs.items()}
                for task, specs in self.setup.small.items()
            },
            "lr": {
                task: {
                    name: {
                        "chosen": self.setup.lr(name, task),
                        "losses": self._lr_losses(name, task),
                    }
                    for name in self.setup.names
                }
                for task in self.setup.proxy.tasks
            },
            "errors": {entry.name: entry.error for entry in self.entries if entry.error},
            "seeds": self.seeds,
            "missing": self.missing,
            "interrupted": self.interrupted,
            "proxy": self.setup.proxy.model_dump(mode="json"),
            "data": {n: task.load().fingerprint for n, task in self.setup.proxy.tasks.items()},
            "command": self.command,
            "versions": versions(),
        }

    def _lr_losses(self, name: str, task: str) -> dict[str, float | None]:
        tried = self.setup.lr_losses.get((name, task), {})
        return {str(lr): finite(loss) for lr, loss in tried.items()}

    def _repr_html_(self) -> str:
        """Return what the command line prints at its end, for notebooks."""
        return as_html(result(self))


# the terminal


def result(report: CompareReport) -> RenderableType:
    """Return what ``archdsl compare`` prints at its end."""
    parts: list[RenderableType] = []
    for task, by_model in report.results.items():
        parts += [Text(f"{task}: {_about(report, task)}", "bold"), task_table(by_model), ""]
    facts = list(COLUMNS.items()) if report.results else []
    facts.append(("trained", describe_proxy(report.setup.proxy)))
    facts += [("learning rate", said) for said in lr_sentences(report.setup)]
    if report.missing:
        many = f"{report.missing} trainings; run the same command again to continue"
        facts.append(("missing", many))
    drawn = f", {PICTURE}" if (report.folder / PICTURE).exists() else ""
    facts.append(("files", f"{report.folder / 'result.json'}, report.html{drawn} beside it"))
    return Group(*parts, TwoColumns(facts), "", TwoColumns(list(report.sentences.items())))


def lr_sentences(setup: CompareSetup) -> Iterator[str]:
    """Yield for each task which learning rate each model got, or that nobody's was chosen."""
    if not setup.lr_losses:
        rates = ", ".join(f"{lr:g}" for lr in sorted({t.lr for t in setup.proxy.tasks.values()}))
        yield f"{rates} for all models, which can favour one of them; give --lr several times"
        return
    tried = ", ".join(f"{lr:g}" for lr in setup.lrs)
    for task in setup.proxy.tasks:
        got = {name: setup.lr(name, task) for name in setup.names}
        finite_losses = {n: any(map(math.isfinite, setup.lr_losses[n, task].values())) for n in got}
        diverged = [name for name, found in finite_losses.items() if not found]
        between = setup.lrs[1:-1] or setup.lrs  # of two rates, each is at an end
        edges = [n for n, lr in got.items() if lr not in between and n not in diverged]
        wider = f"; {', '.join(edges)}: at the end of the range, so give a wider one" * bool(edges)
        wider += f"; {', '.join(diverged)}: diverged with each" * bool(diverged)
        chosen = ", ".join(f"{name} {lr:g}" for name, lr in got.items())
        yield (
            f"{task}: {chosen}: of {tried} the one with the model's lowest held-out loss after a "
            f"training with seed {LR_SEED}{wider}"
        )


def _about(report: CompareReport, task: str) -> str:
    one = next(iter(report.results[task].values()))
    return f"{short(one.tokens)} training tokens, {len(one.scores)} seeds"


def task_table(by_model: dict[str, TaskResult]) -> StackingTable:
    """Return the table of a task: a row for each model, the reference first."""
    rows = list(_rows(by_model))
    table = StackingTable("", *rows[0][1:])
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _rows(by_model: dict[str, TaskResult]) -> Iterator[list[str]]:
    """Yield the titles, and the cells of each model."""
    reference, *others = by_model
    has_accuracy = by_model[reference].bits_per_byte is None and by_model[reference].accuracy
    quality = "accuracy" if has_accuracy else "bits per byte"
    yield ["", *list(COLUMNS)[:5], quality, *list(COLUMNS)[5:]]
    for name, found in by_model.items():
        yield [
            name,
            parameters(cost(found.trained).params),
            short(found.flops.mean) if found.flops else "",
            short(found.step_flops * found.task.rungs[-1]),
            short(found.tokens_per_second.mean) if found.tokens_per_second else "",
            short(found.peak_bytes),
            _quality(found, bool(has_accuracy)),
            found.loss.text(),
            str(found.difference) if name in others else "reference",
            str(found.data_share) if name in others else "",
        ]


def _quality(found: TaskResult, has_accuracy: bool) -> str:
    if has_accuracy:
        return f"{found.accuracy.text(1, 100)}%" if found.accuracy else ""
    return found.bits_per_byte.text() if found.bits_per_byte else ""


def planned(plan: ComparePlan) -> RenderableType:
    """Return what ``archdsl compare --plan`` prints."""
    sizes = next(iter(plan.tasks.values())).needed if plan.tasks else {}
    table = StackingTable(
        "", "deviation", f"told by {plan.seeds}", *(f"for {size:g}" for size in sizes)
    )
    for name, task in plan.tasks.items():
        needed = [str(n) if n else ">1000" for n in task.needed.values()]
        table.add_row(name, f"{task.deviation:.3f}", f"{task.told:.3f}", *needed)
    left = timedelta(seconds=round(plan.seconds))
    facts = [
        (
            "deviation",
            "of a loss difference to the reference between seeds, in nats, after the "
            f"first {plan.share:.0%} of the tokens, with {SEEDS} seeds",
        ),
        (
            f"told by {plan.seeds}",
            f"the least true difference in nats that {plan.seeds} seeds tell in about three of "
            "four cases",
        ),
        ("for ...", "the seeds that tell a true difference of so many nats as surely"),
        (
            "cost",
            f"{plan.trainings} trainings of {short(plan.train_flops)} FLOPs together; with "
            f"{plan.workers} workers {left} are left; a comparison with one learning rate goes on "
            "from this forecast",
        ),
        *(("failed", failure) for failure in plan.failures),
    ]
    return Group(table, "", TwoColumns(facts))


# files


def write_report(report: CompareReport) -> None:
    """Write result.json, loss.png (with the extra ``plots``) and report.html to the folder."""
    write_text(report.folder / "result.json", json.dumps(report.as_json(), indent=1))
    try:
        draw(report)
    except ImportError:  # matplotlib is in the extra `plots`
        (report.folder / PICTURE).unlink(missing_ok=True)
    write_text(report.folder / "report.html", page(report))


def page(report: CompareReport) -> str:
    """Return the report as one page that loads nothing and runs no script."""
    tables = "".join(
        f"<section><h2>{escape(task)}</h2><p class='lead'>{escape(_about(report, task))}</p>"
        f"<div class='scroll'>{_html_table(list(_rows(by_model)))}</div></section>"
        for task, by_model in report.results.items()
    )
    said = "".join(
        f"<p class='costs'><b>{escape(name)}</b> {escape(sentence)}</p>"
        for name, sentence in report.sentences.items()
    )
    columns = "".join(f"<dt>{escape(n)}</dt><dd>{escape(t)}</dd>" for n, t in COLUMNS.items())
    specs = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(spec.to_yaml())}</pre></details>"
        for name, spec in report.setup.main_specs.items()
    )
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>Comparison of {len(report.setup.names)} models</title>"
        f"<style>{asset('page.css')}</style></head><body>"
        f"<header><p class='eyebrow'>Comparison with <b>{escape(report.setup.reference)}</b></p>"
        f"{said}</header><main>{tables}{_picture(report)}"
        f"<section><h2>Columns</h2><dl class='facts'>{columns}</dl></section>"
        f"<section><h2>Models, as trained</h2>{specs}</section>"
        f"<section><h2>Command and settings</h2><pre>{escape(report.command)}</pre>"
        f"<p>{escape(describe_proxy(report.setup.proxy))}; archdsl {archdsl.__version__}</p>"
        f"{''.join(f'<p>Learning rate: {escape(s)}</p>' for s in lr_sentences(report.setup))}"
        "</section></main></body></html>"
    )


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _picture(report: CompareReport) -> str:
    path = report.folder / PICTURE
    if not path.exists():
        return ""
    data = b64encode(path.read_bytes()).decode()
    return (
        "<section><h2>Loss over tokens and over training FLOPs</h2>"
        f"<img alt='Held-out loss of each model' src='data:image/png;base64,{data}' "
        "style='max-width:100%'></section>"
    )


def draw(report: CompareReport) -> None:
    """Draw the held-out losses over tokens and training FLOPs; raises ImportError."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    if not report.results:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2 * len(report.results)), layout="constrained")
        grid = figure.subplots(len(report.results), 2, squeeze=False)
        for (left, right), (task, by_model) in zip(grid, report.results.items(), strict=True):
            _draw_task(left, by_model, per_step=lambda found: found.tokens / found.task.rungs[-1])
            _draw_task(right, by_model, per_step=lambda found: found.step_flops)
            left.set(xlabel="training tokens", ylabel=f"{task}: held-out loss, nats")
            right.set(xlabel="training FLOPs", xscale="log")
            for axes in (left, right):
                axes.xaxis.set_major_formatter(EngFormatter())
                axes.xaxis.set_minor_formatter(NullFormatter())
            left.legend()
        save(figure, report.folder / PICTURE)


def _draw_task(axes: Axes, by_model: dict[str, TaskResult], per_step: Any) -> None:
    """Draw a line through the means over seeds, and the range of the seeds around it."""
    for name, found in by_model.items():
        # a training that diverged has fewer points
        columns = list(zip(*(score.held_out for score in found.scores), strict=False))
        if not columns:
            continue
        x = [points[0][0] * per_step(found) for points in columns]
        losses = [[loss for _, loss in points] for points in columns]
        diverged = sum(score.loss is None for score in found.scores)
        said = f" ({diverged} of {len(found.scores)} diverged)" if diverged else ""
        axes.plot(x, [fmean(some) for some in losses], label=name + said)
        axes.fill_between(
            x, [min(some) for some in losses], [max(some) for some in losses], alpha=0.2
        )
