"""What a model is made of, as data. Knows nothing about torch, nor which blocks exist."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from archdsl.errors import Problem, SpecError, describe, did_you_mean
from archdsl.lang import registry, source
from archdsl.lang.messages import explain

if TYPE_CHECKING:
    from archdsl.costs.activations import Footprint, Rows
    from archdsl.costs.bill import Bill
    from archdsl.nn.block import Block

Path = tuple[str | int, ...]

MAX_NODES = 10_000  # blocks that one pass runs, every repeat and step counted


class Strict(BaseModel):
    """Immutable data; an unknown key is an error that names the known ones."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # a spec names a few kinds, and no others need validators
    )

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_would_be_right(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            # `from None`: the rewritten error says all that the first one did
            problems = explain(error, cls.model_fields)
            raise _validation_error(
                [(_as_written(path, value), why) for path, why in problems]
            ) from None


def _as_written(path: Path, value: Any) -> Path:
    """The path without the place in a list that was given as one value for every step."""
    if not isinstance(value, Mapping) or len(path) < 2 or path[1] != 0:
        return path
    return path if isinstance(value.get(path[0]), list | tuple) else path[:1] + path[2:]


def _validation_error(problems: list[tuple[Path, str]]) -> ValidationError:
    """One pydantic error out of (path, message) pairs."""
    return ValidationError.from_exception_data(
        "spec",
        [
            InitErrorDetails(
                type=PydanticCustomError("archdsl", "{message}", {"message": message}),
                loc=path,
                input=None,
            )
            for path, message in problems
        ],
    )


class Sizes(NamedTuple):
    """What a proxy changes of a model."""

    dim: int
    context: int
    vocab_size: int
    head_size: int
    repeat: int  # copies of a stack's body, at most


class Part(Strict):
    """A node of the tree: one ``kind`` of its family. Subclasses register by being defined."""

    family: ClassVar[str]
    example: ClassVar[Mapping[str, Any]] = {}  # a small valid instance, for the catalogue and tests

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        field = cls.model_fields.get("kind")
        if field is None:
            return  # the base class of a family
        registry.register(cls.family, field.default, cls)

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """What does not go together at width ``dim``, as (path, message)."""
        return iter(())

    def canonical(self, dim: int) -> Part | None:
        """The same meaning in one way of saying it; None where it means nothing at all."""
        return self.with_each(lambda part: part.canonical(dim))

    def resized(self, old: Sizes, new: Sizes) -> Part:
        """The same structure in a model of other sizes, for a proxy."""
        return self.with_each(lambda part: part.resized(old, new))

    def with_each(self, change: Callable[[Part], Part | None]) -> Self:
        """A copy in which every part directly inside is changed."""
        parts: dict[str, Any] = {}
        for name in type(self).model_fields:
            match getattr(self, name):
                case Part() as part:
                    parts[name] = change(part)
                case tuple() as several if several and isinstance(several[0], Part):
                    parts[name] = tuple(change(part) for part in several)
        return self.model_copy(update=parts)


class BlockSpec(Part):
    """A block maps a stream to a stream of the same shape."""

    family: ClassVar[str] = "block"

    def build(self, dim: int) -> Block:
        raise NotImplementedError

    def cost(self, bill: Bill) -> None:
        """Adds what this block has to the bill."""
        raise NotImplementedError

    def footprint(self, rows: Rows) -> Footprint:
        raise NotImplementedError

    def unrolled(self) -> tuple[BlockSpec, ...]:
        """The blocks that this one stands for; itself, unless it is a mere grouping."""
        return (self,)

    @property
    def nodes(self) -> int:
        """How many blocks one pass runs for this one; no more are built."""
        return 1 + sum(p.nodes for _, p in children(self) if isinstance(p, BlockSpec))


def slot(family: str, default: str | None = None) -> Any:
    """Marks a field that takes any kind of ``family``; a bare word stands for its kind."""

    def by_kind(value: Any) -> Any:
        if value is None or isinstance(value, Part):
            return value  # whether a slot may be empty is said by its type
        if isinstance(value, str):
            value = {"kind": value}
        known = registry.kinds(family)
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "archdsl",
                "{message}",
                {
                    "message": f"must be a mapping that names a kind of {family} "
                    f"({', '.join(sorted(known))}), got {describe(value)}"
                },
            )
        kind = value.get("kind", default)
        if not isinstance(kind, str) or kind not in known:
            found = "no kind" if kind is None else f"unknown kind {kind!r:.60}"
            hint = did_you_mean(str(kind), known)
            message = f"{found} of {family}{hint}; known kinds: {', '.join(sorted(known))}"
            if kind is not None and not hint:
                message = f"{message}; {registry.how_to_load()}"
            raise _validation_error([(("kind",) if "kind" in value else (), message)])
        return known[kind].model_validate(value)

    return BeforeValidator(by_kind, json_schema_input_type=Any)


AnyBlock = Annotated[
    SerializeAsAny[BlockSpec], slot("block"), WithJsonSchema({"x-family": "block"})
]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _size(value: Any) -> Any:
    return source.parse_size(value) if isinstance(value, str | float) else value


Size = Annotated[int, BeforeValidator(_size)]
"""A whole number that may be written 162M, 4k or 64KiB."""


def _per_step(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Number = TypeVar("Number", bound=float)
PerStep = Annotated[
    tuple[Number, ...],
    BeforeValidator(_per_step),
    PlainSerializer(lambda values: values[0] if len(values) == 1 else list(values)),
]
"""One value for every routed step, or a list with one for each."""


def at_step(values: tuple[float, ...], step: int) -> float:
    return values[0] if len(values) == 1 else values[step]


Blocks = Annotated[tuple[AnyBlock, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _limit(description: str) -> Any:
    return Field(None, ge=1, description=description)


class Budget(Strict):
    """Hard limits of the full-size model. ``fit`` solves for the tightest."""

    params: Size | None = _limit("parameters")
    non_embedding: Size | None = _limit("parameters without embedding and head")
    flops: Size | None = _limit("expected forward FLOPs per token at the context")
    kv: Size | None = _limit("bytes of KV cache per token, in bfloat16")
    train_flops: Size | None = _limit(
        "FLOPs that a search may spend on training, by all its workers together"
    )

    @property
    def of_model(self) -> dict[str, int]:
        """The limits that a model keeps to, by name; what a search spends is no such limit."""
        return self.model_dump(exclude_none=True, exclude={"train_flops"})

    def with_limits(self, given: Budget | None) -> Budget:
        """Limit by limit, what ``given`` says in the place of what is said here.

        A limit that ``given`` sets to None is lifted, one that it does not set stays.
        """
        update = given.model_dump(exclude_unset=True) if given else {}
        return self.model_copy(update=update)


class ModelSpec(Strict):
    """A language model: embedding, blocks, final norm, head."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[\w.+-]+$")
    description: str = Field("", max_length=2000)
    vocab_size: Size = Field(ge=2, le=2**22, description="rows of the embedding")
    context: Size = Field(ge=1, le=2**20, description="longest sequence, in tokens")
    dim: Size = Field(ge=1, le=2**16, description="width of the stream")
    tie_embeddings: bool = Field(False, description="the head shares the embedding's matrix")
    norm: Literal["rms", "layer"] = Field("rms", description="the norm before the head")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="added to the variance in that norm")
    blocks: Blocks
    budget: Budget | None = Field(None, description="what `fit` and `search` keep to")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        total = sum(block.nodes for block in self.blocks)
        if total > MAX_NODES:
            found = f"{min(total, 10**18):,} with every repeat and step counted"
            raise _validation_error(
                [(("blocks",), f"must run at most {MAX_NODES:,} blocks, got {found}")]
            )
        problems = [
            (path + inner, message)
            for path, part in walk(self)
            for inner, message in part.conflicts(self.dim)
        ]
        if problems:
            raise _validation_error(problems)
        return self

    def canonical(self) -> ModelSpec:
        """Sizes resolved, groupings unrolled, and what means nothing taken out."""
        blocks = tuple(
            leaf
            for block in self.blocks
            for leaf in cast(BlockSpec, block.canonical(self.dim)).unrolled()
        )
        return self.model_copy(
            update={"blocks": blocks, "name": "model", "description": "", "budget": None}
        )

    def fingerprint(self) -> str:
        """Equal for specs that mean the same model, whatever they are called (64 hex digits)."""
        data = self.canonical().model_dump(mode="json")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def resized(self, new: Sizes) -> ModelSpec:
        """The same structure at other sizes, such as a proxy that trains in seconds."""
        old = Sizes(self.dim, self.context, self.vocab_size, new.head_size, new.repeat)
        sizes = {"dim": new.dim, "context": new.context, "vocab_size": new.vocab_size}
        blocks = tuple(block.resized(old, new) for block in self.blocks)
        resized = self.model_copy(update={**sizes, "blocks": blocks, "budget": None})
        return parse_spec(source.from_value(to_tree(resized), f"proxy of {self.name}"))

    def to_yaml(self) -> str:
        """As a YAML text that reads back to an equal spec; what is at its default is left out."""
        return source.dump(to_tree(self))

    def patch(self, path: str, value: Any) -> ModelSpec:
        """A copy with the value at a dotted path replaced.

        >>> import archdsl
        >>> archdsl.load("tiny").patch("dim", 128).dim
        128
        """
        tree = source.from_value(to_tree(self, path.split(".")), self.name)
        return parse_spec(source.override(tree, [f"{path}={source.dump_inline(value)}"]))


def children(part: Strict) -> Iterator[tuple[Path, Part]]:
    """The parts directly inside, with their paths."""
    for name in type(part).model_fields:
        match getattr(part, name):
            case Part() as child:
                yield (name,), child
            case tuple() as several:
                yield from (
                    ((name, i), child) for i, child in enumerate(several) if isinstance(child, Part)
                )


def walk(part: Strict) -> Iterator[tuple[Path, Part]]:
    """Every part below, parents first."""
    for path, child in children(part):
        yield path, child
        yield from ((path + inner, below) for inner, below in walk(child))


def to_tree(part: Strict, along: Sequence[str] = ()) -> dict[str, Any]:
    """Plain data, the kind first; values at their default are left out.

    ``along``: a path whose fields are kept even so.
    """
    tree: dict[str, Any] = {}
    for name, field in sorted(type(part).model_fields.items(), key=lambda item: item[0] != "kind"):
        value, inside = getattr(part, name), along[1:] if along[:1] == [name] else None
        default = not field.is_required() and value == field.get_default()
        if name == "kind" or not default or inside:
            tree[name] = _plain(value, inside or ())
    return tree


def _plain(value: Any, along: Sequence[str] = ()) -> Any:
    match value:
        case Strict():
            return to_tree(value, along)
        case (int() | float() as same,):  # a per-step value that never changes
            return same
        case tuple():
            return [
                _plain(item, along[1:] if along[:1] == [str(i)] else ())
                for i, item in enumerate(value)
            ]
        case _:
            return value


def parse_spec(tree: source.Tree) -> ModelSpec:
    """A tree without search leaves as a spec. Raises SpecError with every problem and its place."""
    if not isinstance(tree.value, Mapping):
        found = type(tree.value).__name__
        message = f"a spec is a mapping with name, dim, blocks, ...; got a {found}"
        raise SpecError(Problem("", message, tree.position(())))
    try:
        return ModelSpec.model_validate(tree.value)
    except ValidationError as error:
        raise SpecError(
            Problem(".".join(map(str, e["loc"])), e["msg"], tree.position(e["loc"]))
            for e in error.errors(include_url=False, include_context=False)
        ) from None
