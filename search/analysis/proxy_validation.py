"""Validation of the proxy: does its ranking of models hold on later rungs and in a wider proxy?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archdsl.search.analysis.comparison import JobResult
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, objective

POINTS = 8  # models that are trained again at a larger width
BEST = 3  # of these, the models of lowest loss

Key = tuple[int, str]  # trial number, task
Run = Callable[[Mapping[Key, Job]], dict[Key, JobResult]]  # those that time allowed have a result


@dataclass(frozen=True)
class WiderPoint:
    """The loss of a trial in the proxy of the search and in the wider proxy, in nats."""

    number: int
    loss: float
    wider_loss: float


@dataclass(frozen=True)
class ProxyValidation:
    """Rank correlations between the first and the last rung, and between the proxy and a wider one.

    ``width`` is that of the wider proxy; None if models were trained at their own size.
    """

    between_rungs: Correlation
    wider: Correlation
    width: int | None
    points: list[WiderPoint]

    def sentence(self) -> str:
        """Say in plain sentences whether the ranking of the search holds."""
        return f"{self._across_widths()} {self._along_rungs()}".strip()

    def _across_widths(self) -> str:
        if self.width is None:
            return "The models were trained at their own size, so there is no proxy to validate."
        if self.wider.tau is None:
            tests = "--validate-proxy tests it"
            return f"Whether the proxy's ranking holds at width {self.width} is not known; {tests}."
        found = f"Kendall's tau is {self.wider}"
        if self.wider.is_significant:
            return f"The proxy's ranking holds at width {self.width}: {found}."
        if self.wider.high is not None and self.wider.high < 0:
            return f"The proxy's ranking is reversed at width {self.width}: {found}."
        return f"It is not shown that the proxy's ranking holds at width {self.width}: {found}."

    def _along_rungs(self) -> str:
        found = self.between_rungs
        if found.tau is None:
            return ""
        agree = "agree" if found.is_significant else "are not shown to agree"
        return f"The rankings on the first and on the last rung {agree}: {found}."

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def between_rungs(trials: Sequence[Trial], proxy: Proxy) -> Correlation:
    """Correlate the objective on the first and on the last rung, over models that reached both."""
    promoted = [trial for trial in distinct_models(trials) if len(trial.rungs) > 1]
    firsts = [(objective(trial.rungs[0], proxy), trial) for trial in promoted]
    return kendall_tau([(first, loss_of(trial)) for first, trial in firsts if first is not None])


def validation_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials to train again: the best ones, and others spread over the ranking."""
    ranked = sorted(distinct_models(trials), key=lambda trial: (loss_of(trial), trial.number))
    best, others = ranked[:BEST], ranked[BEST:]
    many = min(POINTS - BEST, len(others))
    # the others are cut into equal parts, and the last trial of each part is taken
    return best + [others[(i + 1) * len(others) // many - 1] for i in range(many)]


def distinct_models(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that reached the last rung, each model once."""
    first: dict[str, Trial] = {}
    for trial in trials:
        if trial.value is not None:
            first.setdefault(trial.fingerprint, trial)
    return list(first.values())


def loss_of(trial: Trial) -> float:
    """Return the objective of a trial that reached the last rung, in nats."""
    assert trial.value is not None
    return trial.value


def wider(proxy: Proxy, factor: int = 2) -> Proxy | None:
    """Return the proxy with ``factor`` times the width; None if models have their own size.

    The head size stays as it is, so the wider proxy has more heads.
    """
    if proxy.dim is None:
        return None
    return proxy.model_copy(update={"dim": factor * proxy.dim})


def validation_jobs(trials: Sequence[Trial], wide: Proxy, seed: int, store: Path) -> dict[Key, Job]:
    """Return the trainings of these trials in the proxy ``wide``, by trial number and task."""
    return {
        (trial.number, name): task.job(store, wide.shrink(trial.spec, task), seed, task.rungs[-1])
        for trial in trials
        for name, task in wide.tasks.items()
    }


def validate_proxy(
    run: Run,
    trials: Sequence[Trial],
    chosen: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
) -> ProxyValidation:
    """Train the ``chosen`` trials at twice the width and compare the rankings.

    ``run`` runs the trainings, ``trials`` are the finished trials of the search, ``seed`` is that
    of the search.
    """
    rungs, wide = between_rungs(trials, proxy), wider(proxy)
    if wide is None:
        return ProxyValidation(rungs, kendall_tau([]), None, [])
    found = [
        WiderPoint(trial.number, loss_of(trial), loss)
        for trial, loss, _ in retrain(run, chosen, wide, seed, store)
    ]
    correlation = kendall_tau([(point.loss, point.wider_loss) for point in found])
    return ProxyValidation(rungs, correlation, wide.dim, found)


def retrain(
    run: Run,
    trials: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
) -> list[tuple[Trial, float, dict[str, ProxyScore]]]:
    """Train these trials with ``proxy`` and return each with its objective and its scores by task.

    Trials that diverged, failed or were not trained on all tasks are left out.
    """
    results = run(validation_jobs(trials, proxy, seed, store))
    found = []
    for trial in trials:
        by_task = {task: results.get((trial.number, task)) for task in proxy.tasks}
        scores = {task: r for task, r in by_task.items() if isinstance(r, ProxyScore)}
        loss = objective(scores, proxy) if len(scores) == len(by_task) else None
        if loss is not None:
            found.append((trial, loss, scores))
    return found
