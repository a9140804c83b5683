"""Retrofit: a trained model becomes one with loops.

With an `Overlay`, thinking steps are grafted onto layers, and the model stays what it was.

A layer f becomes the body of a loop (Chen et al. 2502.13842, with phi as there):

    Y(0) = phi(0) * f(X)                            phi(0) = 1: the layer as it was
    Y(t) = Y(t-1) + phi(t) * w(t) * f(Y(t-1))       phi(t) = 0: nothing, until phi is trained

Whether the graft changes nothing is decided by a rule on the overlay, and then measured on the
logits. With a `Recurrence` (McLeish et al. 2511.07384), the model becomes a prelude, a core that
loops, and a coda, and the logits do change.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.stack import StackSpec
from archdsl.errors import ArchdslError
from archdsl.interop.overlay import Overlay, Recurrence, parse_overlay
from archdsl.lang.source import from_value
from archdsl.lang.spec import BlockSpec, ModelSpec, parse_spec, to_tree
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block
from archdsl.nn.loop import Loop

__all__ = ["Overlay", "Retrofit", "RetrofitError", "compact", "graft", "parse_overlay", "retrofit"]

TOLERANCE = 1e-5  # of the largest logit
LONGEST_PERIOD = 16  # of layers that are written as a stack


class RetrofitError(ArchdslError):
    """An overlay that does not suit the model, or that would change what it says."""


@dataclass(frozen=True)
class Retrofit:
    """``layers``: those of the base that loop. ``removed``: those that are not there any more.
    ``new``: names of the parameters that the base has not. ``difference``: the largest of the
    logits', as a share of the largest logit."""

    model: LanguageModel
    layers: tuple[int, ...]
    removed: tuple[int, ...]
    new: tuple[str, ...]
    difference: float
    provenance: dict[str, Any]


def retrofit(base: Checkpoint, overlay: Overlay | Recurrence, *, seed: int = 0) -> Retrofit:
    """The model of ``base`` with loops; with an `Overlay`, it has the logits it had.

    ``seed``: of the new routers. Raises RetrofitError if a layer cannot be grafted onto, if there
    are too few, or if the logits change under an `Overlay`.
    """
    spec, layers = graft(base.spec, overlay)
    model = build(spec, seed=seed)
    copies = list(_copies(base.model, model, overlay, layers))
    new = tuple(_transplant(base.model, model, copies))
    kept = {id(old) for old, _ in copies}
    removed = tuple(i for i, old in enumerate(base.model.layers) if id(old) not in kept)
    difference = logit_difference(base.model, model)
    if isinstance(overlay, Overlay) and not difference <= TOLERANCE:
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
    } | ({"removed": list(removed)} if removed else {})
    data = {key: base.provenance[key] for key in ("data",) if key in base.provenance}
    provenance = data | {"seed": seed, "retrofit": record}
    return Retrofit(model, layers, removed, new, difference, provenance)


def graft(spec: ModelSpec, overlay: Overlay | Recurrence) -> tuple[ModelSpec, tuple[int, ...]]:
    """The grown spec, and which layers of the unrolled model loop. Raises RetrofitError."""
    blocks = [leaf for block in spec.blocks for leaf in block.unrolled()]
    of = f"{overlay.name}: layers of {spec.name}"
    update: dict[str, Any] = {"budget": None}
    if isinstance(overlay, Recurrence):
        blocks, layers = _around_a_core(blocks, overlay, of)
        update["training"] = overlay.training
    else:
        layers = overlay.chosen(len(blocks))
        _refuse_impossible(layers, blocks, of)
        for i in layers:
            blocks[i] = overlay.loop.model_copy(update={"body": blocks[i]})
    update["name"] = name = f"{spec.name[: 99 - len(overlay.name)]}-{overlay.name}"
    grown = spec.with_blocks(compact(blocks)).model_copy(update=update)
    # read back, as a body may not go together with the loop around it
    return parse_spec(from_value(to_tree(grown), name)), layers


def _around_a_core(
    blocks: Sequence[BlockSpec], overlay: Recurrence, of: str
) -> tuple[list[BlockSpec], tuple[int, ...]]:
    """Prelude, loop and coda, and which layers are the core."""
    count, end = len(blocks), len(blocks) - overlay.coda
    if overlay.size > count:
        raise RetrofitError(
            f"{of}: prelude, core and coda take {overlay.size} layers, and there are {count}"
        )
    core = range(end - overlay.core, end)
    inner = compact([blocks[i] for i in core])
    body = inner[0] if len(inner) == 1 else StackSpec(body=inner)
    loop = overlay.loop.model_copy(update={"body": body})
    return [*blocks[: overlay.prelude], loop, *blocks[end:]], tuple(core)


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


Copies = list[tuple[nn.Module, list[nn.Module]]]  # a layer of the base, and what it is copied to


def _copies(
    base: LanguageModel,
    model: LanguageModel,
    overlay: Overlay | Recurrence,
    layers: Sequence[int],
) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each layer of ``base`` that is kept, with the modules that get its weights."""
    if isinstance(overlay, Overlay):
        for i, (old, new) in enumerate(zip(base.layers, model.layers, strict=True)):
            yield old, list(new.bodies) if i in layers and isinstance(new, Loop) else [new]
        return
    first = overlay.prelude
    loop = model.layers[first]
    assert isinstance(loop, Loop)
    bodies = [list(cast(Block, body).unrolled()) for body in loop.bodies]
    yield from ((old, [new]) for old, new in zip(base.layers[:first], model.layers, strict=False))
    for n, i in enumerate(layers):
        yield base.layers[i], [body[n] for body in bodies]
    for old, new in zip(base.layers[layers[-1] + 1 :], model.layers[first + 1 :], strict=True):
        yield old, [new]


def _transplant(base: LanguageModel, model: LanguageModel, copies: Copies) -> Iterator[str]:
    """Copies every weight that is kept to its place; yields the names of what ``base`` has not."""
    kept: list[nn.Module] = []
    for part in ("embedding", "norm", "head"):
        kept.append(getattr(model, part))
        kept[-1].load_state_dict(getattr(base, part).state_dict())
    for old, news in copies:
        for new in news:
            new.load_state_dict(old.state_dict())
        kept.append(news[0])
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
