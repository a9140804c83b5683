"""Retrofit: thinking steps grafted onto layers of a trained model, which stays what it was.

A layer f becomes the body of a loop (Chen et al. 2502.13842, with phi as there):

    Y(0) = phi(0) * f(X)                            phi(0) = 1: the layer as it was
    Y(t) = Y(t-1) + phi(t) * w(t) * f(Y(t-1))       phi(t) = 0: nothing, until phi is trained

An overlay says which layers and what loop. Whether the graft changes nothing is decided by a rule
on the overlay, and then measured on the logits.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError
from torch import nn

from archdsl.blocks.loop import LAYER, LoopSpec
from archdsl.blocks.residual_thinking import DeltaSpec, GatedSpec, ThinkingSpec
from archdsl.blocks.stack import StackSpec
from archdsl.blocks.step_encoding import ScaleSpec
from archdsl.errors import ArchdslError, Problem, SpecError, describe
from archdsl.lang.source import Path, Tree, dotted, from_value
from archdsl.lang.spec import BlockSpec, ModelSpec, parse_spec, to_tree, walk
from archdsl.lang.strict import Strict
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.nn.loop import Loop

TOLERANCE = 1e-5  # of the largest logit
LONGEST_PERIOD = 16  # of layers that are written as a stack


class RetrofitError(ArchdslError):
    """An overlay that does not suit the model, or that would change what it says."""


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


class Overlay(Strict):
    """What is grafted, and where. The body of ``loop`` stands for the layer that it replaces."""

    name: str = Field(
        min_length=1, max_length=40, pattern=r"^[\w.+-]+$", description="ends the model's new name"
    )
    layers: Annotated[Layers, BeforeValidator(_listed)] = Field(
        description="{every: 2, first: 1}, or a list of layers counted from 0"
    )
    loop: Annotated[LoopSpec, BeforeValidator(_with_body)] = Field(
        description="what a layer becomes the body of"
    )

    def chosen(self, count: int) -> tuple[int, ...]:
        """Those of ``count`` layers that think from now on, in order."""
        if isinstance(self.layers, Every):
            return tuple(range(self.layers.first, count, self.layers.every))
        return tuple(sorted(set(self.layers)))

    def to_tree(self) -> dict[str, Any]:
        """As it is written, without the body that it has not."""
        tree = to_tree(self)
        del tree["loop"]["body"]
        return tree


def parse_overlay(tree: Tree) -> Overlay:
    """Raises SpecError with every problem and its place; also if the graft would change logits."""
    if not isinstance(tree.value, Mapping):
        message = f"an overlay is a mapping of name, layers and loop; got {describe(tree.value)}"
        raise SpecError(Problem("", message, tree.position(())))
    try:
        overlay = Overlay.model_validate(tree.value)
        problems = list(_conflicts(overlay.loop))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = [(_without_branch(one["loc"]), one["msg"]) for one in found]
    loop = tree.value.get("loop")
    if isinstance(loop, Mapping) and "body" in loop:
        problems.append((("loop", "body"), "must be left out: the layer of the model becomes it"))
    if problems:
        raise SpecError(Problem(dotted(path), why, tree.position(path)) for path, why in problems)
    return overlay


def _without_branch(path: Path) -> Path:
    return path[:1] + path[2:] if path[0] == "layers" else path


def _conflicts(loop: LoopSpec) -> Iterator[tuple[Path, str]]:
    for path, why in _changes(loop):
        yield ("loop", *path), why
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


@dataclass(frozen=True)
class Retrofit:
    """``new``: names of the parameters that the base has not. ``difference``: the largest of the
    logits', as a share of the largest logit."""

    model: LanguageModel
    layers: tuple[int, ...]
    new: tuple[str, ...]
    difference: float
    provenance: dict[str, Any]


def retrofit(base: Checkpoint, overlay: Overlay, *, seed: int = 0) -> Retrofit:
    """The model of ``base`` with thinking steps, and the logits it had.

    ``seed``: of the new routers. Raises RetrofitError if a layer cannot be grafted onto, or if the
    logits do change.
    """
    spec, layers = graft(base.spec, overlay)
    model = build(spec, seed=seed)
    new = tuple(_transplant(base.model, model, layers))
    difference = logit_difference(base.model, model)
    if not difference <= TOLERANCE:
        raise RetrofitError(
            f"{overlay.name}: the logits of {base.spec.name} would change by {difference:.1e} of "
            f"the largest, and {TOLERANCE:.0e} is allowed"
        )
    record = {
        "base": {"name": base.spec.name} | base.provenance,
        "overlay": overlay.to_tree(),
        "layers": list(layers),
        "difference": difference,
        "new": list(new),
    }
    kept = {key: base.provenance[key] for key in ("data",) if key in base.provenance}
    return Retrofit(model, layers, new, difference, kept | {"seed": seed, "retrofit": record})


def graft(spec: ModelSpec, overlay: Overlay) -> tuple[ModelSpec, tuple[int, ...]]:
    """The grown spec, and which layers of the unrolled model think. Raises RetrofitError."""
    blocks = [leaf for block in spec.blocks for leaf in block.unrolled()]
    layers = overlay.chosen(len(blocks))
    _refuse_impossible(layers, blocks, f"{overlay.name}: layers of {spec.name}")
    for i in layers:
        blocks[i] = overlay.loop.model_copy(update={"body": blocks[i]})
    name = f"{spec.name[: 99 - len(overlay.name)]}-{overlay.name}"
    grown = spec.with_blocks(compact(blocks)).model_copy(update={"name": name, "budget": None})
    # read back, as a body may not go together with the loop around it
    return parse_spec(from_value(to_tree(grown), name)), layers


def _refuse_impossible(layers: Sequence[int], blocks: Sequence[BlockSpec], of: str) -> None:
    if not layers or layers[-1] >= len(blocks):
        found = f"no {layers[-1]}" if layers else "none that far"
        raise RetrofitError(f"{of}: there is {found}; they are 0 to {len(blocks) - 1}")
    thinking = [str(i) for i in layers if isinstance(blocks[i], LoopSpec)]
    if thinking:
        raise RetrofitError(f"{of}: {', '.join(thinking)} loop already; choose others")


def compact(blocks: Sequence[BlockSpec]) -> tuple[BlockSpec, ...]:
    """The same series of blocks, repetitions written as stacks.

    >>> from archdsl.blocks.layer import LayerSpec
    >>> [stack.repeat for stack in compact([LayerSpec()] * 12)]
    [12]
    """
    found: list[BlockSpec] = []
    at = 0
    while at < len(blocks):
        periods = range(1, min(LONGEST_PERIOD, (len(blocks) - at) // 2) + 1)
        runs = [(period, _repeats(blocks, at, period)) for period in periods]
        # the run that covers most, written the shortest way
        period, repeat = max(
            [(period, repeat) for period, repeat in runs if repeat > 1],
            default=(1, 1),
            key=lambda run: (run[0] * run[1], run[1]),
        )
        body = tuple(blocks[at : at + period])
        found += [StackSpec(repeat=repeat, body=body)] if repeat > 1 else body
        at += period * repeat
    return tuple(found)


def _repeats(blocks: Sequence[BlockSpec], at: int, period: int) -> int:
    """How many times the ``period`` blocks at ``at`` stand there in a row."""
    end = at + period
    while end < len(blocks) and blocks[end] == blocks[end - period]:
        end += 1
    return (end - at) // period


def _transplant(base: LanguageModel, model: LanguageModel, layers: Sequence[int]) -> Iterator[str]:
    """Copies every weight of ``base`` to its place; yields the names of what ``base`` has not."""
    kept: list[nn.Module] = []
    for part in ("embedding", "norm", "head"):
        kept.append(getattr(model, part))
        kept[-1].load_state_dict(getattr(base, part).state_dict())
    for i, (old, new) in enumerate(zip(base.layers, model.layers, strict=True)):
        bodies = list(new.bodies) if i in layers and isinstance(new, Loop) else [new]
        for body in bodies:
            body.load_state_dict(old.state_dict())
        kept.append(bodies[0])
    known = {id(weight) for module in kept for weight in module.parameters()}
    yield from (name for name, weight in model.named_parameters() if id(weight) not in known)


@torch.inference_mode()
def logit_difference(left: LanguageModel, right: LanguageModel) -> float:
    """The largest difference of two models' logits, as a share of the left one's largest logit."""
    rng = torch.Generator().manual_seed(0)
    size = (2, min(left.spec.context, 256))
    tokens_BT = torch.randint(left.spec.vocab_size, size, generator=rng)
    one_BTV, other_BTV = left.eval()(tokens_BT), right.eval()(tokens_BT)
    return float((one_BTV - other_BTV).abs().max() / one_BTV.abs().max())
