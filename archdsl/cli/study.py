"""The commands on studies, which are what searches have stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from archdsl.cli.options import (
    KV,
    PLAIN,
    Command,
    CommandGroup,
    Flops,
    Json,
    Params,
    print_json,
    print_parts,
)

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    help="List, show, export and delete studies, which are the results of searches.",
    **PLAIN,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="The folder of a study, or its name, or the beginning of its name, as "
        "`archdsl study ls` prints it.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Look in this database instead of in folders, for example "
        "postgresql+psycopg://user@host/name.",
    ),
]


@app.command(cls=Command)
def ls(
    folder: Annotated[
        Path, typer.Argument(help="The folder that holds the folders of studies.")
    ] = Path("runs"),
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """List studies, with the number of trials by outcome, the best trial and what was spent.

    Examples:

      archdsl study ls

      archdsl study ls --storage postgresql+psycopg://user@host/name
    """
    from archdsl.search.report.live import listing
    from archdsl.search.studies import studies

    found = list(studies(folder, storage))
    if as_json:
        print_json([one.as_json() for one in found])
    else:
        print_parts(listing(found) if found else f"no studies in {storage or folder}")


@app.command(cls=Command)
def show(name: Name, storage: Storage = None, as_json: Json = False) -> None:
    """Show the state of a study: its Pareto front and what was spent.

    The study may still be running. Example:

      archdsl study show search-1a2b3c4d
    """
    from archdsl.search.report.live import standing
    from archdsl.search.studies import study

    found = study(name, storage)
    if as_json:
        print_json(found.result() or found.as_json())
    else:
        print_parts(standing(found))


@app.command(cls=Command)
def best(
    name: Name,
    params: Params = None,
    flops: Flops = None,
    kv: KV = None,
    storage: Storage = None,
) -> None:
    """Print the spec of the trial with the lowest loss among those that keep to the limits.

    Example:

      archdsl study best search-1a2b3c4d --flops 0.5G > best.yaml
    """
    from archdsl.search.studies import best_within, study

    limits = {"params": params, "flops": flops, "kv": kv}
    print(best_within(study(name, storage).record.finished(), limits).spec.to_yaml(), end="")


@app.command(cls=Command)
def export(
    name: Name,
    form: Annotated[
        Literal["csv", "jsonl"],
        typer.Option(
            "--as",
            help="csv: one column for each choice and score; jsonl: one JSON object for each "
            "trial, with everything that is known of it.",
        ),
    ] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write. Default: stdout.")] = None,
    storage: Storage = None,
) -> None:
    """Write all trials of a study with their choices, costs, scores and specs.

    Example:

      archdsl study export search-1a2b3c4d --out trials.csv
    """
    from archdsl.files import write_text
    from archdsl.search.studies import export, study

    text = export(study(name, storage), form)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)


@app.command(cls=Command)
def rm(
    name: Name,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete without asking for confirmation.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Delete a study: its folder with everything in it, or its record in the database.

    Example:

      archdsl study rm runs/search-1a2b3c4d
    """
    from archdsl.search.studies import remove, study

    found = study(name, storage)
    trials = sum(found.record.outcomes().values())
    if not yes:
        typer.confirm(f"Delete {found.folder or found.name} with its {trials} trials?", abort=True)
    remove(found)
