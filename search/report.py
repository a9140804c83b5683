"""What a search found: the table, the winner as a file, the controls, the sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import archdsl
from archdsl.cost import Receipt, cost
from archdsl.files import write_text
from archdsl.search.compare import Difference, kendall_tau, paired
from archdsl.search.proxy import Proxy, Score, objective
from archdsl.search.study import Finished
from archdsl.spec import Budget, ModelSpec

WINNER = "winner"
OBJECTIVE = "objective"


@dataclass(frozen=True)
class Entry:
    """The winner or one of its controls: full-size spec and cost, proxy scores by task and seed."""

    name: str
    spec: ModelSpec
    receipt: Receipt
    scores: dict[str, list[Score]]

    def losses(self, task: str) -> list[float]:
        return [math.inf if s.loss is None else s.loss for s in self.scores[task]]


@dataclass(frozen=True)
class Report:
    """The result of a search; everything in it also lies in ``folder``."""

    folder: Path
    winner: ModelSpec
    trials: list[Finished]
    outcomes: dict[str, int]
    entries: list[Entry]
    proxy: Proxy
    seconds: float
    budget: Budget
    interrupted: bool
    plotted: bool = False

    @property
    def tasks(self) -> list[str]:
        return list(self.proxy.tasks)

    @property
    def best(self) -> list[Finished]:
        """Trials that reached the last rung, best first."""
        return best(self.trials)

    def differences(self) -> dict[str, dict[str, Difference]]:
        """For each control, how much higher its loss is than the winner's: in the objective
        (the first key) and by task."""
        by_name = {entry.name: entry for entry in self.entries}
        if WINNER not in by_name:
            return {}
        own = by_name.pop(WINNER)
        return {name: self._differences(entry, own) for name, entry in by_name.items()}

    def _differences(self, control: Entry, own: Entry) -> dict[str, Difference]:
        by_task = {task: paired(control.losses(task), own.losses(task)) for task in self.tasks}
        return {OBJECTIVE: paired(self._objectives(control), self._objectives(own))} | by_task

    def _objectives(self, entry: Entry) -> list[float]:
        by_seed = zip(*(entry.scores[task] for task in self.tasks), strict=True)
        totals = [
            objective(dict(zip(self.tasks, scores, strict=True)), self.proxy) for scores in by_seed
        ]
        return [math.inf if total is None else total for total in totals]

    def verdict(self) -> str:
        """In one sentence, whether the winner beats its controls."""
        if not self.entries:
            return (
                "Stopped before the winner met its controls; the same command goes on, "
                "with more --time if that was used up."
            )
        found = {name: by_task[OBJECTIVE] for name, by_task in self.differences().items()}
        if not found:
            return "The winner is the plain model itself: nothing that thinks did better here."
        said = {
            "lower": "beats",
            "higher": "loses to",
            "cannot tell": "cannot be told, the interval being too wide, from",
        }
        parts = [
            f"{words} {_listed([n for n, d in found.items() if d.verdict == verdict])}"
            for verdict, words in said.items()
            if any(d.verdict == verdict for d in found.values())
        ]
        pairs = next(iter(found.values())).pairs
        return f"Over {pairs} seeds that chose nothing, the winner {'; it '.join(parts)}."

    def rung_correlation(self) -> tuple[float | None, int]:
        """Kendall's tau between the first and the last rung's objective, and over how many."""
        pairs = [
            (first, trial.value)
            for trial in self.best
            if (first := objective(trial.rungs[0], self.proxy)) is not None
            and trial.value is not None
        ]
        return kendall_tau(pairs), len(pairs)

    def as_json(self) -> dict[str, Any]:
        return {
            "winner": str(self.folder / "winner.yaml"),
            "verdict": self.verdict(),
            "best": [_row(trial) for trial in self.best[:10]],
            "controls": {
                entry.name: {
                    "params": entry.receipt.params,
                    "flops_per_token": entry.receipt.expected,
                    "losses": {t: [s.loss for s in entry.scores[t]] for t in self.tasks},
                }
                for entry in self.entries
            },
            "differences": {
                name: {
                    task: {"mean": _finite(d.mean), "half_width": _finite(d.half_width)}
                    for task, d in by_task.items()
                }
                for name, by_task in self.differences().items()
            },
            "outcomes": self.outcomes,
            "rung_correlation": self.rung_correlation()[0],
            "seconds": round(self.seconds, 1),
            "budget": self.budget.model_dump(mode="json"),
            "proxy": describe(self.proxy),
            "interrupted": self.interrupted,
            "versions": _versions(),
        }


def best(trials: Sequence[Finished]) -> list[Finished]:
    done = [trial for trial in trials if trial.value is not None]
    return sorted(done, key=lambda trial: (trial.value, trial.number))


def _listed(names: list[str]) -> str:
    return " and ".join(f"the {name} twin" for name in names)


def write_report(
    folder: Path,
    trials: list[Finished],
    outcomes: dict[str, int],
    entries: list[Entry],
    proxy: Proxy,
    seconds: float,
    budget: Budget,
    interrupted: bool,
) -> Report:
    """Fills the folder with winner.yaml, trials.jsonl, result.json and, with matplotlib, a plot."""
    top = best(trials)[0]
    winner = top.spec.model_copy(
        update={"name": f"{top.spec.name}-winner", "description": _about(top, proxy)}
    )
    report = Report(
        folder=folder,
        winner=winner,
        trials=trials,
        outcomes=outcomes,
        entries=entries,
        proxy=proxy,
        seconds=seconds,
        budget=budget,
        interrupted=interrupted,
    )
    report = replace(report, plotted=_plotted(report))
    write_text(folder / "winner.yaml", winner.to_yaml())
    lines = [json.dumps(_row(trial), sort_keys=True) for trial in trials]
    write_text(folder / "trials.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "result.json", json.dumps(report.as_json(), indent=1))
    return report


def _plotted(report: Report) -> bool:
    from archdsl.search.plot import plot

    try:
        plot(report, report.folder / "front.png")
    except ImportError:
        return False  # the report says how to get one
    return True


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _about(top: Finished, proxy: Proxy) -> str:
    return (
        f"Best of a search by proxies ({describe(proxy)}): trial {top.number}, "
        f"objective {top.value:.4f} nats. The figures beside it are in result.json."
    )


def describe(proxy: Proxy) -> str:
    """The proxy in a line, for a reader who wants to know how far to trust it."""
    if proxy.dim is None:
        sizes = "the real size"
    else:
        sizes = f"width {proxy.dim}, stacks repeated at most {proxy.repeat} times"
    tasks = [
        f"{name}: {task.rungs[-1]} steps of {task.batch_size} x {task.context} tokens of "
        f"{task.data or 'the embedded corpus'}"
        for name, task in proxy.tasks.items()
    ]
    return f"{sizes}; {'; '.join(tasks)}"


def _row(trial: Finished) -> dict[str, Any]:
    receipt = cost(trial.spec)
    return {
        "trial": trial.number,
        "outcome": trial.outcome,
        "objective": trial.value,
        "params": receipt.params,
        "flops_per_token": receipt.expected,
        "kv_bytes_per_token": receipt.kv_bytes_per_token,
        "rungs": [
            {task: score.model_dump(mode="json") for task, score in rung.items()}
            for rung in trial.rungs
        ],
        "choices": trial.params,
        "fingerprint": trial.fingerprint,
        "spec": trial.spec.to_yaml(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "optuna", "pydantic", "numpy")
    return {"archdsl": archdsl.__version__} | {name: version(name) for name in names}
