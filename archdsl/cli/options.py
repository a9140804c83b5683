"""What commands share: options, options made from the fields of a config, printing."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from archdsl.errors import Problem, SpecError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from rich.console import RenderableType

    from archdsl.lang.spec import Budget

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# no rich markup: help and errors are the same in a terminal, in a pipe and in a log
PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}

Config = TypeVar("Config", bound="BaseModel")
Command = Callable[..., None]


def size(text: str) -> int:
    """``162M`` as a number above zero."""
    from archdsl.lang.source import parse_size

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


Spec = Annotated[
    str, typer.Argument(metavar="SPEC", help="A YAML file, or a shipped spec such as itt.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one place; may be repeated."),
]
Params = Annotated[
    int | None,
    typer.Option("--budget", parser=size, metavar="SIZE", help="Most parameters, such as 162M."),
]
BudgetOf = Annotated[
    Literal["params", "non_embedding"] | None,
    typer.Option(help="What --budget counts: all, or without embedding and head; default: params."),
]
Flops = Annotated[
    int | None,
    typer.Option(parser=size, metavar="SIZE", help="Most forward FLOPs per token, such as 0.8G."),
]
KV = Annotated[
    int | None,
    typer.Option(
        "--kv", parser=size, metavar="SIZE", help="Most bytes of KV cache per token, such as 64KiB."
    ),
]
TrainFlops = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Most FLOPs spent on training, by all workers together, such as 1e15 or 1P.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The same facts as JSON, and nothing else.")]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="A text, JSONL or parquet file or folder, hf:DATASET/CONFIG or skill:NAME; "
        "default: the embedded corpus.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="CHOICE",
        help="bytes, bpe:SIZE or a tokenizer.json; default: what fills the vocabulary.",
    ),
]
Capacity = Annotated[
    float | None,  # or a list of them: an option of that type would take several values
    typer.Option(
        parser=shares,
        metavar="SHARE[,SHARE...]",
        help="Turn the dial: share of the tokens that thinks, for all further steps or for each, "
        "such as 0.9,0.9,0; default: as trained.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Turn the dial: steps of each loop; default: as trained."),
]


def budget(
    params: int | None,
    flops: int | None,
    kv: int | None = None,
    of: Literal["params", "non_embedding"] | None = None,
    train_flops: int | None = None,
) -> Budget | None:
    """What stands on the command line takes the place of what stands in the file, limit by limit.

    ``of`` says what ``params`` counts; a size without embedding and head also lifts the file's
    limit on all parameters.
    """
    from archdsl.lang.spec import Budget

    if of and params is None:
        raise typer.BadParameter("--budget-of says what --budget counts: give --budget too")
    sizes = {"params": params}
    if of == "non_embedding":
        sizes = {"params": None, "non_embedding": params}
    others = {"flops": flops, "kv": kv, "train_flops": train_flops}
    given = (sizes if params else {}) | {name: size for name, size in others.items() if size}
    return Budget(**given) if given else None


def with_options_of(
    config: Callable[[], type[BaseModel]], parameter: str
) -> Callable[[Command], Command]:
    """Gives a command an option for each field of a config and hands that over as ``parameter``.

    Values are YAML: ``--lr 1e-3``, ``--clip null``, ``--betas '[0.9, 0.99]'``. ``config`` is called
    when the options are asked for, as importing pydantic takes longer than all else in a help.
    """
    return lambda command: _WithOptions(command, config, parameter)


class _WithOptions:
    def __init__(
        self, command: Command, config: Callable[[], type[BaseModel]], parameter: str
    ) -> None:
        self.command, self.config, self.parameter = command, config, parameter
        self.__name__, self.__doc__ = command.__name__, command.__doc__
        self.__annotations__ = {}

    @cached_property
    def __signature__(self) -> inspect.Signature:
        config = self.config()
        known = {config.__name__: config}  # its module imports it for type checking alone
        own = inspect.signature(self.command, locals=known, eval_str=True).parameters.values()
        kept = [p for p in own if p.name != self.parameter]
        options = [_option(name, field) for name, field in config.model_fields.items()]
        return inspect.Signature([*kept, *options])

    def __call__(self, **given: Any) -> None:
        config = self.config()
        texts = {name: given.pop(name) for name in config.model_fields}
        self.command(**given, **{self.parameter: _read(config, texts)})


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    from archdsl.lang.source import dump_inline

    is_flag = field.annotation is bool
    words = [field.description or name.replace("_", " ")]
    if not is_flag and "default:" not in words[0]:
        words.append(f"default: {dump_inline(field.get_default())}")
    help_text = "; ".join(words)
    option = typer.Option(
        _flag(name),
        metavar=None if is_flag else _metavar(field),
        help=f"{help_text[0].upper()}{help_text[1:]}.",
        show_default=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[bool | None if is_flag else str | None, option],
    )


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    return "VALUE"


def _read(config: type[Config], texts: Mapping[str, str | bool | None]) -> Config:
    """The config that the options ask for; raises SpecError with all that is wrong."""
    from pydantic import ValidationError

    from archdsl.lang.messages import explain

    given: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, text in texts.items():
        try:
            given |= {} if text is None else {name: _value(text)}
        except SpecError as error:
            problems += [Problem(_flag(name), problem.message) for problem in error.problems]
    try:
        whole = config.model_validate(given)
    except ValidationError as error:
        problems += [
            Problem(_flag(str(loc[0])) if loc else "", message)
            for loc, message in explain(error, config.model_fields)
        ]
    if problems:
        raise SpecError(problems)
    return whole


def _value(text: str | bool) -> Any:
    from archdsl.lang.source import parse

    return parse(text, "").value if isinstance(text, str) else text


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def print_parts(*parts: RenderableType) -> None:
    """To stdout: styled in a terminal, plain in a pipe and where NO_COLOR is set."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    console = Console(
        color_system=None if plain else "auto", highlight=False, emoji=False, markup=False
    )
    console.print(*parts, sep="\n")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
