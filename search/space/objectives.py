"""The objectives that a search minimizes: the loss, and costs of the full-size model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from archdsl.costs.receipt import cost
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.executed_flops import with_measured
from archdsl.model.language_model import LanguageModel
from archdsl.model.parts import loops_by_path
from archdsl.nn.loop import Loop

LOSS = "loss"
FLOPS = "flops"

# Each cost has a function of the spec and a description. The capacities in the spec are the
# fractions of tokens that the routers were measured to select.
COSTS: dict[str, tuple[Callable[[ModelSpec], float], str]] = {
    FLOPS: (lambda spec: cost(spec).expected, "forward FLOPs per token, as executed"),
    "params": (lambda spec: cost(spec).params, "parameters"),
    "kv": (lambda spec: cost(spec).kv_bytes_per_token, "bytes of KV cache per token"),
    "heaviest": (lambda spec: cost(spec).heaviest, "FLOPs of a token that every router selects"),
}


class AxisError(ArchdslError):
    """The text of ``--objective`` is not understood."""

    exit_status = 2


def parse_axes(text: str) -> tuple[str, ...]:
    """Return the names of the objectives in a text such as ``loss`` or ``loss,flops,kv``.

    Raises AxisError if the loss is not the first name, or if a name is unknown or occurs twice.
    """
    axes = tuple(part.strip() for part in text.split(","))
    wrong = [axis for axis in axes[1:] if axis not in COSTS]
    if axes[0] != LOSS or wrong or len(set(axes)) < len(axes):
        raise AxisError(
            f"objective: {text}: write loss for one figure, or loss and what it is weighed "
            f"against, each once: loss,flops; there are {', '.join(COSTS)}"
        )
    return axes


def others(
    axes: Sequence[str], full: ModelSpec, small: ModelSpec, shares: Mapping[str, float]
) -> tuple[float, ...]:
    """Return the costs of a full-size model on all axes after the loss.

    ``small``, ``shares``: the proxy and its measured fractions of tokens, see ``executed``.
    """
    found = executed(full, small, shares)
    return tuple(float(COSTS[axis][0](found)) for axis in axes[1:])


def executed_flops(full: ModelSpec, small: ModelSpec, shares: Mapping[str, float]) -> float:
    """Return the forward FLOPs per token of a full-size model, with arguments as ``executed``."""
    return float(COSTS[FLOPS][0](executed(full, small, shares)))


def executed(full: ModelSpec, small: ModelSpec, shares: Mapping[str, float]) -> ModelSpec:
    """Return the full-size spec with the capacities that were measured on its proxy.

    ``small``: the proxy's spec, which has the same structure. ``shares``: the fraction of tokens
    that each router selected, by loop and step, as ``LanguageModel.router_shares`` of the canonical
    proxy returns it. If the proxy has several copies of a loop, their fractions are averaged.
    """
    model, canonical = meta_model(small), meta_model(small.canonical())
    # the canonical proxy has the same routed loops in the same order, but with other names
    pairs = zip(_routed(canonical), _routed(model), strict=True)
    names = {one: other for loops in pairs for one, other in zip(*map(_steps, loops), strict=True)}
    measured = {names[name]: share for name, share in shares.items()}
    return with_measured(full, loops_by_path(small, model), measured)


def _routed(model: LanguageModel) -> list[Loop]:
    """The loops in which a router or an exit decides who takes a pass."""
    return [loop for loop in model.loops if _steps(loop)]


def _steps(loop: Loop) -> list[str]:
    return [one.routed.name for one in loop.passes if one.routed is not None]
