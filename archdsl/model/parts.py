"""One walk through a spec and the modules that it was built as, through every slot of every kind.

What a loop ran, which block fails a check, what a copied weight belongs to: whoever needs the
modules beside their specs asks `walk`. A block says with `built_as` what it built its parts as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from torch import nn

from archdsl.lang.spec import BlockSpec, Part, Path
from archdsl.lang.strict import Strict
from archdsl.nn.block import Primitive
from archdsl.nn.loop import Loop

if TYPE_CHECKING:
    from archdsl.model.language_model import LanguageModel

S = TypeVar("S", bound=Strict)


class Built(NamedTuple):
    """A part of a spec, and a module that it was built as. ``path``: its place in the spec."""

    path: Path
    spec: Part
    module: Primitive


def walk(spec: Strict, module: Primitive, path: Path = ()) -> Iterator[Built]:
    """Every part below ``spec`` with each module below ``module`` that it was built as.

    A part comes before those inside it. Copies have the same path, and come in the order in which
    they are built. Of a block that is built in place of another one only the former is met (see
    `BlockSpec.built_in_place`). Raises TypeError where a block does not say what it built a
    block inside it as.
    """
    for field, parts, several in _slots(spec):
        modules = module.built_as(field)
        if len(modules) % len(parts) or (isinstance(parts[0], BlockSpec) and not modules):
            raise TypeError(
                f"{type(module).__name__}.built_as({field!r}) must return the modules that were "
                f"built from {type(spec).__name__}.{field}: a multiple of {len(parts)}, "
                f"got {len(modules)}"
            )
        for i, built in enumerate(modules):
            at = i % len(parts)
            place = (*path, field, at) if several else (*path, field)
            yield from _below(place, parts[at], built)


def _below(path: Path, spec: Part, module: nn.Module) -> Iterator[Built]:
    while isinstance(spec, BlockSpec) and (field := spec.built_in_place):
        path, spec = (*path, field), cast(BlockSpec, getattr(spec, field))
    if not isinstance(module, Primitive):
        raise TypeError(f"{type(module).__name__} was built from a spec, so it must be a Primitive")
    yield Built(path, spec, module)
    yield from walk(spec, module, path)


def _slots(spec: Strict) -> Iterator[tuple[str, tuple[Part, ...], bool]]:
    """Each field that holds parts, with the parts and whether it is a list of them."""
    for field in type(spec).model_fields:
        match getattr(spec, field):
            case Part() as part:
                yield field, (part,), False
            case tuple() as several if several and isinstance(several[0], Part):
                yield field, several, True


def changed(spec: S, change: Callable[[Path, Part], Part], path: Path = ()) -> S:
    """A copy in which every part below ``spec`` is changed, given its path; inner ones first."""
    update: dict[str, Part | tuple[Part, ...]] = {}
    for field, parts, several in _slots(spec):
        places = [(*path, field, i) if several else (*path, field) for i in range(len(parts))]
        new = tuple(
            change(place, changed(part, change, place))
            for place, part in zip(places, parts, strict=True)
        )
        update[field] = new if several else new[0]
    return spec.model_copy(update=update)


def loops_by_path(spec: Strict, model: LanguageModel) -> dict[Path, list[Loop]]:
    """The loops of a model that its passes run, by their place in the spec, copies together."""
    running = set(running_loops(model))
    found: dict[Path, list[Loop]] = {}
    for path, _, module in walk(spec, model):
        if isinstance(module, Loop) and module in running:
            found.setdefault(path, []).append(module)
    return found


def running_loops(model: LanguageModel) -> list[Loop]:
    """The loops that a pass runs, in their order.

    Where the passes of a loop have a body each, loops in the bodies of passes that were dialled
    away do not run.
    """
    idle = {
        inner
        for loop in model.loops
        for body in list(loop.bodies)[len(loop.passes) :]
        for inner in body.modules()
    }
    return [loop for loop in model.loops if loop not in idle]


def seed_names(model: LanguageModel) -> Iterator[tuple[str, Primitive]]:
    """Every primitive with the name that its random numbers are drawn for.

    That is the kind of the part that it was built from, as ``FeedForward`` for ``feed_forward``.
    A module inside it that is no part has the name of its attribute besides, as ``Mixer.filter``.
    """
    kinds = {module: _capitalised(spec) for _, spec, module in walk(model.spec, model)}
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        above, _, attribute = path.rpartition(".")
        inside = f"{names[above]}.{attribute}" if path else "LanguageModel"
        names[path] = kinds.get(module, inside) if isinstance(module, Primitive) else inside
        if isinstance(module, Primitive):
            yield names[path], module


def _capitalised(spec: Part) -> str:
    kind = str(type(spec).model_fields["kind"].default)
    return "".join(word.capitalize() for word in kind.split("_"))
