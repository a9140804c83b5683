"""The commands on studies, which are what searches have stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from archdsl.cli import completion
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
        help="The name of a study or of its folder, as `archdsl study ls` prints them, or how one "
        "of them begins, or the path of the folder.",
        autocompletion=completion.studies,
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
    as_json: Json = False,
) -> None:
    """Print the spec of the trial with the lowest loss among those that keep to the limits.

    Example:

      archdsl study best search-1a2b3c4d --flops 0.5G > best.yaml
    """
    from archdsl.search.report.report import trial_row
    from archdsl.search.studies import best_within, study

    limits = {"params": params, "flops": flops, "kv": kv}
    record = study(name, storage).record
    trial = best_within(record.finished(), limits)
    print_json(trial_row(trial, record.axes)) if as_json else print(trial.spec.to_yaml(), end="")


@app.command(cls=Command)
def export(
    name: Name,
    form: Annotated[
        Literal["csv", "jsonl"] | None,
        typer.Option(
            "--as",
            help="csv: one column for each choice and score; jsonl: one JSON object for each "
            "trial, with everything that is known of it. Default: csv.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: stdout.")] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write all trials of a study with their choices, costs, scores and specs.

    --json prints a JSON list of what --as jsonl has in lines; with --out it says what was written.
    Example:

      archdsl study export search-1a2b3c4d --out trials.csv
    """
    from archdsl.files import write_text
    from archdsl.search.studies import export, rows, study

    if as_json and form and out is None:
        raise typer.BadParameter("--json prints the trials as a JSON list: leave --as out")
    found = study(name, storage)
    if out is not None:
        write_text(out, export(found, form or "csv"))
    if as_json:
        trials = rows(found)
        print_json({"file": str(out), "trials": len(trials)} if out else trials)
    elif out is None:
        print(export(found, form or "csv"), end="")


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
    from archdsl.search.studies import DamagedStudy, find, remove

    found = find(name, storage)
    if isinstance(found, DamagedStudy):
        content = f", which cannot be read ({found.error})"
    else:
        content = f" with its {sum(found.record.outcomes().values())} trials"
    if not yes:
        typer.confirm(f"Delete {found.folder or found.name}{content}?", abort=True)
    remove(found)
