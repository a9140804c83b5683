"""The commands together, and what becomes of the errors they raise."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import archdsl
from archdsl.cli import ablate, check, generate, hub, retrofit, runs, search, specs, study
from archdsl.cli import eval as evaluation
from archdsl.cli.options import INTERRUPTED
from archdsl.errors import ArchdslError


class Group(TyperGroup):
    """Prints mistakes plainly: a traceback is for faults in the code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArchdslError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


# no rich markup: help and errors are the same in a terminal, in a pipe and in a log
app = typer.Typer(
    cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
for command in (
    specs.build,
    search.search,
    ablate.ablate,
    runs.train,
    evaluation.eval_,
    check.check,
    generate.generate,
    hub.export,
    hub.import_,
    retrofit.retrofit,
    specs.diff,
    specs.blocks,
    specs.schema,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(study.app, name="study")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"archdsl {archdsl.__version__}")
        raise typer.Exit


@app.callback()
def archdsl_(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Language models that think with dynamic depth: written as YAML, costed, trained, searched."""
