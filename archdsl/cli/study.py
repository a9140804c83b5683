"""Commands on the studies that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from archdsl.cli.options import KV, PLAIN, Flops, Json, Params, print_json, print_parts
from archdsl.cli.search import Storage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="List, show and take along what searches have found.",
    **PLAIN,
)

Name = Annotated[
    str, typer.Argument(metavar="STUDY", help="A folder, or a name as `archdsl study ls` has it.")
]


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Where the folders of studies are.")] = Path(
        "runs"
    ),
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """List studies: how many draws ended how, the best, what was spent.

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


@app.command()
def show(name: Name, storage: Storage = None, as_json: Json = False) -> None:
    """Show where a study stands, also while others search: its front, and what was spent.

    Example: archdsl study show search-1a2b3c4d
    """
    from archdsl.search.report.live import standing
    from archdsl.search.studies import study

    found = study(name, storage)
    if as_json:
        print_json(found.result() or found.as_json())
    else:
        print_parts(standing(found))


@app.command()
def best(
    name: Name,
    params: Params = None,
    flops: Flops = None,
    kv: KV = None,
    storage: Storage = None,
) -> None:
    """Print the spec of lowest loss, of those that keep to the limits, if any are given.

    Example: archdsl study best search-1a2b3c4d --flops 0.5G > best.yaml
    """
    from archdsl.search.studies import best_within, study

    limits = {"params": params, "flops": flops, "kv": kv}
    print(best_within(study(name, storage).record.finished(), limits).spec.to_yaml(), end="")


@app.command()
def export(
    name: Name,
    form: Annotated[
        Literal["csv", "jsonl"], typer.Option("--as", help="A column for each choice, or all.")
    ] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write; default: print it.")] = None,
    storage: Storage = None,
) -> None:
    """Write every draw with its choices, costs, scores and spec.

    Example: archdsl study export search-1a2b3c4d --out draws.csv
    """
    from archdsl.files import write_text
    from archdsl.search.studies import export, study

    text = export(study(name, storage), form)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)


@app.command()
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage: Storage = None,
) -> None:
    """Delete a study: its folder with all that it trained, or its record in the database.

    Example: archdsl study rm runs/search-1a2b3c4d
    """
    from archdsl.search.studies import remove, study

    found = study(name, storage)
    draws = sum(found.record.outcomes().values())
    if not yes:
        typer.confirm(f"Delete {found.folder or found.name} with its {draws} draws?", abort=True)
    remove(found)
