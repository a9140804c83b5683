"""The commands together, and what becomes of the errors they raise.

Help, completion and mistyped options answer at once: a command gets its options when it is the one
asked for, and what none of these need, pydantic above all, is imported where it is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

import archdsl
from archdsl.cli import ablate, check, generate, hub, retrofit, runs, search, specs, study
from archdsl.cli import eval as evaluation
from archdsl.cli.options import INTERRUPTED, PLAIN, Command
from archdsl.errors import ArchdslError

COMMANDS = (
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
)


_processed = TyperOption.process_value  # of arguments, too


def _converted(self: TyperArgument | TyperOption, ctx: Any, value: Any) -> Any:
    """typer has pydantic convert also a default, which is what it should be, and to complete words.

    Its import would take longer than all else that a help or a mistyped option needs.
    """
    if ctx.resilient_parsing:
        return value
    if value is self.default and not self.required:
        return self.callback(ctx, self, value) if self.callback else value
    return _processed(self, ctx, value)


for kind in (TyperArgument, TyperOption):
    kind.process_value = _converted  # type: ignore[assignment, method-assign]


class Group(TyperGroup):
    """Knows of each command its name and what it does; the one that is asked for gets its options.

    Mistakes are printed plainly: a traceback is for faults in the code.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.functions = {name_of(function): function for function in COMMANDS}
        helps = {name: inspect.getdoc(function) for name, function in self.functions.items()}
        self.commands = {
            name: TyperCommand(name, help=words, rich_markup_mode=None)
            for name, words in (helps | {"study": study.app.info.help}).items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "study":
            command = get_command(study.app)
        elif name:
            command = with_options(self.functions[name])
        if name:  # also `archdsl build SPEC --plugin MODULE`
            plugin = next(param for param in self.params if param.name == "plugin")
            for each in getattr(command, "commands", {name: command}).values():
                each.params.append(plugin)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArchdslError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def name_of(function: Command) -> str:
    return function.__name__.rstrip("_")


def with_options(function: Command) -> Any:
    alone = typer.Typer(add_completion=False, **PLAIN)
    alone.command(name_of(function))(function)
    return get_command(alone)


def _load_plugins(modules: Sequence[str] | None) -> None:
    from archdsl.lang.registry import load_plugin

    for module in modules or ():
        load_plugin(module)


app = typer.Typer(cls=Group, no_args_is_help=True, **PLAIN)


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
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            callback=_load_plugins,
            is_eager=True,
            expose_value=False,
            help="Load blocks from this Python module; may be repeated.",
        ),
    ] = None,
) -> None:
    """Language models that think with dynamic depth: written as YAML, costed, trained, searched."""
