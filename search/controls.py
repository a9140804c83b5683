"""The controls of a winner: what a plain model, or chance, does with the same means."""

from __future__ import annotations

from typing import cast

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.router import RandomSpec
from archdsl.blocks.stack import StackSpec
from archdsl.cost import sequence_cost
from archdsl.spec import BlockSpec, ModelSpec, Part

PARAMS_TWIN = "equal-parameters plain"
FLOPS_TWIN = "equal-FLOPs plain"
RANDOM_TWIN = "random-routing"


def controls(winner: ModelSpec) -> dict[str, ModelSpec]:
    """By name; without those that are the winner itself."""
    plain = plain_twin(winner)
    found = {PARAMS_TWIN: plain, FLOPS_TWIN: deeper(plain, sequence_cost(winner).flops)}
    if (random := randomly_routed(winner)) is not None:
        found[RANDOM_TWIN] = random
    own = winner.fingerprint()
    distinct: dict[str, str] = {}
    for name, spec in found.items():
        distinct.setdefault(spec.fingerprint(), name)
    return {name: found[name] for key, name in distinct.items() if key != own}


def plain_twin(spec: ModelSpec) -> ModelSpec:
    """Every loop replaced by its body, which runs once: the same weights, no thinking."""
    blocks = tuple(block for top in spec.blocks for block in _plain(top))
    return spec.model_copy(update={"name": f"{spec.name}-plain", "blocks": blocks})


def _plain(block: BlockSpec) -> tuple[BlockSpec, ...]:
    if isinstance(block, LoopSpec):
        own_weights = block.steps if block.parameters == "per_step" else 1
        return _plain(block.body) * own_weights
    if isinstance(block, StackSpec):
        return tuple(leaf for inner in block.body for leaf in _plain(inner)) * block.repeat
    return (block,)


def deeper(plain: ModelSpec, flops: int) -> ModelSpec:
    """The plain model with as many layers as come closest to ``flops`` per context."""
    blocks = plain.blocks

    def at(count: int) -> ModelSpec:
        spread = tuple(blocks[i * len(blocks) // count] for i in range(count))
        return plain.model_copy(update={"name": f"{plain.name}-{count}", "blocks": spread})

    count = len(blocks)
    while sequence_cost(at(count)).flops < flops:
        count += 1
    around = [at(n) for n in (count - 1, count) if n >= len(blocks)]
    return min(around, key=lambda spec: abs(sequence_cost(spec).flops - flops))


def randomly_routed(spec: ModelSpec) -> ModelSpec | None:
    """Learned routers replaced by `random` ones of equal capacity; None without any."""
    changed = tuple(cast(BlockSpec, _random(block)) for block in spec.blocks)
    if changed == spec.blocks:
        return None
    return spec.model_copy(update={"name": f"{spec.name}-random", "blocks": changed})


def _random(part: Part) -> Part:
    part = part.with_each(_random)
    if not isinstance(part, LoopSpec) or part.router is None or not part.router.learned:
        return part
    router = RandomSpec(capacity=part.router.capacity, nested=part.router.nested)
    return part.model_copy(update={"router": router})
