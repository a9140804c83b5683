"""The search command."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from archdsl.cli.options import (
    INTERRUPTED,
    KV,
    BudgetOf,
    Flops,
    Json,
    Overrides,
    Params,
    Source,
    TrainFlops,
    budget,
    print_json,
    print_parts,
    size,
)

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text)
    if found is None or not (seconds := float(found[1]) * UNITS[found[2]]):
        raise typer.BadParameter(f"must be a time such as 90s, 10m or 1.5h, got {text!r}")
    return seconds


Time = Annotated[
    float | None,
    typer.Option(parser=duration, metavar="TIME", help="For all of it, as 30m; default: 9m."),
]
ProxySizes = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        metavar="SIZES|none",
        help="What is trained in the model's place, as dim=32,head_size=16,repeat=1,steps=300; "
        "none: the model itself.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of one thread; default: the cores.")
]
Memory = Annotated[
    int | None,
    typer.Option(parser=size, metavar="SIZE", help="That a training may allocate, such as 4GiB."),
]
Patience = Annotated[
    float | None,
    typer.Option(
        parser=duration,
        metavar="TIME",
        help="After which a training that makes no step is taken for hung; default: 2m.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A database that many machines search by: postgresql+psycopg://user@host/name.",
    ),
]
Heartbeat = Annotated[
    int,
    typer.Option(
        min=1, metavar="SECONDS", help="Between signs of life; who misses two is taken for dead."
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(help="Folder of trained models, which searches may share; default: in --out."),
]


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM is as Ctrl-C: what starts jobs on many machines ends them so."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def begin(spec: str, overrides: list[str] | None) -> None:
    """Says what is wrong with a spec at once; if nothing is, has the workers' server import torch
    while this process does.
    """
    from archdsl.lang.load import read
    from archdsl.search.workers.pool import start_server

    read(spec, overrides or ())
    start_server()


def search(
    space: Annotated[
        str, typer.Argument(metavar="SPACE", help="A spec that leaves values open.")
    ] = "search",
    overrides: Overrides = None,
    params: Params = None,
    of: BudgetOf = None,
    flops: Flops = None,
    kv: KV = None,
    train_flops: TrainFlops = None,
    time: Time = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trained.")] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="AXES", help="What should be low: loss, or a front such as loss,flops,kv."
        ),
    ] = "loss,flops",
    strategy: Annotated[
        Literal["separate", "shared"],
        typer.Option(
            help="separate: train each draw; shared: train one net for all steps and capacities "
            "of a layout, then score settings."
        ),
    ] = "separate",
    layouts: Annotated[int, typer.Option(min=1, help="Nets that --strategy shared trains.")] = 4,
    plan: Annotated[
        bool, typer.Option("--plan", help="Forecast what the search would cost; half a minute.")
    ] = False,
    proxy: ProxySizes = None,
    source: Source = None,
    workers: Workers = None,
    memory: Memory = None,
    patience: Patience = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and the training.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=2, help="That the winner and its controls are trained with.")
    ] = 3,
    window: Annotated[
        int, typer.Option(min=1, help="Draws under way at once, whoever trains them.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the search; default: one below runs/.")
    ] = None,
    store: Store = None,
    storage: Storage = None,
    heartbeat: Heartbeat = 30,
    as_json: Json = False,
) -> None:
    """Search a space of specs for the best models under a budget.

    The models keep to the budget, small proxies of them are trained. The same command goes on
    after a crash; Ctrl-C or SIGTERM ends with what was found. Examples:

      archdsl search --budget 162M

      archdsl search my-space.yaml --flops 0.8G --kv 64KiB --time 1h --plan

      archdsl search --objective loss --trials 50 --workers 4
    """
    limits = budget(params, flops, kv, of, train_flops)
    if plan and strategy == "shared":
        raise typer.BadParameter("--plan forecasts --strategy separate only")
    begin(space, overrides)
    from archdsl.search import search
    from archdsl.search.engine import Machine
    from archdsl.search.report.forecast_tables import shown
    from archdsl.search.report.live import result, watching
    from archdsl.search.run import SECONDS, planned
    from archdsl.search.trials.proxy import Proxy

    machine = Machine(workers or 0, memory, patience or Machine.patience)
    if plan:
        forecast = planned(
            space,
            budget=limits,
            overrides=overrides or (),
            proxy=Proxy.parse(proxy, source),
            seconds=time or SECONDS,
            trials=trials,
            machine=machine,
            seed=seed,
            seeds=seeds,
        )
        print_json(forecast.as_json()) if as_json else print_parts(shown(forecast))
        return
    with ended_by_sigterm(), watching() as watch:
        report = search(
            space,
            budget=limits,
            overrides=overrides or (),
            proxy=Proxy.parse(proxy, source),
            objective=objective,
            strategy=strategy,
            layouts=layouts,
            seconds=time or SECONDS,
            trials=trials,
            machine=machine,
            seed=seed,
            seeds=seeds,
            window=window,
            out=out,
            store=store,
            storage=storage,
            heartbeat=heartbeat,
            watch=watch,
            command=shlex.join(["archdsl", *sys.argv[1:]]),
        )
    if as_json:
        print_json(report.as_json())
    else:
        print_parts(result(report))
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
