"""The result of a search, as data and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import archdsl
from archdsl.costs.receipt import cost
from archdsl.files import write_text
from archdsl.lang.spec import ModelSpec
from archdsl.reports.notebook import as_html
from archdsl.reports.outline import OutlineNode, outline
from archdsl.search.analysis import comparison
from archdsl.search.analysis.comparison import ComparisonEntry
from archdsl.search.analysis.conclusions import conclusion, costs_sentence
from archdsl.search.analysis.noise import Noise, noise
from archdsl.search.analysis.proxy_validation import ProxyValidation
from archdsl.search.analysis.supernet_validation import SupernetValidation
from archdsl.search.report.html import write_page
from archdsl.search.report.png import plot
from archdsl.search.space.model_summary import model_summary
from archdsl.search.space.objectives import FLOPS
from archdsl.search.stats.pareto import pareto_front
from archdsl.search.study.settings import Settings
from archdsl.search.study.spending import Limits, SpendingSummary
from archdsl.search.study.trial import UNTRAINED, Trial
from archdsl.search.trials.proxy import Proxy, ProxyScore, Task


@dataclass(frozen=True)
class SearchReport:
    """The result of a search, which ``write_report`` also writes to ``folder``."""

    folder: Path
    settings: Settings
    trials: list[Trial]
    outcomes: dict[str, int]
    entries: list[ComparisonEntry]
    proxy_validation: ProxyValidation | None
    supernet_validation: SupernetValidation | None
    spending: SpendingSummary
    limits: Limits
    importance: dict[str, float]
    interrupted: bool
    command: str = ""
    pictures: tuple[str, ...] = ()

    @property
    def proxy(self) -> Proxy:
        """The proxy that the trials were trained with."""
        return self.settings.proxy

    def _repr_html_(self) -> str:
        """Return what the command line prints at the end of a search, for notebooks."""
        from archdsl.search.report.live import result

        return as_html(result(self))

    @cached_property
    def best(self) -> list[Trial]:
        """The trials that reached the last rung, of lowest loss first."""
        return best(self.trials)

    @cached_property
    def front(self) -> list[Trial]:
        """The Pareto front: trials to which no other trial is preferable in every objective."""
        return front_trials(self.trials)

    @cached_property
    def top(self) -> Trial:
        """The winning trial; see ``winning_trial``."""
        return winning_trial(self.trials, self.supernet_validation)

    @cached_property
    def winner(self) -> ModelSpec:
        """The spec of the winning trial, with a name and a description that say so."""
        top = self.top
        about = (
            f"Best of a search by proxies ({describe_proxy(self.proxy)}): trial {top.number}, "
            f"objective {top.value:.4f} nats. All results are in result.json."
        )
        return top.spec.model_copy(update={"name": f"{top.spec.name}-winner", "description": about})

    @property
    def conclusion(self) -> str:
        """Say in one sentence whether the winner is better than its baselines."""
        if not self.entries:
            return (
                "The search stopped before the best model found was compared with its baselines. "
                "Run the same command again to continue, with a longer --time if it was used up."
            )
        return conclusion(self.entries, self.proxy, f"the winner, trial {self.top.number},")

    @property
    def costs(self) -> str:
        """Say what the winner costs of what was allowed."""
        own = comparison.winner_of(self.entries)
        executed = own.executed if own else executed_flops(self.top, self.settings.axes)
        return costs_sentence(self.top.spec, self.settings.budget, executed)

    @cached_property
    def noise(self) -> Noise | None:
        """How much of the differences between trials seeds alone may explain, if that is known."""
        return noise(self.trials, self.entries, self.proxy)

    @property
    def validations(self) -> str:
        """Say whether the proxy, and the supernets, rank models rightly."""
        told = [self.supernet_validation, self.proxy_validation]
        return " ".join(one.sentence() for one in told if one is not None)

    @property
    def sentences(self) -> list[str]:
        """The sentences to read first: the conclusion, the costs, the noise, the validations."""
        noisy = self.noise.sentence() if self.noise else ""
        return [one for one in (self.conclusion, self.costs, noisy, self.validations) if one]

    @property
    def trained_share(self) -> float:
        """The share of all trials that were trained, between 0 and 1."""
        untrained = sum(self.outcomes.get(what, 0) for what in UNTRAINED)
        return 1 - untrained / max(1, sum(self.outcomes.values()))

    def as_json(self) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            "name": self.settings.name,
            "verdict": self.conclusion,
            "costs_sentence": self.costs,
            "noise": self.noise.as_json() if self.noise else None,
            "trust_sentence": self.validations,
            "interrupted": self.interrupted,
            "winner": self.top.number,
            "winner_spec": str(self.folder / "winner.yaml"),
            "front": [trial.number for trial in self.front],
            "axes": list(self.settings.axes),
            "objective": weighted(self.proxy),
            "proxy": describe_proxy(self.proxy),
            "budget": self.settings.budget.model_dump(mode="json", exclude_none=True),
            "trained_share": round(self.trained_share, 4),
            "spent": self.spending.as_json()
            | {"outcomes": self.outcomes, "limits": asdict(self.limits)},
            "entries": comparison.as_json(self.entries, self.proxy),
            "trust": self.proxy_validation.as_json() if self.proxy_validation else None,
            "shared": _supernet_json(self.supernet_validation)
            if self.supernet_validation
            else None,
            "importance": self.importance,
            "tree": _tree(self.winner),
            "trials": [trial_row(trial, self.settings.axes) for trial in self.trials],
            "command": self.command,
            "settings": self.settings.as_json(),
            "versions": versions(),
        }


def best(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that reached the last rung, of lowest loss first."""
    done = [trial for trial in trials if trial.value is not None]
    return sorted(done, key=lambda trial: (trial.value, trial.number))


def winning_trial(trials: Sequence[Trial], supernet_validation: SupernetValidation | None) -> Trial:
    """Return the trial of lowest loss.

    If supernets scored the models, only those count that were trained separately as well, because
    a supernet scores some layouts too well. Raises IndexError if no trial reached the last rung.
    """
    if supernet_validation is None or not supernet_validation.points:
        return best(trials)[0]
    number = min(supernet_validation.points, key=lambda point: point.own_loss).number
    return next(trial for trial in trials if trial.number == number)


def front_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front of the trials that reached the last rung."""
    done = [trial for trial in trials if trial.values is not None]
    return [done[i] for i in pareto_front([trial.point for trial in done])]


def write_report(report: SearchReport) -> SearchReport:
    """Write winner.yaml, trials.jsonl, result.json, report.html and the plots to the folder.

    Returns the report with the names of the files of pictures.
    """
    folder = report.folder
    result = report.as_json()
    write_text(folder / "winner.yaml", report.winner.to_yaml())
    lines = [json.dumps(row, sort_keys=True) for row in result["trials"]]
    write_text(folder / "trials.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "result.json", json.dumps(result, indent=1))
    return replace(report, pictures=_pictures(folder, result))


def _pictures(folder: Path, result: dict[str, Any]) -> tuple[str, ...]:
    """Write the HTML report, and the PNG files unless matplotlib is not installed."""
    write_page(result, folder / "report.html")
    try:
        drawn = plot(result, folder)
    except ImportError:
        drawn = []
    return ("report.html", *(path.name for path in drawn))


def _supernet_json(supernet_validation: SupernetValidation) -> dict[str, Any]:
    points = [
        {"trial": p.number, "shared": p.loss, "alone": p.own_loss}
        for p in supernet_validation.points
    ]
    return supernet_validation.as_json() | {
        "points": points,
        "sentence": supernet_validation.sentence(),
    }


def describe_proxy(proxy: Proxy) -> str:
    """Describe sizes and training of the proxy in a line."""
    if proxy.dim is None:
        sizes = "full size"
    else:
        of_dim = f" for a model of width {proxy.of_dim:,}" if proxy.of_dim else ""
        copies = f"at most {proxy.repeat} times"
        if proxy.of_repeat:
            copies = f"{proxy.repeat} of {proxy.of_repeat} times"
        sizes = f"width {proxy.dim}{of_dim}, stacks repeated {copies}"
    tasks = [
        f"{name}: {task.rungs[-1]} steps of {task.batch_size} x {task.length} {_units(task)} of "
        f"{task.data or 'the embedded corpus'}"
        for name, task in proxy.tasks.items()
    ]
    return f"{sizes}; {'; '.join(tasks)}{_reads_bytes(proxy)}"


def _units(task: Task) -> str:
    """Return what a text is cut into; a skill has tokens of its own."""
    is_text = not (task.data or "").startswith("skill:")
    return "bytes" if is_text and task.tokenizer == "bytes" else "tokens"


def _reads_bytes(proxy: Proxy) -> str:
    if all(_units(task) == "tokens" for task in proxy.tasks.values()):
        return ""
    return "; proxies read text as bytes, whatever the vocabulary of the full-size model"


def weighted(proxy: Proxy) -> str:
    """Write the objective as a formula such as ``text + 0.15 x skill``."""
    weights = {name: task.weight for name, task in proxy.tasks.items()}
    return " + ".join(n if weight == 1 else f"{weight:g} x {n}" for n, weight in weights.items())


def executed_flops(trial: Trial, axes: Sequence[str]) -> float | None:
    """Return the full-size FLOPs per token that a trial executed; None if they are no objective."""
    known = trial.values or dict(zip(axes[1:], trial.others, strict=False))
    return known.get(FLOPS)


def trial_row(trial: Trial, axes: Sequence[str]) -> dict[str, Any]:
    """Return a trial as a line of trials.jsonl: choices, full-size costs, scores and spec.

    ``axes`` are the objectives of the search.
    """
    receipt = cost(trial.spec)
    return {
        "trial": trial.number,
        "outcome": trial.outcome,
        "error": trial.error,
        "same_as": trial.same_as,
        "values": trial.values,
        "params": receipt.params,
        "flops_per_token": receipt.expected,
        "executed_flops_per_token": executed_flops(trial, axes),
        "kv_bytes_per_token": receipt.kv_bytes_per_token,
        "rungs": [_scores(rung) for rung in trial.rungs[:-1]]
        + [_scores(rung, curve=True) for rung in trial.rungs[-1:]],
        "choices": trial.choices,
        "fingerprint": trial.fingerprint,
        "words": model_summary(trial.spec),
        "spec": trial.spec.to_yaml(),
    }


def _scores(rung: dict[str, ProxyScore], curve: bool = False) -> dict[str, Any]:
    """Return the scores of a rung; only the last rung has a curve, which covers all rungs."""
    left_out = set() if curve else {"curve"}
    return {task: score.model_dump(mode="json", exclude=left_out) for task, score in rung.items()}


def _tree(spec: ModelSpec) -> list[dict[str, Any]]:
    """Return the parts of a model with their costs; FLOPs are forward FLOPs per token."""
    root = outline(spec)

    def rows(node: OutlineNode, depth: int) -> Iterator[dict[str, Any]]:
        yield {
            "node": f"{'  ' * depth}{node.label}",
            "path": node.path,
            "params": node.cost.params,
            "flops": node.cost.flops / spec.context,
            "share": node.cost.flops / max(1, root.cost.flops),
        }
        for below in node.below:
            yield from rows(below, depth + 1)

    return list(rows(root, 0))


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide results."""
    from importlib.metadata import version

    names = ("torch", "optuna", "pydantic", "numpy")
    return {"archdsl": archdsl.__version__} | {name: version(name) for name in names}
