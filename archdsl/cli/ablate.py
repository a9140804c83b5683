"""The ablate command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archdsl.cli.options import (
    INTERRUPTED,
    Json,
    Overrides,
    Source,
    Spec,
    duration,
    one_source,
    print_json,
    print_parts,
)
from archdsl.cli.search import check_and_start_server, say_what_is_trained_on

ProxySizes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES|none",
        help="Sizes of the small model that is trained in place of each model, for example "
        "dim=32,head_size=16,repeat=1,steps=300; none: train the model itself.",
    ),
]
Seeds = Annotated[
    int, typer.Option(min=1, help="Number of seeds with which each model is trained.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Number of worker processes of one thread each. Default: one a core."),
]
Time = Annotated[
    float | None,
    typer.Option(
        parser=duration,
        metavar="TIME",
        help="Start no new training after this long, for example 30m. Default: no limit.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the results. Default: a folder below runs/.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database by which many machines share the trainings, for example "
        "postgresql+psycopg://user@host/name. Each of them runs the same command.",
    ),
]


def ablate(
    spec: Spec,
    overrides: Overrides = None,
    proxy: ProxySizes = None,
    source: Source = None,
    seeds: Seeds = 3,
    workers: Workers = None,
    time: Time = None,
    out: Out = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Measure what each part of a model contributes.

    Trains the model, its baselines (plain models of equal parameters and of equal FLOPs, a plain
    loop, random routing) and the model without each of its parts, with several seeds. The same
    command continues after a crash. Ctrl-C ends it and reports what was found so far. Examples:

      archdsl ablate itt

      archdsl ablate my-spec.yaml --data skill:p-hop --seeds 5 --time 1h
    """
    check_and_start_server(spec, overrides)
    from archdsl.search.analysis.ablation import ablate
    from archdsl.search.report.tables import result, saying
    from archdsl.search.trials.proxy import Proxy

    small = Proxy.parse(proxy, one_source(source))
    say_what_is_trained_on(small)
    with saying() as tell:
        found = ablate(
            spec,
            overrides=overrides or (),
            proxy=small,
            seeds=seeds,
            seconds=time,
            workers=workers,
            out=out,
            storage=storage,
            tell=tell,
        )
    if as_json:
        print_json(found.as_json())
    else:
        print_parts(result(found))
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
