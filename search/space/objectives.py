"""What a search wants to be low: the loss, and what the full-size model costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import cast

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import cost
from archdsl.errors import ArchdslError
from archdsl.lang.spec import BlockSpec, ModelSpec

LOSS = "loss"
FLOPS = "flops"

# figures of a model whose routers selected what they really did
COSTS: dict[str, tuple[Callable[[ModelSpec], float], str]] = {
    FLOPS: (lambda spec: cost(spec).expected, "forward FLOPs per token, as executed"),
    "params": (lambda spec: cost(spec).params, "parameters"),
    "kv": (lambda spec: cost(spec).kv_bytes_per_token, "bytes of KV cache per token"),
    "heaviest": (lambda spec: cost(spec).heaviest, "FLOPs of a token that every router selects"),
}
ALMOST_ALL = 1 - 1e-9  # a share of 1 would mean that there is no router to be paid for


class AxisError(ArchdslError):
    """An axis that there is not."""

    exit_status = 2


def parse_axes(text: str) -> tuple[str, ...]:
    """``loss``, ``loss,flops`` or ``loss,flops,kv``."""
    axes = tuple(part.strip() for part in text.split(","))
    wrong = [axis for axis in axes[1:] if axis not in COSTS]
    if axes[0] != LOSS or wrong or len(set(axes)) < len(axes):
        raise AxisError(
            f"--objective {text}: write loss for one figure, or loss and what it is weighed "
            f"against, each once: loss,flops; there are {', '.join(COSTS)}"
        )
    return axes


def others(
    axes: Sequence[str], full: ModelSpec, small: ModelSpec, shares: Mapping[str, float]
) -> tuple[float, ...]:
    """The axes after the loss, of a full-size model whose proxy's routers selected ``shares``."""
    found = executed(full, small, shares)
    return tuple(float(COSTS[axis][0](found)) for axis in axes[1:])


def executed(full: ModelSpec, small: ModelSpec, shares: Mapping[str, float]) -> ModelSpec:
    """The full-size model with the capacities that the routers of its proxy were measured to take.

    ``shares``: by loop and step, as ``LanguageModel.router_shares`` of the canonical proxy. Copies
    of a stack, of which the proxy may have fewer, take the mean.
    """
    blocks = _series(full.blocks, small.blocks, [_flat("", small.blocks)], shares)
    return full.model_copy(update={"blocks": blocks})


def _flat(prefix: str, blocks: Sequence[BlockSpec]) -> list[str]:
    """Names of the modules that blocks are built as: stacks are taken apart."""
    count = sum(_width(block) for block in blocks)
    if not prefix:
        return [f"blocks.{i}" for i in range(count)]
    return [prefix] if count == 1 else [f"{prefix}.blocks.{i}" for i in range(count)]


def _width(block: BlockSpec) -> int:
    return len(cast(BlockSpec, block.canonical(dim=1)).unrolled())


def _series(
    full: Sequence[BlockSpec],
    small: Sequence[BlockSpec],
    copies: list[list[str]],
    shares: Mapping[str, float],
) -> tuple[BlockSpec, ...]:
    """``copies``: for each copy of the series the modules that it is."""
    found, start = [], 0
    for one, other in zip(full, small, strict=True):
        stop = start + _width(other)
        found.append(_executed(one, other, [names[start:stop] for names in copies], shares))
        start = stop
    return tuple(found)


def _executed(
    full: BlockSpec, small: BlockSpec, copies: list[list[str]], shares: Mapping[str, float]
) -> BlockSpec:
    match full, small:
        case StackSpec(), StackSpec():
            apart = [
                part for names in copies for part in _pieces(names, len(names) // small.repeat)
            ]
            return full.model_copy(update={"body": _series(full.body, small.body, apart, shares)})
        case LoopSpec(), LoopSpec():
            below = copies
            if not full.is_body:
                below = [_flat(f"{name}.bodies.0", [small.body]) for (name,) in copies]
            (body,) = _series([full.body], [small.body], below, shares)
            update: dict[str, object] = {"body": body}
            if full.router is not None and (taken := _taken(full, copies, shares)):
                update["router"] = full.router.model_copy(update={"capacity": taken})
            return full.model_copy(update=update)
    return full


def _pieces(names: list[str], size: int) -> list[list[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


def _taken(
    loop: LoopSpec, copies: list[list[str]], shares: Mapping[str, float]
) -> tuple[float, ...]:
    """Measured capacities of the passes after the full ones; 1 where there is no router."""
    taken: list[float] = []
    routed = 0
    for row in loop.rows()[loop.full_steps :]:
        if row is None:
            taken.append(1.0)
            continue
        found = [shares[key] for (name,) in copies if (key := f"{name}.{routed}") in shares]
        if not found:
            return ()
        taken.append(min(fmean(found), ALMOST_ALL))
        routed += 1
    return tuple(taken)
