"""The search command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from archdsl.cli.options import (
    INTERRUPTED,
    Flops,
    Json,
    Overrides,
    Params,
    Source,
    budget,
    print_json,
    print_parts,
)

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def duration(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text)
    if found is None or not (seconds := float(found[1]) * UNITS[found[2]]):
        raise typer.BadParameter(f"must be a time such as 90s, 10m or 1.5h, got {text!r}")
    return seconds


def search(
    space: Annotated[
        str, typer.Argument(metavar="SPACE", help="A spec that leaves values open.")
    ] = "search",
    overrides: Overrides = None,
    params: Params = None,
    flops: Flops = None,
    time: Annotated[
        float | None,
        typer.Option(parser=duration, metavar="TIME", help="For all of it, as 30m; default: 9m."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trained.")] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES|none",
            help="What is trained in the model's place, as dim=32,head_size=16,repeat=1,steps=300; "
            "none: the model itself.",
        ),
    ] = None,
    source: Source = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread; default: the cores.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and the training.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=2, help="That the winner and its controls are trained with.")
    ] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the search; default: one below runs/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a space of specs for the best model under a budget.

    The model keeps to the budget, a small proxy of it is trained. The same command goes on after
    a crash; Ctrl-C ends with what was found. Examples:

      archdsl search --budget 162M

      archdsl search my-space.yaml --flops 0.8G --time 1h
    """
    from archdsl.search import search
    from archdsl.search.proxy import Proxy
    from archdsl.search.run import SECONDS
    from archdsl.search.show import result, watching

    with watching() as watch:
        report = search(
            space,
            budget=budget(params, flops),
            overrides=overrides or (),
            proxy=Proxy.parse(proxy, source),
            seconds=time or SECONDS,
            trials=trials,
            workers=workers,
            seed=seed,
            seeds=seeds,
            out=out,
            watch=watch,
        )
    if as_json:
        print_json(report.as_json())
    else:
        print_parts(result(report))
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
