"""The search command."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from archdsl.cli import completion
from archdsl.cli.options import (
    INTERRUPTED,
    ConfigFile,
    Json,
    Overrides,
    config_from,
    print_json,
    print_parts,
)
from archdsl.cli.runs import say_what_is_in
from archdsl.errors import ArchdslError, blamed_on

if TYPE_CHECKING:
    from archdsl.search.config import SearchConfig
    from archdsl.search.report.report import SearchReport
    from archdsl.search.trials.proxy import Proxy


def config_class() -> type[SearchConfig]:
    """The settings that are options of ``archdsl search``."""
    from archdsl.search.config import SearchConfig

    return SearchConfig


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does: job schedulers end jobs with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_and_start_server(spec: str, overrides: list[str] | None) -> None:
    """Raises SpecError if the spec is wrong, before anything slow is done.

    If it is right, starts the server of the workers, which imports torch while this process does.
    """
    from archdsl.lang.load import read
    from archdsl.search.workers.pool import start_server

    read(spec, overrides or ())
    start_server()


def search(
    ctx: typer.Context,
    space: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPACE]",
            show_default=False,
            autocompletion=completion.specs,
            help="The search space: a spec file, or a shipped one, that leaves values open. "
            "Default: the shipped space `search`.",
        ),
    ] = None,
    overrides: Overrides = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Do not search; forecast what the search would do and cost. This takes about "
            "half a minute.",
        ),
    ] = False,
    confirm: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY",
            help="Do not search; train the winner of this study, or folder of a search, and its "
            "baselines with as many seeds as --seeds says. Those of the search count.",
        ),
    ] = None,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Search a space of specs for the best models under a budget.

    Every model keeps to the budget; a small proxy of each is trained and scored. The same command
    continues after a crash. Ctrl-C or SIGTERM ends the search and reports what was found so far.
    Examples:

      archdsl search --budget 162M

      archdsl search my-space.yaml --flops 0.8G --kv 64KiB --time 1h --plan

      archdsl search --objective loss --trials 50 --workers 4

      archdsl search --budget 162M --proxy none --device cuda --devices-per-trial 4

      archdsl search --config search.yaml --out runs/mine

      archdsl search --confirm runs/mine --seeds 10
    """
    config = config_from(ctx, config_class(), config_file, space=space)
    if confirm is not None:
        _confirm(confirm, config, as_json)
        return
    if plan and config.strategy == "shared":
        raise ArchdslError("--plan can forecast the strategy separate only, not shared")
    from archdsl.lang.source import check_name

    with blamed_on("space"):
        check_name(config.space)
    check_and_start_server(config.space, overrides)
    if plan:
        _print_forecast(config, overrides, as_json)
    else:
        _print_report(_run(config, overrides), as_json)


def _confirm(name: str, config: SearchConfig, as_json: bool) -> None:
    from archdsl.search.workers.pool import start_server

    start_server()
    from archdsl.search.confirm import confirm
    from archdsl.search.report.tables import result, saying

    with sigterm_as_interrupt(), saying() as tell:
        found = confirm(
            name,
            seeds=config.seeds,
            storage=config.storage,
            store=config.store,
            seconds=config.time if "time" in config.model_fields_set else None,
            workers=config.workers,
            memory=config.memory,
            heartbeat=config.heartbeat,
            tell=tell,
        )
    print_json(found.as_json()) if as_json else print_parts(result(found))
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_forecast(config: SearchConfig, overrides: list[str] | None, as_json: bool) -> None:
    from archdsl.search.report.forecast_tables import shown
    from archdsl.search.run import planned

    forecast = planned(config, overrides=overrides or ())
    print_json(forecast.as_json()) if as_json else print_parts(shown(forecast))


def _run(config: SearchConfig, overrides: list[str] | None) -> SearchReport:
    from archdsl.search.report.live import watching
    from archdsl.search.run import proxy_of, run_search

    say_what_is_trained_on(proxy_of(config))

    command = shlex.join(["archdsl", *sys.argv[1:]])
    with sigterm_as_interrupt(), watching() as watch:
        return run_search(config, overrides=overrides or (), watch=watch, command=command)


def say_what_is_trained_on(proxy: Proxy) -> None:
    """Prints to stderr the texts of the tasks of a proxy, and what they hold."""
    from archdsl.data.loading import MixedData, TextData

    for name, task in proxy.tasks.items():
        if isinstance(data := task.load(), TextData | MixedData):
            print(f"{name}: {data.name}", file=sys.stderr)
            say_what_is_in(data)


def _print_report(report: SearchReport, as_json: bool) -> None:
    from archdsl.search.report.live import result

    if as_json:
        print_json(report.as_json())
    else:
        print_parts(result(report))
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
