"""What a pass really cost: the closed form, at the shares of tokens that the routers selected."""

from __future__ import annotations

from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.layer import Layer
from archdsl.blocks.modules.loop import Loop
from archdsl.blocks.modules.stack import Stack
from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.spec import BlockSpec, ModelSpec
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block


def flops_per_token(model: LanguageModel, tokens: int) -> float:
    """Forward FLOPs per token of the model's last pass, over sequences of ``tokens``.

    Of a loop in a routed loop the share is that of its last run. Without a pass so far, or for
    steps that have not run, the capacities count.
    """
    return sequence_cost(executed(model), tokens=tokens).flops / tokens


def executed(model: LanguageModel) -> ModelSpec:
    """The spec as it was run: steps as dialled, capacities as measured."""
    shares = model.router_shares()
    blocks = tuple(
        _executed(spec, module, shares)
        for spec, module in zip(model.spec.blocks, model.blocks, strict=True)
        if isinstance(module, Block)
    )
    return model.spec.model_copy(update={"blocks": blocks})


def _executed(spec: BlockSpec, module: Block, shares: dict[str, float]) -> BlockSpec:
    match spec, module:
        case LoopSpec(), Loop():
            return _loop(spec, module, shares)
        case LoopSpec(), _:  # one pass over every token is built as its body
            return _executed(spec.body, module, shares)
        case StackSpec(), Stack():
            bodies = zip(spec.body * spec.repeat, module.blocks, strict=True)
            unrolled = tuple(_executed(b, m, shares) for b, m in bodies)  # type: ignore[arg-type]
            return StackSpec(body=unrolled)
        case LayerSpec(), Layer():
            parts = {"attention": module.attention, "ffn": module.ffn}
            return spec.model_copy(
                update={n: _executed(getattr(spec, n), m, shares) for n, m in parts.items()}
            )
    return spec


def _loop(spec: LoopSpec, loop: Loop, shares: dict[str, float]) -> LoopSpec:
    body = loop.bodies[0]
    assert isinstance(body, Block)
    update: dict[str, object] = {
        "steps": len(loop.passes),
        "body": _executed(spec.body, body, shares),
    }
    if spec.router is not None:
        further = [one.routed for one in loop.passes[spec.full_steps :]]
        # a share of 1 would mean that there is no router to be paid for
        run = [
            1.0 if at is None else min(shares.get(at.name, at.capacity), ALMOST_ALL)
            for at in further
        ]
        update["router"] = spec.router.model_copy(update={"capacity": tuple(run) or (1.0,)})
    return spec.model_copy(update=update)


ALMOST_ALL = 1 - 1e-12
