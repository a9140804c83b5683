"""Overlays: what `archdsl retrofit` makes of a trained model, as data.

`Overlay` turns layers into loops that do nothing new at first. `Recurrence` turns the model into a
prelude, a core that loops, and a coda.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from archdsl.blocks.loop import LAYER, LoopSpec
from archdsl.blocks.residual_thinking import DeltaSpec, GatedSpec, ThinkingSpec
from archdsl.blocks.step_encoding import ScaleSpec
from archdsl.errors import Problem, SpecError, describe
from archdsl.lang.source import Path, Tree, dotted
from archdsl.lang.spec import to_tree, walk
from archdsl.lang.strict import Strict
from archdsl.lang.training import TrainingSpec


class Every(Strict):
    """Layers at even distances."""

    every: int = Field(ge=1, description="one layer out of so many")
    first: int = Field(0, ge=0, description="the first of them, counted from 0")


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _branch(value: Any) -> str:
    return "list" if isinstance(value, tuple) else "every"


Layers = Annotated[
    Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Tag("list")]
    | Annotated[Every, Tag("every")],
    Discriminator(_branch),
]


def _with_body(value: Any) -> Any:
    return value | {"body": LAYER} if isinstance(value, dict) else value


class _Retrofitted(Strict):
    """What both have in common. The body of ``loop`` stands for what it is put around."""

    name: str = Field(
        min_length=1, max_length=40, pattern=r"^[\w.+-]+$", description="ends the model's new name"
    )
    loop: Annotated[LoopSpec, BeforeValidator(_with_body)] = Field(
        description="the loop around a layer, or around the core"
    )

    def to_tree(self) -> dict[str, Any]:
        """As it is written, without the body that it has not."""
        tree = to_tree(self)
        del tree["loop"]["body"]
        return tree


class Overlay(_Retrofitted):
    """Layers that become the bodies of loops, each of which is the layer as it was at first."""

    layers: Annotated[Layers, BeforeValidator(_listed)] = Field(
        description="{every: 2, first: 1}, or a list of layers counted from 0"
    )

    def chosen(self, count: int) -> tuple[int, ...]:
        """Those of ``count`` layers that think from now on, in order."""
        if isinstance(self.layers, Every):
            return tuple(range(self.layers.first, count, self.layers.every))
        return tuple(sorted(set(self.layers)))


class Recurrence(_Retrofitted):
    """A prelude of first layers, a loop around core layers, and a coda of last layers.

    McLeish et al. 2511.07384: the core are the layers before the coda, and the layers between
    prelude and core are removed. The model is another one afterwards, which training must heal.
    """

    prelude: int = Field(ge=0, description="how many first layers run once, before the loop")
    core: int = Field(ge=1, description="how many layers before the coda run in the loop")
    coda: int = Field(ge=0, description="how many last layers run once, after the loop")
    training: TrainingSpec | None = Field(
        None, description="how the new model is trained, as in a spec"
    )

    @property
    def size(self) -> int:
        """The number of layers that it keeps."""
        return self.prelude + self.core + self.coda


def parse_overlay(tree: Tree) -> Overlay | Recurrence:
    """Raises SpecError with every problem and its place; also if loops that should do nothing new
    at first would change logits."""
    if not isinstance(tree.value, Mapping):
        message = (
            "an overlay is a mapping of name, layers and loop, or of name, prelude, core, coda and "
            f"loop; got {describe(tree.value)}"
        )
        raise SpecError(Problem("", message, tree.position(())))
    kind = Recurrence if {"prelude", "core", "coda"} & tree.value.keys() else Overlay
    overlay: Overlay | Recurrence
    try:
        overlay = kind.model_validate(tree.value)
        problems = list(_conflicts(overlay))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = [(_without_branch(one["loc"]), one["msg"]) for one in found]
    loop = tree.value.get("loop")
    if isinstance(loop, Mapping) and "body" in loop:
        problems.append((("loop", "body"), "must be left out: layers of the model become it"))
    if problems:
        raise SpecError(Problem(dotted(path), why, tree.position(path)) for path, why in problems)
    return overlay


def _without_branch(path: Path) -> Path:
    return path[:1] + path[2:] if path[0] == "layers" else path


def _conflicts(overlay: Overlay | Recurrence) -> Iterator[tuple[Path, str]]:
    loop = overlay.loop
    if isinstance(overlay, Overlay):
        yield from ((("loop", *path), why) for path, why in _changes(loop))
    elif loop.is_body:
        yield (
            ("loop", "steps"),
            f"must be at least 2: one pass is the core as it was; got {loop.steps}",
        )
    for path, part in [((), loop), *walk(loop)]:
        if path[:1] != ("body",):
            yield from ((("loop", *path, *inner), why) for inner, why in part.conflicts(dim=1))


def _changes(loop: LoopSpec) -> Iterator[tuple[Path, str]]:
    """What keeps the loop from being the same function as its body."""
    if loop.steps < 2:
        yield ("steps",), f"must be at least 2: one pass adds nothing; got {loop.steps}"
    if loop.full_steps < 1:
        yield ("full_steps",), "must be at least 1: the first pass is the layer as it was; got 0"
    if not isinstance(loop.residual, ThinkingSpec | DeltaSpec | GatedSpec):
        found = to_tree(loop.residual)["kind"]
        yield (
            ("residual",),
            f"must be thinking, delta or gated, which add to what there is; got {found}",
        )
    if loop.first_injects:
        yield (
            ("start",),
            f"must be left out: the first pass reads what the layer read; got {loop.start}",
        )
    if loop.norm is not None:
        yield ("norm",), f"must be left out: the layer has none after it; got {loop.norm}"
    encoding = loop.encoding
    if not isinstance(encoding, ScaleSpec):
        found = to_tree(encoding)["kind"] if encoding else "none"
        yield (
            ("encoding",),
            f"must be {{kind: scale, init: 0}}: phi silences the steps; got {found}",
        )
        return
    if encoding.first != 1:
        yield ("encoding", "first"), f"must be 1: the layer as it was; got {encoding.first:g}"
    if encoding.init != 0:
        found = "the default" if encoding.init is None else f"{encoding.init:g}"
        yield ("encoding", "init"), f"must be 0: further steps are silent at first; got {found}"
