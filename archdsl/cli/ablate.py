"""The ablate command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archdsl.cli.options import INTERRUPTED, Json, Overrides, Source, Spec, print_json, print_parts
from archdsl.cli.search import ProxySizes, Workers, begin, duration


def ablate(
    spec: Spec,
    overrides: Overrides = None,
    proxy: ProxySizes = None,
    source: Source = None,
    seeds: Annotated[int, typer.Option(min=1, help="That each of them is trained with.")] = 3,
    workers: Workers = None,
    time: Annotated[
        float | None,
        typer.Option(parser=duration, metavar="TIME", help="Then no training is begun, as 30m."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: one below runs/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """See what each part of a model is worth.

    Trains the model, its controls (plain models of equal parameters and FLOPs, a plain loop, random
    routing) and the model with each part taken out, with several seeds. The same command goes on;
    Ctrl-C ends with what was found. Examples:

      archdsl ablate itt

      archdsl ablate my-spec.yaml --data skill:p-hop --seeds 5 --time 1h
    """
    begin(spec, overrides)
    from archdsl.search.analysis.ablation import ablate
    from archdsl.search.report.tables import result, saying
    from archdsl.search.trials.proxy import Proxy

    with saying() as tell:
        found = ablate(
            spec,
            overrides=overrides or (),
            proxy=Proxy.parse(proxy, source),
            seeds=seeds,
            seconds=time,
            workers=workers,
            out=out,
            tell=tell,
        )
    if as_json:
        print_json(found.as_json())
    else:
        print_parts(result(found))
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
