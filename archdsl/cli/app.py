"""The command line program: its commands, and what it does with the errors that they raise."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

import archdsl
from archdsl.cli import (
    ablate,
    check,
    compare,
    generate,
    gradients,
    hub,
    retrofit,
    runs,
    search,
    specs,
    study,
    tokenize,
)
from archdsl.cli import eval as evaluation
from archdsl.cli.options import INTERRUPTED, PLAIN, SETTINGS, Command, CommandGroup, with_options_of
from archdsl.errors import ArchdslError
from archdsl.files import disk_fault

SECONDS_TO_TELL = 1.0  # for the process that prints an error: torchrun ends all when one has ended

COMMANDS: dict[str, tuple[Callable[..., None], type[Command]]] = {
    "build": (specs.build, Command),
    "search": (search.search, with_options_of(search.config_class)),
    "compare": (compare.compare, Command),
    "ablate": (ablate.ablate, Command),
    "tokenize": (tokenize.tokenize, Command),
    "train": (runs.train, with_options_of(runs.config_class)),
    "eval": (evaluation.eval_, Command),
    "gradients": (gradients.gradients, Command),
    "check": (check.check, Command),
    "generate": (generate.generate, with_options_of(generate.config_class)),
    "export": (hub.export, Command),
    "import": (hub.import_, Command),
    "retrofit": (retrofit.retrofit, Command),
    "diff": (specs.diff, Command),
    "blocks": (specs.blocks, Command),
    "schema": (specs.schema, Command),
}


class Commands(CommandGroup):
    """The commands by name, and what is done with the errors that they raise.

    Only the command that is asked for is given its options: making those of all commands would
    take a third of the time of a help.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        helps = {name: inspect.getdoc(function) for name, (function, _) in COMMANDS.items()}
        self.commands = {
            name: TyperCommand(name, help=text, rich_markup_mode=None)
            for name, text in (helps | {"study": study.app.info.help}).items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the command of a name, and makes its options only now."""
        name, command, rest = super().resolve_command(ctx, args)
        if name == "study":
            command = get_command(study.app)
        elif name:
            function, kind = COMMANDS[name]
            alone = typer.Typer(add_completion=False, **PLAIN)
            alone.command(name, cls=kind)(function)
            command = get_command(alone)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Prints an error that the user can correct without a traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OSError as error:
            if error.filename is None and (reason := disk_fault(error)):
                print(f"the output could not be written: {reason}", file=sys.stderr)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
                raise typer.Exit(1) from None
            raise
        except ArchdslError as error:
            if error.told_by_another:
                time.sleep(SECONDS_TO_TELL)
                raise typer.Exit(error.exit_status) from None
            if settings := ctx.meta.get(SETTINGS):
                from archdsl.lang.config import say_where

                say_where(error, settings)
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, **PLAIN)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"archdsl {archdsl.__version__}")
        raise typer.Exit


def _load_plugins(modules: Sequence[str] | None) -> None:
    from archdsl.lang.registry import PluginError, load_plugin

    for module in modules or ():
        try:
            load_plugin(module)
        except PluginError as error:  # before the command, nobody else would print it
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_status) from None


@app.callback()
def archdsl_(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            callback=_load_plugins,
            is_eager=True,
            expose_value=False,
            help="Load blocks from this Python module. May be repeated, before or after the "
            "command.",
        ),
    ] = None,
) -> None:
    """Language models that think with dynamic depth: write them as YAML, count their cost, train
    and search them."""
