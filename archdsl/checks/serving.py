"""Whether a model can be served by engines with paged attention, and what stands in the way.

Such engines compute the attention of all requests in one call, by their own kernels and caches.
What they ask of a model is in docs/how-to/export.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from archdsl.blocks.attention import AttentionSpec
from archdsl.lang.spec import ModelSpec, Part, Path
from archdsl.model.build import meta_model
from archdsl.model.parts import walk
from archdsl.nn.block import Block
from archdsl.nn.loop import Loop

if TYPE_CHECKING:
    from archdsl.blocks.loop import LoopSpec


@dataclass(frozen=True)
class Obstacle:
    """A part of a spec that engines cannot run. ``path``: its place. ``change``: the override of
    the spec (``--set``) that removes the obstacle; None where no change of a value does."""

    path: str
    why: str
    change: str | None


def obstacles(spec: ModelSpec) -> list[Obstacle]:
    """What stands in the way of serving a model of ``spec``, in the order of the spec."""
    found: dict[Path, Obstacle] = {}
    attentions: list[tuple[Path, AttentionSpec]] = []
    for path, part, module in walk(spec, meta_model(spec)):
        if path in found:
            continue
        if isinstance(part, AttentionSpec):
            attentions.append((path, part))
        elif isinstance(module, Loop):
            found.update(_of_loop(path, part, module))
        elif isinstance(module, Block) and not module.hosted:
            found[path] = _obstacle(
                path, f"{type(part).__name__} computes with a state of its own", None
            )
    return [*found.values(), *_unlike(spec, attentions)]


def _of_loop(path: Path, part: Part, loop: Loop) -> Iterator[tuple[Path, Obstacle]]:
    fields = type(part).model_fields
    if loop.router is not None and "router" in fields and cast("LoopSpec", part).router is not None:
        why = "paged attention has no place for a step that only some tokens take"
        yield path, _obstacle((*path, "router"), why, "null")
    if "exit" in fields and not loop.hosted:
        why = "paged attention has no place for a pass that only some tokens take"
        yield (*path, "exit"), _obstacle((*path, "exit"), why, "null")
    if "kv" in fields and cast("LoopSpec", part).kv == "all":
        why = "engines let a pass attend to one cache, not to those of all passes before"
        yield (*path, "kv"), _obstacle((*path, "kv"), why, "own")


def _unlike(spec: ModelSpec, attentions: list[tuple[Path, AttentionSpec]]) -> list[Obstacle]:
    """The attentions whose heads or windows are not those of the first."""
    found: dict[Path, Obstacle] = {}
    windows = [one.window for _, one in attentions if one.window is not None]
    for path, one in attentions:
        if path in found:
            continue
        if one.window is not None and (one.window == 1 or one.window != windows[0]):
            why = "caches of engines know windows of one size, and none of one token"
            usual = next((window for window in windows if window > 1), None)
            value = "null" if usual is None else str(usual)
            found[path] = _obstacle((*path, "window"), why, value)
        elif _heads(one, spec.dim) != _heads(attentions[0][1], spec.dim):
            why = "engines ask for the same heads, key/value heads and head size in all layers"
            found[path] = _obstacle(path, why, None)
    return list(found.values())


def _heads(one: AttentionSpec, dim: int) -> tuple[int, int, int]:
    return one.head_count(dim), one.queries_per_kv, one.head_size


def _obstacle(path: Path, why: str, value: str | None) -> Obstacle:
    place = ".".join(map(str, path))
    return Obstacle(place, why, None if value is None else f"{place}={value}")
