"""Settings as data: a YAML file, values given in code, or both, checked by a pydantic model."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import ValidationError

from archdsl.errors import ArchdslError, Problem, SpecError
from archdsl.lang import source
from archdsl.lang.spec import Budget
from archdsl.lang.strict import Strict

Config = TypeVar("Config", bound=Strict)

OF_SPECS = {"blocks", "extends"}  # every spec has one of these keys, and no config


def check_config(kind: type[Config], tree: source.Tree) -> Config:
    """The config in a tree; raises SpecError with every problem and its position in the tree."""
    try:
        return kind.model_validate(tree.value)
    except ValidationError as error:
        found = {e["loc"]: e["msg"] for e in error.errors(include_url=False, include_context=False)}
    for key in tree.value.keys() & OF_SPECS & {path[0] for path in found if path}:
        some = ", ".join(list(kind.model_fields)[:4])
        message = (
            f"this looks like a model spec, for it has the key {key!r}. A config has settings such "
            f"as {some}. A spec is the argument of the command and does not go with --config"
        )
        raise SpecError(Problem("", message, tree.position((key,))))
    if ("set",) in found:
        found["set",] = "is no setting: write it into the spec, or give --set PATH=VALUE"
    raise SpecError(
        Problem(source.dotted(path), message, tree.position(path))
        for path, message in found.items()
    )


def say_where(error: ArchdslError, tree: source.Tree) -> None:
    """Adds to an error that is `blamed_on` a setting where that setting stands in the tree.

    So a value that is found wrong only when it is used has a line and a column as all others have.
    """
    name = error.setting
    if name and name in tree.value:
        position, message = tree.position((name,)), str(error).removeprefix(f"{name}: ")
        of_command = position is not None and not position.line  # an option says its name itself
        error.args = (str(Problem("" if of_command else name, message, position)),)


def budget_of_limits(
    budget: int | None = None,
    flops: int | None = None,
    kv: int | None = None,
    budget_of: Literal["params", "non_embedding"] | None = None,
    train_flops: int | None = None,
) -> Budget | None:
    """The limits that are given as a budget; None if there are none.

    It holds only what is given, so that the other limits of a file stay. ``budget_of`` says what
    ``budget`` counts; a limit on the parameters outside embedding and head also lifts a file's
    limit on all parameters. Raises ValueError if ``budget_of`` is given without ``budget``.
    """
    if budget_of and budget is None:
        raise ValueError("says what the budget counts, but no budget is given")
    given: dict[str, int | None] = {"params": budget} if budget else {}
    if budget_of == "non_embedding":
        given = {"params": None, "non_embedding": budget}
    others = {"flops": flops, "kv": kv, "train_flops": train_flops}
    given |= {name: limit for name, limit in others.items() if limit}
    return Budget(**given) if given else None
