"""Search strategies that share the same trainings, so that only the choice of trials differs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import optuna

from archdsl.errors import SpecError
from archdsl.lang.load import fitted, read
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import fill
from archdsl.search.space.optuna_space import starting_points, suggest
from archdsl.search.stats.pareto import Point, pareto_front
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.study import Study
from archdsl.search.supernet.layouts import supernet_space
from archdsl.search.trials.proxy import Proxy, ProxyScore
from archdsl.search.trials.scorers import Scorer, SeparateTraining

WINDOW = 8  # of `archdsl search`: trials that may run at once
LAYOUTS = 3  # served by supernets: those of the starting points
SETTINGS = 40  # trials that supernets score before the front is trained separately


@dataclass(frozen=True)
class Bench:
    """The problem of every strategy: a search space, one task at proxy scale, and a seed."""

    task: str
    seed: int
    proxy: Proxy
    store: Path
    space: str = "search"

    @property
    def tree(self) -> Tree:
        return read(self.space)

    @property
    def budget(self) -> Budget:
        return Budget.model_validate(self.tree.value["budget"])

    def score(self, spec: ModelSpec, rung: int) -> ProxyScore:
        """Train the proxy of a spec up to a rung, or read its stored score."""
        work = SeparateTraining(self.proxy, self.store, self.seed).job(spec, {}, self.task, rung)
        return work.run(lambda: None)


@dataclass(frozen=True)
class Trained:
    """A trial: its training FLOPs, and loss and FLOPs per token if it reached the last rung.

    FLOPs per token are those that the trained model executes.
    """

    spec: ModelSpec
    train_flops: float
    point: Point | None


Strategy = Callable[[Bench], Iterator[Trained]]


def point(score: ProxyScore) -> Point | None:
    if score.loss is None or score.flops_per_token is None:
        return None
    return score.loss, score.flops_per_token


def sampled(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Strategy:
    """Return a strategy that trains every trial of an Optuna sampler to the last rung.

    It begins with the starting points of the search.
    """

    def strategy(bench: Bench) -> Iterator[Trained]:
        tree, budget = bench.tree, bench.budget
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                directions=["minimize", "minimize"], sampler=sampler(bench.seed)
            )
        for start in starting_points(tree):
            study.enqueue_trial(start)
        known: dict[str, Point | None] = {}
        while True:
            ask = study.ask()
            try:
                pick = partial(suggest, ask)
                spec = fitted(fill(tree, pick), budget)
            except SpecError:
                study.tell(ask, state=optuna.trial.TrialState.FAIL)
                continue
            name, cost = spec.fingerprint(), 0.0
            if name not in known:  # a model that was trained before costs nothing
                scores = [bench.score(spec, rung) for rung in range(bench.proxy.rungs)]
                known[name] = point(scores[-1])
                cost = sum(score.train_flops for score in scores)
            if (values := known[name]) is None:
                study.tell(ask, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(ask, values)
            yield Trained(spec, cost, values)

    return strategy


def separate(bench: Bench) -> Iterator[Trained]:
    """Run trials as ``archdsl search`` does, with successive halving."""
    return _trials(bench, bench.tree, SeparateTraining(bench.proxy, bench.store, bench.seed))


def shared(bench: Bench) -> Iterator[Trained]:
    """Run trials as ``archdsl search --strategy shared`` does.

    Supernets score SETTINGS trials. Then the models of the Pareto front are trained separately, and
    only these count.
    """
    tree, scorer = supernet_space(bench.tree, bench.proxy, bench.store, bench.seed, LAYOUTS)
    found_trials = list(islice(_trials(bench, tree, scorer), SETTINGS))
    for trained in found_trials:
        yield replace(trained, point=None)
    found = [trained for trained in found_trials if trained.point is not None]
    for i in pareto_front([trained.point for trained in found if trained.point is not None]):
        scores = [bench.score(found[i].spec, rung) for rung in range(bench.proxy.rungs)]
        cost = sum(score.train_flops for score in scores)
        yield Trained(found[i].spec, cost, point(scores[-1]))


def dialled(bench: Bench) -> Iterator[Trained]:
    """Run the trials of ``shared`` with the scores of the supernets as results."""
    tree, scorer = supernet_space(bench.tree, bench.proxy, bench.store, bench.seed, LAYOUTS)
    return islice(_trials(bench, tree, scorer), SETTINGS)


def _trials(bench: Bench, tree: Tree, scorer: Scorer) -> Iterator[Trained]:
    """Run the trials of a search with one worker."""
    sampler = TrialSampler(tree, bench.budget, axes=2, seed=bench.seed)
    storage = optuna.storages.InMemoryStorage()
    study = Study(storage, "benchmark", sampler, ("loss", "flops"), WINDOW)
    while (trial := study.take(lambda number: not study.exhausted)) is not None:
        cost, values = 0.0, None
        for rung in range(scorer.rungs):
            score = scorer.job(trial.spec, trial.params, bench.task, rung).run(lambda: None)
            cost += score.train_flops
            values = point(score)
            trial = study.record_rung(trial, {bench.task: score}, values)
            if values is None:
                study.finish(trial, "diverged")
                break
            if rung + 1 == scorer.rungs:
                study.finish(trial, "complete", values)
            elif not study.is_promoted(trial):
                study.finish(trial, "pruned")
                values = None
                break
        yield Trained(trial.spec, cost, values)


STRATEGIES: dict[str, Strategy] = {
    "random": sampled(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "TPE": sampled(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "separate": separate,
    "shared": shared,
    "dialled": dialled,
}
