"""The search, and what it would cost: from a space and limits to a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from optuna.storages import BaseStorage

from archdsl.errors import ArchdslError, Problem, SpecError, blamed_on
from archdsl.files import make_folder, remove_temporary_files
from archdsl.lang.config import check_config, say_where
from archdsl.lang.load import Source, budget_of, read
from archdsl.lang.source import Tree, check_name, read_file
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.nn.devices import device_named
from archdsl.search.analysis.forecast import SearchForecast, forecast_search
from archdsl.search.config import SECONDS, SearchConfig
from archdsl.search.engine import VALIDATION_RUNS, Machine, SearchEngine, Watch
from archdsl.search.report.report import SearchReport, write_report
from archdsl.search.space.feasibility import require_choice, require_feasible
from archdsl.search.space.objectives import parse_axes
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.settings import Settings, claim_folder, was_begun
from archdsl.search.study.spending import Limits, Spending
from archdsl.search.study.storage import (
    JOURNAL,
    database,
    database_errors,
    exclusive,
    journal,
)
from archdsl.search.study.study import Study
from archdsl.search.supernet.layouts import supernet_space
from archdsl.search.trials.proxy import Proxy
from archdsl.search.trials.scorers import Scorer, SeparateTraining
from archdsl.search.workers.pool import default_workers, device_count

AS_TIME = -1.0  # `seconds` was not given


def search(
    space: Source = "search",
    *,
    overrides: Sequence[str] = (),
    budget: int | float | str | Budget | None = None,
    budget_of: Literal["params", "non_embedding"] | None = None,
    flops: int | float | str | None = None,
    kv: int | float | str | None = None,
    train_flops: int | float | str | None = None,
    time: int | float | str | None = SECONDS,
    trials: int | None = None,
    objective: str | Sequence[str] = "loss,flops",
    strategy: Literal["separate", "shared"] = "separate",
    layouts: int = 4,
    proxy: Proxy | str | None = None,
    data: str | None = None,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    devices_per_trial: int = 1,
    memory: int | float | str | None = None,
    patience: int | float | str = 120.0,
    seed: int = 0,
    seeds: int = 3,
    validate_proxy: bool = False,
    window: int = 8,
    out: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    heartbeat: int = 30,
    config: SearchConfig | str | os.PathLike[str] | None = None,
    machine: Machine | None = None,
    watch: Watch | None = None,
    command: str = "",
    seconds: float | None = AS_TIME,
) -> SearchReport:
    """Searches a space of specs for the best models under a budget, and writes a report.

    Every model keeps to the budget; a small proxy of each is trained and scored. The keywords are
    the options of ``archdsl search``, and take the words of the command line as well as numbers
    and objects: ``archdsl.search(budget="162M", flops="0.8G", time="10m")``.

    A script must call this below ``if __name__ == "__main__":``, because each worker process
    imports the script. The same call continues after a crash. Ctrl-C ends the search and returns
    a report of what was found so far.

    Args:
        space: A spec that leaves values open: a path, a shipped name, YAML text, a dict or a spec.
        overrides: Values set in the space, such as ``"blocks.0.repeat=2"``.
        budget: Most parameters of a model, or a `Budget` with several limits.
        budget_of: What a number as ``budget`` counts: all parameters (default), or those outside
            embedding and head.
        flops: Most forward FLOPs per token of a model.
        kv: Most bytes of KV cache per token of a model.
        train_flops: Most FLOPs that all workers together spend on training.
        time: Start no new training after this long, in seconds or as ``"10m"``; None: no limit.
        trials: Train at most this many trials.
        objective: ``"loss"``, or the front of loss and costs: ``"loss,flops,kv"``.
        strategy: ``"separate"`` trains each trial alone; ``"shared"`` trains one supernet for all
            steps and capacities of a layout and scores trials with its weights.
        layouts: Number of supernets that ``"shared"`` trains.
        proxy: Sizes of the proxy, such as ``"dim=32,steps=300"``; ``"none"``: the model itself.
        data: Train on this data instead of the embedded corpus and a skill.
        workers: Number of workers; None: as many as there are devices for.
        device: Kind of device that trials are trained on: ``"cpu"``, where each core is a device,
            or ``"cuda"``.
        devices_per_trial: Number of devices that train each trial together. A worker has one
            process of one thread for each.
        memory: Most bytes that a process of a worker may allocate.
        patience: Fail a trial whose training makes no step for this long.
        seed: Seed of the sampler and of the training of trials.
        seeds: Number of further seeds with which the winner and its baselines are trained.
        validate_proxy: Train eight trials again at twice the width, and compare the rankings.
        window: Number of trials that may be running at once.
        out: Folder of the search; None: a folder below ``runs/`` named after the settings.
        store: Folder of trained proxies, which searches may share; None: inside ``out``.
        storage: URL of a database by which many machines search together.
        heartbeat: Seconds between two heartbeats of a worker in the database.
        config: A `SearchConfig`, or a YAML file with its fields, for what is not given here.
        machine: Takes the place of ``workers``, ``devices_per_trial``, ``memory`` and ``patience``.
        watch: Called with the progress of the search after every event.
        command: Is noted in the report.
        seconds: An older name of ``time``.

    Raises:
        SpecError: The space or a value given here is wrong.
        NothingFitsError: No model of the space keeps to the budget.
        NothingToSearchError: Only one does.
        SearchFailedError: Too many trainings failed.
        StorageError: The database or the folder cannot be used.
    """
    words = {name: value for name, value in locals().items() if name in SearchConfig.model_fields}
    if seconds != AS_TIME:
        words["time"] = seconds
    if not isinstance(space, str | OBJECTS["space"]):
        read(space)  # raises SpecError, which says what a space can be
    for name, kind in OBJECTS.items():
        if isinstance(words[name], kind):
            del words[name]
    tree = _tree(config, words)
    try:
        return run_search(
            check_config(SearchConfig, tree),
            space=None if isinstance(space, str) else space,
            overrides=overrides,
            budget=budget if isinstance(budget, Budget) else None,
            proxy=proxy if isinstance(proxy, Proxy) else None,
            machine=machine,
            watch=watch,
            command=command,
        )
    except ArchdslError as error:
        say_where(error, tree)
        raise


OBJECTS: dict[str, Any] = {
    "space": Mapping | os.PathLike | ModelSpec,
    "budget": Budget,
    "proxy": Proxy,
}


def _tree(base: SearchConfig | str | os.PathLike[str] | None, words: dict[str, Any]) -> Tree:
    """The settings of a file or object, in which words that are not defaults take their place."""
    tree = Tree({}, {})
    if isinstance(base, SearchConfig):
        tree = Tree(base.model_dump(exclude_unset=True), {})
    elif base is not None:
        tree = read_file(base, "a config")
    fields = SearchConfig.model_fields
    given = {name: value for name, value in words.items() if value != fields[name].default}
    positions = {
        path: at for path, at in tree.positions.items() if not path or path[0] not in given
    }
    return Tree(tree.value | given, positions)


def _space(config: SearchConfig, overrides: Sequence[str]) -> Tree:
    with blamed_on("space"):
        check_name(config.space)
    return read(config.space, overrides)


def run_search(
    config: SearchConfig,
    *,
    space: Source | None = None,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
    proxy: Proxy | None = None,
    machine: Machine | None = None,
    watch: Watch | None = None,
    command: str = "",
) -> SearchReport:
    """Runs the search of a config; objects that are given take the place of the config's words.

    Raises SpecError, NothingFitsError, NothingToSearchError, SearchFailedError or StorageError.
    """
    given = read(space, overrides) if space else _space(config, overrides)
    settings = _settings(config, given, budget, proxy)
    require_devices(config, settings.proxy)
    model = require_feasible(settings.tree, settings.budget)
    with blamed_on("space"):
        require_choice(settings.tree, settings.budget)
    settings = _with_widths(config, settings, model)
    tree, folder = settings.tree, config.out or Path("runs") / settings.name
    store = config.store or folder / "proxies"
    scorer: Scorer = SeparateTraining(settings.proxy, store, config.seed)
    if config.strategy == "shared":
        tree, scorer = supernet_space(tree, settings.proxy, store, config.seed, config.layouts)
    with blamed_on("out"):
        claim_folder(folder, settings)
    with blamed_on("store"):
        make_folder(store)
    with opened(folder, config.storage, config.heartbeat) as (backend, mine):
        sampler = TrialSampler(tree, settings.budget, len(settings.axes), config.seed)
        study = Study(backend, settings.name, sampler, settings.axes, config.window)
        study.check(str(folder / JOURNAL) if mine else "the database")
        study.write_settings(settings.as_json())
        if mine:
            study.fail_running()
        limits = Limits(config.time, settings.budget.train_flops)
        spending = Spending(backend, study.id, limits)
        engine = SearchEngine(
            folder,
            store,
            study,
            scorer,
            spending,
            settings,
            config.trials,
            config.seeds,
            watch,
            config.validate_proxy,
        )
        report = engine.run(machine or _machine(config))
        return write_report(replace(report, command=command))


def _settings(
    config: SearchConfig, tree: Tree, budget: Budget | None, proxy: Proxy | None
) -> Settings:
    if proxy and config.data:
        raise SpecError(Problem("data", "a Proxy object names the data of its tasks itself"))
    if proxy and config.device != "cpu":
        raise SpecError(Problem("device", "a Proxy object names the device of its tasks itself"))
    return Settings(
        tree,
        budget_of(tree, budget.with_limits(config.limits) if budget else config.limits),
        proxy or proxy_of(config),
        axes=_axes(config),
        strategy=config.strategy,
        layouts=config.layouts,
        window=config.window,
        seed=config.seed,
    )


def _with_widths(config: SearchConfig, settings: Settings, model: ModelSpec) -> Settings:
    """The settings in which the widths of proxies are in proportion to that of ``model``.

    Models that share weights have one width, as have those of a search that an earlier version
    began in the folder.
    """
    if config.strategy == "shared":
        return settings
    with blamed_on("out"):
        if was_begun(config.out or Path("runs") / settings.name, settings):
            return settings
    return replace(settings, proxy=settings.proxy.for_space(settings.tree, model))


def proxy_of(config: SearchConfig) -> Proxy:
    """The proxy of the config's words. Its data are loaded, once per process."""
    with blamed_on("proxy"):
        proxy = Proxy.parse(config.proxy, config.data, config.device)
    with blamed_on("data"):
        for task in proxy.tasks.values():
            task.load()
    return proxy


def _axes(config: SearchConfig) -> tuple[str, ...]:
    with blamed_on("objective"):
        return parse_axes(config.objective)


def _machine(config: SearchConfig) -> Machine:
    devices = config.devices_per_trial
    workers = config.workers or default_workers(devices, config.device)
    return Machine(workers, config.memory, config.patience, devices)


def require_devices(config: SearchConfig, proxy: Proxy) -> None:
    """Check that the workers of a search can train as its config says.

    Raises ArchdslError if the machine has too few devices, or those of a trial cannot divide each
    batch among them, or the strategy does not train on such devices.
    """
    each, kind, name = config.devices_per_trial, config.device, "devices_per_trial"
    if config.strategy == "shared" and (each > 1 or kind != "cpu"):
        with blamed_on(name if each > 1 else "device"):
            raise ArchdslError("the strategy shared trains on one device, the cpu")
    with blamed_on("device"):
        device_named(kind)
    found = device_count(kind)
    what = f"this machine has {found} {'cores' if kind == 'cpu' else 'GPUs'}"
    with blamed_on(name):
        if each > found:
            raise ArchdslError(f"must be at most {found}, as {what}; got {each}")
        for task_name, task in proxy.tasks.items():
            if task.batch_size % each:
                shared = f"the {task.batch_size} sequences of a batch of the task {task_name}"
                raise ArchdslError(f"must divide {shared}; got {each}")
    if kind != "cpu" and (config.workers or 1) * each > found:
        with blamed_on("workers"):
            most = f"must be at most {found // each} for {each} devices per trial"
            raise ArchdslError(f"{most}, as {what}; got {config.workers}")


def planned(config: SearchConfig, *, overrides: Sequence[str] = ()) -> SearchForecast:
    """Forecasts what a search would do and cost; this takes about half a minute.

    Nothing is kept. Raises SpecError, NothingFitsError or NothingToSearchError.
    """
    tree, proxy = _space(config, overrides), proxy_of(config)
    budget = budget_of(tree, config.limits)
    _axes(config)  # which no forecast depends on, but which may be wrong
    require_devices(config, proxy)
    with blamed_on("space"):
        require_choice(tree, budget)
    if config.strategy == "separate":
        proxy = proxy.for_space(tree, require_feasible(tree, budget))
    with _machine(config).pool() as pool:
        return forecast_search(
            pool,
            tree,
            budget,
            proxy,
            seconds=config.time,
            trials=config.trials,
            seed=config.seed,
            seeds=config.seeds,
            wider=VALIDATION_RUNS * config.validate_proxy,
        )


@contextmanager
def opened(folder: Path, url: str | None, heartbeat: int) -> Iterator[tuple[BaseStorage, bool]]:
    """The storage of a study, and whether this process is the only one that uses it."""
    if url is not None:
        with blamed_on("storage"):
            backend = database(url, heartbeat)
        with database_errors(url):
            yield backend, False
        return
    with exclusive(folder):
        remove_temporary_files(folder)
        yield journal(folder, to_write=True), True
