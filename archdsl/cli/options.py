"""What the commands share: options, options made from the fields of a config, printing."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from archdsl.cli import completion
from archdsl.errors import ArchdslError, Position, Problem, SpecError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.console import RenderableType

    from archdsl.lang.source import Tree
    from archdsl.lang.spec import Budget
    from archdsl.lang.strict import Strict

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# no rich markup: help and errors are the same in a terminal, in a pipe and in a log
SETTINGS = "archdsl.settings"  # where `config_from` leaves the tree of the settings for errors

PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}

Config = TypeVar("Config", bound="Strict")


def size(text: str) -> int:
    """``162M`` as a number above zero."""
    from archdsl.sizes import parse_size

    try:
        number = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if number < 1:
        raise typer.BadParameter(f"must be at least 1, got {text}")
    return number


def shares(text: str) -> float | list[float]:
    """``0.5``, or ``0.9,0.9,0`` as a list."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must be numbers such as 0.9,0.9,0, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


def duration(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds."""
    from archdsl.search.config import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A YAML file, or the name of a shipped spec such as itt.",
        autocompletion=completion.specs,
    ),
]
CheckpointFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder of a checkpoint, as `train` or `build --out` writes it.",
        autocompletion=completion.checkpoints,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set one value of the spec, for example blocks.0.repeat=2. May be repeated.",
    ),
]
Params = Annotated[
    int | None,
    typer.Option(
        "--budget",
        parser=size,
        metavar="SIZE",
        help="Most parameters of the model, for example 162M.",
    ),
]
BudgetOf = Annotated[
    Literal["params", "non_embedding"] | None,
    typer.Option(
        help="What --budget counts: all parameters, or those outside embedding and head. "
        "Default: params."
    ),
]
Flops = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Most forward FLOPs per token of the model, for example 0.8G.",
    ),
]
KV = Annotated[
    int | None,
    typer.Option(
        "--kv",
        parser=size,
        metavar="SIZE",
        help="Most bytes of KV cache per token of the model, for example 64KiB.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else to stdout.")
]
Source = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[:WEIGHT]",
        help="A text, JSONL, parquet or arrow file or folder, hf:DATASET/CONFIG or skill:NAME. "
        "SOURCE::COLUMN also says which column is the text. May be repeated to mix texts, in "
        "equal shares or by weights: --data a:0.8 --data b:0.2. Default: the embedded corpus.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The column of --data that is the text. Default: text, content or document.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="CHOICE",
        help="bytes, bpe:SIZE or the path of a tokenizer.json. Default: bpe with as many tokens as "
        "the vocabulary of the spec holds, or bytes for a small vocabulary.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the checkpoint that is in --out, if there is one.")
]
Capacity = Annotated[
    float | None,  # or a list of them: an option of that type would take several values
    typer.Option(
        parser=shares,
        metavar="SHARE[,SHARE...]",
        help="Turn the compute dial: the share of the tokens that each further step processes, as "
        "one number or one for each step, for example 0.9,0.9,0. Default: as trained.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Turn the compute dial: the number of steps of each loop. Default: as trained."
    ),
]
Exit = Annotated[
    float | None,
    typer.Option(
        "--exit",
        min=0,
        metavar="THRESHOLD",
        help="Turn the compute dial: the threshold at which a token stops looping, for a model "
        "whose loops have an exit, for example 0.9. Default: as trained.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Read settings from a YAML file, whose keys are the long names of the options below "
        "with _ in place of -. Options given here replace them.",
    ),
]


def budget(params: int | None, flops: int | None, kv: int | None, of: Any = None) -> Budget | None:
    """The limits given on the command line, which replace those of the file one by one."""
    from archdsl.lang.config import budget_of_limits

    if of and params is None:
        raise typer.BadParameter("--budget-of says what --budget counts: give --budget too")
    return budget_of_limits(params, flops, kv, of)


def refuse_to_replace(folder: Path, force: bool) -> None:
    """Raises ArchdslError if the folder holds something and ``force`` is not given."""
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise ArchdslError(f"{folder} is not empty; --force replaces the checkpoint in it")


def one_source(sources: Sequence[str] | None, column: str | None = None) -> str | None:
    """The data of all ``--data`` as one text, which `archdsl.load_data` takes; None without any."""
    from archdsl.training.train_file import one_source

    return one_source(sources, column)


def check_output(path: Path) -> None:
    """Raises ArchdslError if no file can be written there, before time is spent on its content."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArchdslError(
            f"{path} cannot be written: it must name a file, and the folder of the file must exist"
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise ArchdslError(f"{path} cannot be written: its folder is read-only")


class TextOption(TyperOption):
    """An option whose value stays as it was given.

    To convert a value, typer imports pydantic, which takes longer than a help needs in all.
    """

    def process_value(self, ctx: Any, value: Any) -> Any:
        """The value as it was given, or what the callback of the option makes of it."""
        return self.callback(ctx, self, value) if self.callback else value


def as_given(options: list[Any]) -> list[Any]:
    """The options, which no longer convert their values."""
    for option in options:
        option.__class__ = TextOption
    return options


def plugin_option(ctx: Any) -> list[Any]:
    """The option ``--plugin`` of ``archdsl`` itself, which the commands below it take as well."""
    return [p for p in ctx.find_root().command.params if p.name == "plugin"]


def _not_given(params: list[Any], ctx: Any) -> list[Any]:
    """The parameters, for completion without the arguments that stand there already."""
    if not ctx.resilient_parsing:
        return params
    given = {name for name, value in ctx.params.items() if value is not None}
    return [p for p in params if p.param_type_name == "option" or p.name not in given]


class CommandGroup(TyperGroup):
    """Commands below a name; the options of the group itself are flags and words."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The group's own options, and ``--plugin`` if another group stands above it."""
        above = plugin_option(ctx) if ctx.parent else []
        return as_given([*above, *super().get_params(ctx)])


class Command(TyperCommand):
    """A command that also takes ``--plugin``, which is an option of ``archdsl`` itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments, unless a shell only asks for completions."""
        if ctx.resilient_parsing:  # completion asks for what was given, and not for its values
            ctx.params = dict(self.make_parser(ctx).parse_args(list(args))[0])
            return []
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own arguments and options, then ``--plugin`` and ``--help``."""
        the_help = super().get_params(ctx)[len(self.params) :]
        return [*_not_given(self.params, ctx), *as_given([*plugin_option(ctx), *the_help])]

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. A wrong plugin is told also where no kind would be asked for."""
        if os.environ.get("ARCHDSL_PLUGINS"):
            from archdsl.lang.registry import families

            families()
        return super().invoke(ctx)


class ConfigCommand(Command):
    """A command with an option for each field of a config, which `config_from` then reads.

    The options are made when they are asked for: a config needs pydantic, whose import takes
    longer than all else that the other commands' help needs. A field that the command itself
    declares as an argument is not made an option.
    """

    config: Callable[[], type[Strict]]

    @cached_property
    def options(self) -> list[Any]:
        """One option for each field of the config that the command does not declare itself."""
        own = {param.name for param in self.params}
        fields = {n: field for n, field in self.config().model_fields.items() if n not in own}

        def carrier(**_: Any) -> None: ...

        carrier.__annotations__ = {}
        carrier.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_option(name, field) for name, field in fields.items()]
        )
        alone = typer.Typer(add_completion=False, **PLAIN)
        alone.command()(carrier)
        return list(get_command(alone).params)

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own options, then those of the config, then those of all commands."""
        own, declared = super().get_params(ctx), len(_not_given(self.params, ctx))
        return [*own[:declared], *self.options, *own[declared:]]

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; the values of the options of the config go to `config_from`."""
        ctx.obj = {option.name: ctx.params.pop(option.name) for option in self.options}
        return super().invoke(ctx)


def with_options_of(config: Callable[[], type[Strict]]) -> type[ConfigCommand]:
    """A kind of command that has an option for each field of the class that ``config`` returns."""
    return type("ConfigCommand", (ConfigCommand,), {"config": staticmethod(config)})


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    is_flag = field.annotation is bool
    words = field.description or name.replace("_", " ")
    if not is_flag and "default:" not in words and field.default is not None:
        words += f"; default: {_default(field.default)}"
    words = words.replace("; default:", ". Default:")
    option = typer.Option(
        _flag(name),
        metavar=None if is_flag else _metavar(field),
        help=f"{words[0].upper()}{words[1:]}.",
        show_default=False,
        autocompletion=_completer(field),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[bool | None if is_flag else str | None, option],
    )


def _default(value: Any) -> str:
    """A default as YAML; numbers and words look the same there and in JSON, but for the quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _metavar(field: FieldInfo) -> str:
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if _is_size(field.annotation, *field.metadata):
        return "SIZE"
    return "PATH" if kind is Path else "VALUE"


def _completer(field: FieldInfo) -> completion.Completer | None:
    kind = _kind(field)
    return completion.words(*get_args(kind)) if get_origin(kind) is Literal else None


def _is_size(*kinds: Any) -> bool:
    """Whether one of the types, or what validates them, is `Size`."""
    from archdsl.lang.strict import Size

    of_size = get_args(Size)[1]
    return any(kind == of_size or _is_size(*get_args(kind)) for kind in kinds)


def _kind(field: FieldInfo) -> Any:
    """The type of a field without None and without what validates it."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def config_from(
    ctx: typer.Context,
    kind: type[Config],
    file: Path | Tree | None = None,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Config:
    """The config of a `ConfigCommand`: what its options say, then what the file says.

    ``options`` and ``arguments`` are values of fields that the command declared itself, as options
    and as arguments; None stands for one that was not given. Option values are YAML: ``--lr 1e-3``,
    ``--clip null``.
    Raises SpecError with everything that is wrong, each with its option or its place in the file.
    """
    from archdsl.lang import source
    from archdsl.lang.config import check_config

    tree = source.read_file(file, "a config") if isinstance(file, Path) else file
    tree = tree or source.Tree({}, {})
    problems: list[Problem] = []
    for name, text in (arguments | dict(options or {}) | ctx.obj).items():
        if text is None:
            continue
        flag = Position(name.upper() if name in arguments else _flag(name), 0, 0)
        try:
            value = _value(text, kind.model_fields[name])
        except SpecError as error:
            problems += [Problem("", found.message, flag) for found in error.problems]
        else:
            tree = source.put(tree, (name,), source.at_position(value, flag))
    ctx.meta[SETTINGS] = tree
    try:
        config = check_config(kind, tree)
    except SpecError as error:
        problems += [_without_path(problem) for problem in error.problems]
    if problems:
        raise SpecError(problems)
    return config


def _value(text: Any, field: FieldInfo) -> Any:
    """The value that an option gives a field. Raises SpecError for a text that is no YAML."""
    from archdsl.lang.source import parse

    kind = _kind(field)
    is_word = kind in (str, Path) or get_origin(kind) is Literal
    return parse(text, "").value if isinstance(text, str) and not is_word else text


def _without_path(problem: Problem) -> Problem:
    """A problem with an option, whose name says already which field is meant."""
    if problem.position and not problem.position.line:
        return Problem("", problem.message, problem.position)
    return problem


def print_parts(*parts: RenderableType) -> None:
    """Prints to stdout: styled in a terminal, plain in a pipe and where NO_COLOR is set."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    console = Console(
        color_system=None if plain else "auto", highlight=False, emoji=False, markup=False
    )
    console.print(*parts, sep="\n")


def print_json(value: Any) -> None:
    """Prints to stdout as indented JSON. Raises ValueError for a number that is not finite."""
    print(json.dumps(value, indent=2, allow_nan=False))
