"""Baselines and ablations of a model, as specs.

A baseline is a plain model of equal parameters or equal FLOPs, a plain loop of equal FLOPs, or the
same model with random routing. An ablation is the model without one of its parts. Call these
functions with the spec of the size that is trained: baselines that are equal at one size are not
equal at another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from archdsl.blocks.loop import LoopSpec, loops_in, with_loops
from archdsl.blocks.residual_thinking import OverwriteSpec
from archdsl.blocks.router import RandomSpec
from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import block_cost, sequence_cost
from archdsl.lang.spec import BlockSpec, ModelSpec, Part

WINNER = "winner"
EQUAL_PARAMS = "equal-parameters plain"
EQUAL_FLOPS = "equal-FLOPs plain"
EQUAL_FLOPS_LOOP = "equal-FLOPs loop"
RANDOM_ROUTING = "random-routing"
BASELINES = (EQUAL_PARAMS, EQUAL_FLOPS, EQUAL_FLOPS_LOOP, RANDOM_ROUTING)

Change = Callable[[LoopSpec], Part]
Specs = dict[str, ModelSpec]  # name -> spec


def baselines(winner: ModelSpec) -> Specs:
    """Return the baselines by name, without those that equal the winner or another baseline."""
    found = compared_specs(winner)
    return {name: found[name] for name in distinct([found]) if name in BASELINES}


def ablations(winner: ModelSpec) -> Specs:
    """Return the ablations by name, without those that equal the winner or a baseline."""
    found = compared_specs(winner)
    return {name: found[name] for name in distinct([found]) if name not in (WINNER, *BASELINES)}


def compared_specs(winner: ModelSpec) -> Specs:
    """Return the winner, its baselines and its ablations in this order; some may be equal."""
    plain = plain_baseline(winner)
    params, flops = sequence_cost(winner).params, sequence_cost(winner).flops
    found = {
        WINNER: winner,
        EQUAL_PARAMS: with_depth_for(plain, params, of="params"),
        EQUAL_FLOPS: with_depth_for(plain, flops),
        EQUAL_FLOPS_LOOP: loop_baseline(winner, flops),
        RANDOM_ROUTING: _changed(winner, _random),
    }
    found |= {f"without {what}": _changed(winner, take) for what, take in ABLATIONS.items()}
    loops = len(loops_in(winner))
    found |= {f"without loop {i + 1}": _without_loop(winner, i) for i in range(loops)}
    return {name: _named(spec, winner, name) for name, spec in found.items()}


def distinct(by_task: Sequence[Specs]) -> list[str]:
    """Return the names that are worth training.

    ``by_task`` maps the same names to specs, once for each task. A name is left out if an earlier
    name has the same model (fingerprint) for every task.
    """
    first: dict[tuple[str, ...], str] = {}
    for name in by_task[0]:
        first.setdefault(tuple(specs[name].fingerprint() for specs in by_task), name)
    return list(first.values())


def _named(spec: ModelSpec, winner: ModelSpec, name: str) -> ModelSpec:
    if name == WINNER:
        return winner
    about = f"{name} baseline of {winner.name}" if name in BASELINES else f"{winner.name} {name}"
    called = f"{winner.name[:60]}-{name.lower().replace(' ', '-')}"
    spec = spec.with_blocks(spec.blocks)  # of the training, what still goes with them
    update = {"name": called, "description": about, "budget": None}
    return _with_last_norm(spec, winner).model_copy(update=update)


def _with_last_norm(spec: ModelSpec, winner: ModelSpec) -> ModelSpec:
    """Put the norm that the winner's last loop ends with before the head, where it was removed."""
    last, now = [*_unrolled(winner)][-1], [*_unrolled(spec)][-1]
    if winner.final_norm or not isinstance(last, LoopSpec) or last.norm is None:
        return spec
    if isinstance(now, LoopSpec) and now.norm is not None:
        return spec
    return spec.model_copy(
        update={"final_norm": True, "norm": last.norm, "norm_eps": last.norm_eps}
    )


# plain models


def plain_baseline(spec: ModelSpec) -> ModelSpec:
    """Replace every loop by its body, which runs once: the same weights without repeated steps."""
    return _with_blocks(spec, _unrolled(_changed(spec, unlooped)))


def unlooped(loop: LoopSpec) -> BlockSpec:
    """Return the body of a loop, or a stack of bodies if each step has its own weights."""
    if loop.parameters != "per_step" or loop.steps == 1:
        return loop.body
    return StackSpec(repeat=loop.steps, body=(loop.body,))


def with_depth_for(
    spec: ModelSpec, target: int, of: Literal["flops", "params"] = "flops"
) -> ModelSpec:
    """Change the number of layers so that the FLOPs or parameters come closest to ``target``.

    Layers are repeated or left out evenly; a loop counts as one layer. FLOPs are counted for one
    context of a forward pass. Of equally close depths the present one is kept, else the smallest is
    taken.
    """
    blocks = [*_unrolled(spec)]
    each = [getattr(block_cost(block, spec.dim, spec.context), of) for block in blocks]
    head = getattr(sequence_cost(spec), of) - sum(each)
    if not sum(each):
        return spec

    def picked(n: int) -> list[int]:
        return [i * len(blocks) // n for i in range(n)]

    def total(n: int) -> int:
        return head + sum(each[i] for i in picked(n))

    most = 1
    while total(most) < target:
        most += 1
    depths = [len(blocks), *range(1, most + 1)]
    best = min(depths, key=lambda n: abs(total(n) - target))
    return _with_blocks(spec, [blocks[i] for i in picked(best)])


# plain loops


def loop_baseline(spec: ModelSpec, flops: int) -> ModelSpec:
    """Replace loops by plain loops without routing whose FLOPs come closest to ``flops``.

    The parameters are those of ``plain_baseline``. ``flops`` is the count for one context of a
    forward pass. Each loop gets as many steps as its own FLOPs allow. If that is not a whole
    number, some of the loops take one step more.
    """
    thinking = _with_blocks(spec, _unrolled(spec))
    plain = _changed(thinking, unlooped)
    now, once = _flops(thinking), _flops(plain)
    loops = [i for i, block in enumerate(thinking.blocks) if block != plain.blocks[i] and once[i]]
    steps = [1] * len(once)
    missing = flops - sequence_cost(plain).flops
    while behind := [i for i in loops if steps[i] < 64 and abs(missing - once[i]) < abs(missing)]:
        most = max(behind, key=lambda i: now[i] / once[i] - steps[i])
        steps[most] += 1
        missing -= once[most]
    pairs = zip(plain.blocks, steps, strict=True)
    return _with_blocks(spec, [LoopSpec(steps=n, body=b) if n > 1 else b for b, n in pairs])


# one thing changed in every loop


def _random(loop: LoopSpec) -> LoopSpec:
    """Replace a learned router by a random router of equal capacity."""
    old = loop.router
    if old is None or not old.learned:
        return loop
    return _with(loop, router=RandomSpec(capacity=old.capacity, alpha=old.alpha, nested=old.nested))


def _unnested(loop: LoopSpec) -> LoopSpec:
    if loop.router is None:
        return loop
    return _with(loop, router=loop.router.model_copy(update={"nested": False}))


def _with_own_kv(loop: LoopSpec, instead_of: str) -> LoopSpec:
    return _with(loop, kv="own") if loop.kv == instead_of else loop


ABLATIONS: dict[str, Change] = {
    "router": lambda loop: _with(loop, router=None),
    "nesting": _unnested,
    "residual": lambda loop: _with(loop, residual=OverwriteSpec()),
    "encoding": lambda loop: _with(loop, encoding=None),
    "exit": lambda loop: _with(loop, exit=None),
    "injection": lambda loop: _with(loop, injection=None, start="embedding"),
    "empty start": lambda loop: _with(loop, start="embedding"),
    "shared kv": lambda loop: _with_own_kv(loop, "shared"),
    "last kv": lambda loop: _with_own_kv(loop, "last"),
    "all kv": lambda loop: _with_own_kv(loop, "all"),
    "norm between passes": lambda loop: _with(loop, norm=None),
    "weights per step": lambda loop: _with(loop, parameters="shared"),
}


def _without_loop(spec: ModelSpec, which: int) -> ModelSpec:
    """Replace one loop by its body; ``which`` counts the loops in the order of the spec."""
    return with_loops(spec, lambda i, loop: unlooped(loop) if i == which else loop)


# how a spec is changed


def _changed(spec: ModelSpec, change: Change) -> ModelSpec:
    """Apply ``change`` to every loop of the spec, to inner loops first."""
    return with_loops(spec, lambda _, loop: change(loop))


def _with(loop: LoopSpec, **update: Any) -> LoopSpec:
    return loop.model_copy(update=update)


def _with_blocks(spec: ModelSpec, blocks: Iterable[BlockSpec]) -> ModelSpec:
    return spec.model_copy(update={"blocks": tuple(blocks)})


def _unrolled(spec: ModelSpec) -> Iterator[BlockSpec]:
    return (leaf for block in spec.blocks for leaf in block.unrolled())


def _flops(spec: ModelSpec) -> list[int]:
    """Return the forward FLOPs of each block for one context."""
    return [block_cost(block, spec.dim, spec.context).flops for block in spec.blocks]
