"""Specs: the description of a model as validated, immutable data.

This module needs no torch and does not know which blocks exist.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from archdsl.errors import Problem, SpecError, describe, did_you_mean
from archdsl.lang import registry, source
from archdsl.lang.strict import Number as Number
from archdsl.lang.strict import PerStep as PerStep
from archdsl.lang.strict import Size, Strict, validation_error
from archdsl.lang.training import DepthSpec, Looping, Structure, TrainingSpec

if TYPE_CHECKING:
    from archdsl.costs.activations import Footprint, Rows
    from archdsl.costs.bill import Bill
    from archdsl.nn.block import Block

Path = tuple[str | int, ...]

MAX_NODES = 10_000  # blocks that run in one forward pass, with every repeat and step counted


class Sizes(NamedTuple):
    """The sizes that a small proxy of a model changes."""

    dim: int
    context: int
    vocab_size: int
    head_size: int
    repeat: int  # copies of the body of a stack: the most, or those that an old number becomes


class Part(Strict):
    """A part of a spec: one ``kind`` of a family, such as the kind ``top_k`` of the family router.

    A subclass with a field ``kind`` is registered when it is defined.
    """

    family: ClassVar[str]
    example: ClassVar[Mapping[str, Any]] = {}  # a small valid spec, for the catalogue and tests
    # whether it reads the logits of the model after each pass: it must be in the last block
    reads_head: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        field = cls.model_fields.get("kind")
        if field is None:
            return  # the base class of a family
        registry.register(cls.family, field.default, cls)

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Yields (path, message) for values that do not fit together in a model of width ``dim``.

        The paths are relative to this part.
        """
        return iter(())

    def canonical(self, dim: int) -> Part | None:
        """Returns the one standard form of all specs that mean the same as this part.

        Returns None if the part has no effect.
        """
        return self.with_each(lambda part: part.canonical(dim))

    def resized(self, old: Sizes, new: Sizes) -> Part:
        """Returns a part of the same structure for a proxy with the sizes ``new``."""
        return self.with_each(lambda part: part.resized(old, new))

    def as_trained(self) -> Part | None:
        """The same as training runs it; None where it has no effect there."""
        return self.with_each(lambda part: part.as_trained())

    def with_copies(self) -> Part:
        """The same with every copy written out, so that each part is built as few modules."""
        return self.with_each(lambda part: part.with_copies())

    def at_depth(self, steps: int) -> Part:
        """Returns the part with ``steps`` passes in all loops, as the compute dial runs it."""
        return self.with_each(lambda part: part.at_depth(steps))

    def opened(self, share: float) -> Part:
        """Returns the part with the capacities of all routers moved by ``share`` towards 1."""
        return self.with_each(lambda part: part.opened(share))

    def with_each(self, change: Callable[[Part], Part | None]) -> Self:
        """Returns a copy in which ``change`` is applied to every part directly inside."""
        parts: dict[str, Any] = {}
        for name in type(self).model_fields:
            match getattr(self, name):
                case Part() as part:
                    parts[name] = change(part)
                case tuple() as several if several and isinstance(several[0], Part):
                    parts[name] = tuple(change(part) for part in several)
        return self.model_copy(update=parts)


class BlockSpec(Part):
    """The base of the specs of blocks. A block maps a stream [B, T, D] to one of the same shape."""

    family: ClassVar[str] = "block"
    # whether its cost, footprint and module add the low-rank differences of a loop around it: by
    # Bill.linear, Rows.rank and Context.linear, or because it has no matrices of its own
    adaptable: ClassVar[bool] = False

    def build(self, dim: int) -> Block:
        """Builds the module of this block for a stream of width ``dim``."""
        raise NotImplementedError

    def cost(self, bill: Bill) -> None:
        """Adds the parameters, matrix products and cache of this block to the bill."""
        raise NotImplementedError

    def footprint(self, rows: Rows) -> Footprint:
        """Returns the memory in bytes that a training step needs for this block on ``rows``."""
        raise NotImplementedError

    def unrolled(self) -> tuple[BlockSpec, ...]:
        """The blocks that run one after the other for this one; itself unless it is a stack."""
        return (self,)

    def looping(self, path: Path) -> Looping | None:
        """What a rule of training needs to know of a block that the compute dial gives more or
        fewer passes; None for any other block. ``path``: the place of this block."""
        return None

    @property
    def built_in_place(self) -> str | None:
        """The field whose block is built in place of this one; None: this one has its own module.

        A loop of one pass, for example, is built as its body.
        """
        return None

    @property
    def nodes(self) -> int:
        """The number of blocks that run in one pass; at most as many modules are built."""
        return 1 + sum(p.nodes for _, p in children(self) if isinstance(p, BlockSpec))


def slot(family: str, default: str | None = None) -> Any:
    """Annotates a field that takes any kind of ``family``.

    A single word is short for a mapping with that ``kind``. ``default`` is the kind of a mapping
    that names none.
    """

    def by_kind(value: Any) -> Any:
        if value is None or isinstance(value, Part):
            return value  # whether a slot may be empty depends on the type of the field
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
            raise validation_error([(("kind",) if "kind" in value else (), message)])
        return known[kind].model_validate(value)

    return BeforeValidator(by_kind, json_schema_input_type=Any)


AnyBlock = Annotated[
    SerializeAsAny[BlockSpec], slot("block"), WithJsonSchema({"x-family": "block"})
]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def at_step(values: tuple[float, ...], step: int) -> float:
    """Returns the value of a `PerStep` field at the routed step ``step``, counted from 0."""
    return values[0] if len(values) == 1 else values[step]


Blocks = Annotated[tuple[AnyBlock, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _limit(description: str) -> Any:
    return Field(None, ge=1, description=description)


class Budget(Strict):
    """Hard limits for the full-size model. A fit value is solved so that all limits are met."""

    params: Size | None = _limit("parameters")
    non_embedding: Size | None = _limit("parameters without embedding and head")
    flops: Size | None = _limit("expected forward FLOPs per token at the context")
    kv: Size | None = _limit("bytes of KV cache per token, in bfloat16")
    train_flops: Size | None = _limit(
        "FLOPs that all workers of a search together may spend on training"
    )

    @property
    def of_model(self) -> dict[str, int]:
        """The limits for a model by name, without ``train_flops``, the limit of a search."""
        return self.model_dump(exclude_none=True, exclude={"train_flops"})

    def with_limits(self, given: Budget | None) -> Budget:
        """Returns this budget with each limit that ``given`` sets replaced.

        A limit that ``given`` sets to None is removed; a limit that it does not set stays.
        """
        update = given.model_dump(exclude_unset=True) if given else {}
        return self.model_copy(update=update)


class ModelSpec(Strict):
    """The spec of a language model: embedding, blocks, final norm and head."""

    name: str = Field(
        min_length=1, max_length=100, pattern=r"^[\w.+-]+$", description="name of the model"
    )
    description: str = Field("", max_length=2000, description="what the model is, in free text")
    vocab_size: Size = Field(ge=2, le=2**22, description="rows of the embedding")
    context: Size = Field(ge=1, le=2**20, description="length of the longest sequence in tokens")
    dim: Size = Field(ge=1, le=2**16, description="width of the residual stream")
    tie_embeddings: bool = Field(False, description="the head shares the embedding's matrix")
    norm: Literal["rms", "layer"] = Field("rms", description="the norm before the head")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="added to the variance in that norm")
    final_norm: bool = Field(
        True,
        exclude_if=lambda final_norm: final_norm,  # the hash of specs without it stays
        description="false: no norm before the head, where the last block ends with one of its own",
    )
    blocks: Blocks = Field(description="the blocks, which run one after the other")
    budget: Budget | None = Field(None, description="limits that `fit` and `search` must meet")
    training: TrainingSpec | None = Field(
        None,
        exclude_if=lambda training: training is None,  # the hash of specs without it stays
        description="how the model is trained, where that makes it what it is",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        total = sum(block.nodes for block in self.blocks)
        if total > MAX_NODES:
            found = f"{min(total, 10**18):,} with every repeat and step counted"
            raise validation_error(
                [(("blocks",), f"must run at most {MAX_NODES:,} blocks, got {found}")]
            )
        problems = [
            (path + inner, message)
            for path, part in walk(self)
            for inner, message in (*part.conflicts(self.dim), *self._misplaced(path, part))
        ]
        problems += self._training_problems()
        if problems:
            raise validation_error(problems)
        return self

    def _misplaced(self, path: Path, part: Part) -> Iterator[tuple[Path, str]]:
        """A part that reads the head and is not directly in the last block."""
        last = len(self.blocks) - 1
        if part.reads_head and path[:-1] != ("blocks", last):
            kind = type(part).model_fields["kind"].default
            yield (
                (),
                f"{kind} reads the logits of the model after each pass, so its loop must be the "
                f"last block, blocks.{last}",
            )

    def _training_problems(self) -> list[tuple[Path, str]]:
        if self.training is None:
            return []
        found = [
            (("training", *path), said) for path, said in self.training.problems(self.structure)
        ]
        deepest = 0 if found else max(self.training_depths, default=0)
        total = sum(block.nodes for block in self.at_depth(deepest).blocks) if deepest else 0
        if total > MAX_NODES:
            said = (
                f"draws up to {deepest} passes, which run {min(total, 10**18):,} blocks; at most "
            )
            found = [(("training", "depth"), f"{said}{MAX_NODES:,} may run")]
        return found

    @property
    def loops(self) -> list[Looping]:
        """The loops whose number of passes the compute dial changes."""
        parts = ((path, part) for path, part in walk(self) if isinstance(part, BlockSpec))
        return [loop for path, part in parts if (loop := part.looping(path))]

    @property
    def structure(self) -> Structure:
        """What a rule of training needs to know of the blocks."""
        last = self.blocks[-1].unrolled()[-1]
        return Structure(self.loops, len(self.blocks) - 1, last.looping(()) is not None)

    @property
    def depth_law(self) -> DepthSpec | None:
        """How training draws the number of passes of all loops; None: as many as in use."""
        return self.training.depth if self.training else None

    @property
    def training_depths(self) -> tuple[int, ...]:
        """The numbers of passes that training draws from, equally likely; none: as in use."""
        law = self.depth_law
        return law.sizes(self.loops[0].steps) if law else ()

    def opened(self, share: float) -> ModelSpec:
        """Returns the spec with the capacities of all routers moved by ``share`` towards 1, and
        without a schedule of capacities."""
        if self.training is None or self.training.capacity is None:
            return self
        blocks = tuple(cast(BlockSpec, block.opened(share)) for block in self.blocks)
        training = self.training.model_copy(update={"capacity": None})
        return self.model_copy(update={"blocks": blocks, "training": training})

    def training_losses(self, depth: int | None) -> int:
        """How often the last norm and the head run in training. ``depth``: of the loops; None:
        their own."""
        last = self.blocks[-1].unrolled()[-1].looping(())
        every = self.training is not None and self.training.loss == "every_step"
        if last is None or not (every or last.expects):
            return 1
        steps, law = depth or last.steps, self.depth_law
        return min(steps, law.backprop_last or steps) if law else steps

    def as_trained(self) -> ModelSpec:
        """Returns the spec as training runs it, where no token stops looping."""
        blocks = tuple(cast(BlockSpec, block.as_trained()) for block in self.blocks)
        return self.model_copy(update={"blocks": blocks})

    def at_depth(self, steps: int) -> ModelSpec:
        """Returns the spec with ``steps`` passes in all loops, as the compute dial runs it."""
        blocks = tuple(cast(BlockSpec, block.at_depth(steps)) for block in self.blocks)
        return self.model_copy(update={"blocks": blocks, "training": None})

    def with_blocks(self, blocks: Sequence[BlockSpec]) -> ModelSpec:
        """Returns the spec with other blocks, and of its training what still goes with them."""
        spec = self.model_copy(update={"blocks": tuple(blocks)})
        if self.training is None:
            return spec
        training = self.training.without_problems(spec.structure)
        return spec.model_copy(update={"training": training})

    def with_copies(self) -> ModelSpec:
        """The same with every copy of a block written out."""
        blocks = tuple(cast(BlockSpec, block.with_copies()) for block in self.blocks)
        return self.model_copy(update={"blocks": blocks})

    def canonical(self) -> ModelSpec:
        """Returns the standard form of all specs of the same model.

        Sizes are resolved, stacks are unrolled and parts without effect are removed. Name,
        description and budget are reset.
        """
        blocks = tuple(
            unrolled
            for block in self.blocks
            for unrolled in cast(BlockSpec, block.canonical(self.dim)).unrolled()
        )
        update = {"blocks": blocks, "name": "model", "description": "", "budget": None}
        if not self.final_norm:
            update |= {name: type(self).model_fields[name].default for name in ("norm", "norm_eps")}
        spec = self.model_copy(update=update)
        if self.training is None:
            return spec
        return spec.model_copy(update={"training": self.training.canonical(spec.structure)})

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the canonical form, as 64 hex digits.

        It is equal for specs of the same model, also if their names differ.
        """
        data = self.canonical().model_dump(mode="json")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def resized(self, new: Sizes, of_repeat: int | None = None) -> ModelSpec:
        """Returns a spec of the same structure with other sizes, such as a small proxy.

        A stack has at most ``new.repeat`` copies of its body. With ``of_repeat``, so many copies
        become ``new.repeat``, and others are in proportion. Raises SpecError if the result is not
        valid.
        """
        old = Sizes(self.dim, self.context, self.vocab_size, new.head_size, of_repeat or 0)
        sizes = {"dim": new.dim, "context": new.context, "vocab_size": new.vocab_size}
        blocks = tuple(block.resized(old, new) for block in self.blocks)
        resized = self.model_copy(update={**sizes, "blocks": blocks, "budget": None})
        return parse_spec(source.from_value(to_tree(resized), f"proxy of {self.name}"))

    def to_yaml(self) -> str:
        """Returns YAML text that is read back as an equal spec. Values at their default are left
        out."""
        return source.dump(to_tree(self))

    def _repr_html_(self) -> str:
        """Returns the YAML text as an HTML element, for notebooks."""
        return f"<pre>{html.escape(self.to_yaml())}</pre>"

    def patch(self, path: str, value: Any) -> ModelSpec:
        """Returns a copy with the value at a dotted path replaced.

        Raises SpecError if there is no such path or the result is not valid.

        >>> import archdsl
        >>> archdsl.load("tiny").patch("dim", 128).dim
        128
        """
        tree = source.from_value(to_tree(self, path.split(".")), self.name)
        return parse_spec(source.override(tree, [f"{path}={source.dump_inline(value)}"]))


def children(part: Strict) -> Iterator[tuple[Path, Part]]:
    """Yields the path and the part for each part directly inside."""
    for name in type(part).model_fields:
        match getattr(part, name):
            case Part() as child:
                yield (name,), child
            case tuple() as several:
                yield from (
                    ((name, i), child) for i, child in enumerate(several) if isinstance(child, Part)
                )


def walk(part: Strict) -> Iterator[tuple[Path, Part]]:
    """Yields the path and the part for every part below, each part before those inside it."""
    for path, child in children(part):
        yield path, child
        yield from ((path + inner, below) for inner, below in walk(child))


def to_tree(part: Strict, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Converts a part to plain data, with ``kind`` first and without values at their default.

    ``keep``: a path whose fields are included even if they are at their default.
    """
    tree: dict[str, Any] = {}
    for name, field in sorted(type(part).model_fields.items(), key=lambda item: item[0] != "kind"):
        value, inside = getattr(part, name), keep[1:] if keep[:1] == [name] else None
        default = not field.is_required() and value == field.get_default()
        if name == "kind" or not default or inside:
            tree[name] = _plain(value, inside or ())
    return tree


def _plain(value: Any, keep: Sequence[str] = ()) -> Any:
    match value:
        case Strict():
            return to_tree(value, keep)
        case (int() | float() as same,):  # a per-step value that never changes
            return same
        case tuple():
            return [
                _plain(item, keep[1:] if keep[:1] == [str(i)] else ())
                for i, item in enumerate(value)
            ]
        case _:
            return value


def parse_spec(tree: source.Tree) -> ModelSpec:
    """Validates a tree without open values and returns the spec.

    Raises SpecError with every problem and its position.
    """
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
