"""How far the proxy can be trusted: does its ranking of models hold on the way up the rungs, and in
a wider proxy?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archdsl.search.analysis.comparison import run_comparison
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.study.record import Trial
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, objective
from archdsl.search.workers.pool import Pool

BEST, POINTS = 3, 8  # of the models that are trained again: the best, and how many in all


@dataclass(frozen=True)
class WiderPoint:
    """A model's loss in the search's proxy and in the wider one."""

    number: int
    loss: float
    wider_loss: float


@dataclass(frozen=True)
class ProxyValidation:
    """Rank correlations: of first and last rung, and of the proxy and one of ``width``.

    ``width`` is None where nothing wider than what was searched is to be had.
    """

    between_rungs: Correlation
    wider: Correlation
    width: int | None
    points: list[WiderPoint]

    def sentence(self) -> str:
        """What it says of the search's ranking, in words."""
        return f"{self._across_widths()} {self._along_rungs()}".strip()

    def _across_widths(self) -> str:
        if self.width is None:
            return "The models were trained at their own size, so no proxy needs to be trusted."
        if self.wider.tau is None:
            return f"Whether the ranking holds at width {self.width} was not tried."
        found = f"Kendall's tau is {self.wider}"
        if self.wider.is_significant:
            return f"The proxy's ranking holds at width {self.width}: {found}."
        if self.wider.high is not None and self.wider.high < 0:
            return f"The proxy's ranking is turned round at width {self.width}: {found}."
        return f"That the proxy's ranking holds at width {self.width} is not shown: {found}."

    def _along_rungs(self) -> str:
        found = self.between_rungs
        if found.tau is None:
            return ""
        holds = "agree" if found.is_significant else "are not shown to agree"
        return f"First and last rung {holds}: {found}."

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def between_rungs(trials: Sequence[Trial], proxy: Proxy) -> Correlation:
    """Of the objective on the first rung and on the last, over the models that reached it."""
    climbed = [trial for trial in _models(trials) if len(trial.rungs) > 1]
    firsts = [(objective(trial.rungs[0], proxy), trial) for trial in climbed]
    return kendall_tau([(first, _loss(trial)) for first, trial in firsts if first is not None])


def points(trials: Sequence[Trial]) -> list[Trial]:
    """The models that are trained again: the best, and evenly spread over the ranking others."""
    ranked = sorted(_models(trials), key=lambda trial: (_loss(trial), trial.number))
    best, others = ranked[:BEST], ranked[BEST:]
    many = min(POINTS - BEST, len(others))
    # the last of many equal parts of the others: the worst is among them
    return best + [others[(i + 1) * len(others) // many - 1] for i in range(many)]


def _models(trials: Sequence[Trial]) -> list[Trial]:
    """Of the draws that climbed to the last rung, each model once."""
    first: dict[str, Trial] = {}
    for trial in trials:
        if trial.value is not None and trial.rungs:
            first.setdefault(trial.fingerprint, trial)
    return list(first.values())


def _loss(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def wider(proxy: Proxy, factor: int = 2) -> Proxy | None:
    """The same proxy with more heads; None where the models are trained at their own size."""
    if proxy.dim is None:
        return None
    return proxy.model_copy(update={"dim": factor * proxy.dim})


def jobs(
    trials: Sequence[Trial], wide: Proxy, seed: int, store: Path
) -> dict[tuple[int, str], Job]:
    """By number and task; the best first, and all tasks of a model one after the other."""
    return {
        (trial.number, name): Job(store, wide.shrink(trial.spec, task), task, seed, task.rungs[-1])
        for trial in trials
        for name, task in wide.tasks.items()
    }


def validate_proxy(
    pool: Pool,
    trials: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
    may_go_on: Callable[[], bool],
    tell: Callable[[str], None],
) -> ProxyValidation:
    """Trains the points at twice the width, as far as it may, and compares the rankings."""
    rungs, wide = between_rungs(trials, proxy), wider(proxy)
    if wide is None:
        return ProxyValidation(rungs, kendall_tau([]), None, [])
    found = [
        WiderPoint(trial.number, _loss(trial), loss)
        for trial, loss, _ in retrain(pool, points(trials), wide, seed, store, may_go_on, tell)
    ]
    correlation = kendall_tau([(point.loss, point.wider_loss) for point in found])
    return ProxyValidation(rungs, correlation, wide.dim, found)


def retrain(
    pool: Pool,
    trials: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
    may_go_on: Callable[[], bool],
    tell: Callable[[str], None],
) -> list[tuple[Trial, float, dict[str, ProxyScore]]]:
    """Each model that was trained for itself on all tasks, with its loss and scores."""
    results = run_comparison(pool, jobs(trials, proxy, seed, store), may_go_on, tell)
    found = []
    for trial in trials:
        by_task = {task: results.get((trial.number, task)) for task in proxy.tasks}
        scores = {task: r for task, r in by_task.items() if isinstance(r, ProxyScore)}
        loss = objective(scores, proxy) if len(scores) == len(by_task) else None
        if loss is not None:
            found.append((trial, loss, scores))
    return found
