"""The search, and what it would cost: from a file and limits to a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from optuna.storages import BaseStorage

from archdsl.lang.load import budget_of, read
from archdsl.lang.spec import Budget
from archdsl.search.analysis.forecast import SearchForecast, forecast_search
from archdsl.search.engine import VALIDATION_RUNS, Machine, SearchEngine, Watch
from archdsl.search.report.report import SearchReport, write_report
from archdsl.search.space.feasibility import require_feasible
from archdsl.search.space.objectives import parse_axes
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.settings import Settings, claim_folder
from archdsl.search.study.spending import Limits, Spending
from archdsl.search.study.storage import (
    HEARTBEAT_SECONDS,
    database,
    database_errors,
    exclusive,
    journal,
)
from archdsl.search.study.study import Study
from archdsl.search.supernet.layouts import LAYOUTS, supernet_space
from archdsl.search.trials.proxy import Proxy, default_tasks
from archdsl.search.trials.scorers import Scorer, SeparateTraining

SECONDS = 540.0  # by default: with starting up, under ten minutes


def search(
    space: str | os.PathLike[str] = "search",
    *,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    objective: str = "loss,flops",
    strategy: Literal["separate", "shared"] = "separate",
    layouts: int = LAYOUTS,
    seconds: float | None = SECONDS,
    trials: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    window: int = 8,
    machine: Machine | None = None,
    out: Path | None = None,
    store: Path | None = None,
    storage: str | None = None,
    heartbeat: int = HEARTBEAT_SECONDS,
    watch: Watch | None = None,
    command: str = "",
) -> SearchReport:
    """Searches a space of specs for the front of proxy loss and cost, under a budget.

    The budget is kept by the full-size models; ``budget.train_flops`` is for the whole search, as
    are ``seconds``, controls included (None: no limit), and ``trials``, the draws that are
    trained. ``objective``: ``loss``, or what it is weighed against, such as ``loss,flops,kv``.
    ``strategy``: train each draw for itself, or one net for all steps and capacities of a layout,
    of which there are ``layouts``.
    ``seed`` draws and trains; the winner and its controls are trained with ``seeds`` further ones.
    ``window``: draws that may be under way at once. ``out`` (default: runs/ and a name made of the
    settings) holds everything and is gone on from if it exists; trained models lie in ``store``
    (default: inside), which searches may share. ``storage``: the URL of a database by which
    searches on many machines become one. A script calls this below ``if __name__ == "__main__":``,
    as the children that train import it. On Ctrl-C what was found so far is returned. Raises
    SpecError, NothingFitsError, SearchFailedError, StorageError. ``command``: noted in the report.
    """
    tree = read(space, overrides)
    limits = budget_of(tree, budget)
    settings = Settings(
        tree,
        limits,
        proxy or Proxy(tasks=default_tasks()),
        axes=parse_axes(objective),
        strategy=strategy,
        layouts=layouts,
        window=window,
        seed=seed,
    )
    require_feasible(tree, limits)
    folder = out or Path("runs") / settings.name
    store = store or folder / "proxies"
    scorer: Scorer = SeparateTraining(settings.proxy, store, seed)
    if strategy == "shared":
        tree, scorer = supernet_space(tree, settings.proxy, store, seed, layouts)
    claim_folder(folder, settings)
    with opened(folder, storage, heartbeat) as (backend, mine):
        sampler = TrialSampler(tree, limits, len(settings.axes), seed)
        study = Study(backend, settings.name, sampler, settings.axes, window)
        study.write_settings(settings.as_json())
        if mine:
            study.fail_running()
        spending = Spending(backend, study.id, Limits(seconds, limits.train_flops))
        engine = SearchEngine(
            folder, store, study, scorer, spending, settings, trials, seeds, watch
        )
        return write_report(replace(engine.run(machine or Machine()), command=command))


def planned(
    space: str | os.PathLike[str] = "search",
    *,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    seconds: float | None = SECONDS,
    trials: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    machine: Machine | None = None,
) -> SearchForecast:
    """What ``search`` with these settings would do and cost; half a minute, nothing is kept."""
    tree = read(space, overrides)
    with (machine or Machine()).pool() as pool:
        return forecast_search(
            pool,
            tree,
            budget_of(tree, budget),
            proxy or Proxy(tasks=default_tasks()),
            seconds=seconds,
            trials=trials,
            seed=seed,
            seeds=seeds,
            wider=VALIDATION_RUNS,
        )


@contextmanager
def opened(folder: Path, url: str | None, heartbeat: int) -> Iterator[tuple[BaseStorage, bool]]:
    """The storage of a study, and whether this process is the only one that uses it."""
    if url is not None:
        with database_errors(url):
            yield database(url, heartbeat), False
        return
    with exclusive(folder):
        yield journal(folder), True
