"""The compare command."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any, Literal

import typer

from archdsl.cli import completion
from archdsl.cli.ablate import Out, ProxySizes, Storage, Time, Workers
from archdsl.cli.options import INTERRUPTED, Json, Overrides, print_json, print_parts, size
from archdsl.cli.search import check_and_start_server, say_what_is_trained_on


def compare(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC SPEC...",
            help="YAML files, or names of shipped specs such as itt; at least two.",
            autocompletion=completion.specs,
        ),
    ],
    overrides: Overrides = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The name of the model that the others are compared with. Default: the first.",
        ),
    ] = None,
    match: Annotated[
        Literal["params", "flops", "none"],
        typer.Option(
            help="Change the number of layers of each model until its parameters, or the FLOPs of "
            "a forward pass, come closest to those of the reference, at the size that is trained."
        ),
    ] = "none",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Train on this text, JSONL or parquet file or folder, hf:DATASET/CONFIG or "
            "skill:NAME. Default: the embedded corpus and a skill.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Train each model on this, too, separately: for example skill:p-hop,hops=3. May "
            "be repeated.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Training tokens on each task, for example 2M. Default: those of a proxy of a "
            "search.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Tokens of a sequence.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Sequences of a step.")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            metavar="RATE",
            help="The learning rate, which is constant. May be repeated: then each model is first "
            "trained with each of them, and compared with its best.",
        ),
    ] = None,
    proxy: ProxySizes = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds with which each model is trained.")
    ] = 5,
    time: Time = None,
    workers: Workers = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=size, metavar="SIZE", help="Most memory of a worker, for example 4GiB."
        ),
    ] = None,
    out: Out = None,
    storage: Storage = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only train the first quarter with three seeds; say how many seeds tell how small "
            "a difference, and what the comparison takes. With one learning rate it goes on from "
            "these trainings.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train models alike and say which is better than the reference, and how surely.

    All models see the same data in the same order, and differences are paired by seed. The result
    has losses, costs, paired differences with intervals that hold together, and the share of the
    data after which a model had the reference's final loss. The same command continues after a
    crash; with more --seeds it adds them. Examples:

      archdsl compare transformer itt

      archdsl compare a.yaml b.yaml c.yaml --reference a --proxy none --tokens 2M --seeds 8

      archdsl compare transformer loop itt --match flops --data my.txt --tasks skill:p-hop

      archdsl compare transformer itt --lr 1e-3 --lr 2e-3 --lr 4e-3

      archdsl compare transformer itt --storage postgresql+psycopg://user@host/name
    """
    from archdsl.lang.load import read

    for spec in specs[1:]:
        read(spec, overrides or ())
    check_and_start_server(specs[0], overrides)
    from archdsl.search.analysis.compare_setup import compare_setup, trained_as
    from archdsl.search.compare import plan_compare, run_compare
    from archdsl.search.report.compare_report import planned, result
    from archdsl.search.report.tables import saying

    lrs = lr or []
    first = min(lrs, default=None)
    how = trained_as(
        proxy, data, tasks or (), tokens=tokens, context=context, batch_size=batch_size, lr=first
    )
    setup = compare_setup(
        specs, how, reference=reference, overrides=overrides or (), match=match, lrs=lrs
    )
    say_what_is_trained_on(how)
    means: dict[str, Any] = {
        "seeds": seeds,
        "workers": workers,
        "memory": memory,
        "out": out,
        "storage": storage,
    }
    if plan:
        with saying() as tell:
            found = plan_compare(setup, tell=tell, **means)
        print_json(found.as_json()) if as_json else print_parts(planned(found))
        return
    command = shlex.join(["archdsl", *sys.argv[1:]])
    with saying() as tell:
        report = run_compare(setup, seconds=time, tell=tell, command=command, **means)
    print_json(report.as_json()) if as_json else print_parts(result(report))
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
