"""The low-rank differences of loops written out as weights of each pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archdsl.blocks.loop import with_loops
from archdsl.blocks.lora import LoraSpec
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.errors import ArchdslError
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel


class MergeError(ArchdslError):
    """A model without low-rank differences."""

    exit_status = 2


def merged(model: LanguageModel) -> LanguageModel:
    """The same function as ``model`` with ``parameters: per_step`` in place of ``lora``.

    Each pass has weights of its own, W + alpha / rank * B A, and runs faster; the model is larger.
    Raises MergeError if no loop has low-rank differences.
    """
    weights = model.state_dict()
    loops = [
        (name, one)
        for name, one in model.named_modules()
        if isinstance(one, BodyLoop) and one.lora is not None
    ]
    if not loops:
        raise MergeError(f"{model.spec.name}: no loop has `parameters: lora`; nothing to merge")
    with torch.no_grad():
        for name, loop in loops:
            _write_out(weights, name, loop)
    spec = _per_step(model.spec)
    weight = model.head.weight
    new = build(spec, device=weight.device, dtype=weight.dtype)
    new.load_state_dict(weights)
    return new.train(model.training)


def _per_step(spec: ModelSpec) -> ModelSpec:
    """The spec with weights for each pass, and of its training what still goes with them."""
    written = with_loops(
        spec,
        lambda _, loop: (
            loop.model_copy(update={"parameters": "per_step"})
            if isinstance(loop.parameters, LoraSpec)
            else loop
        ),
    )
    return written.with_blocks(written.blocks)


def _write_out(weights: dict[str, Tensor], name: str, loop: BodyLoop) -> None:
    """Replaces the weights of a loop by those of its passes."""
    assert loop.lora is not None
    for key in [key for key in weights if key.startswith(f"{name}.lora.")]:
        del weights[key]
    shared = {key: weights[f"{name}.bodies.0.{key}"] for key in loop.bodies[0].state_dict()}
    for step in range(loop.steps):
        own = dict(shared)
        added = loop.lora.added(step)
        for place, module in loop.bodies[0].named_modules():
            if isinstance(module, nn.Linear) and module in added:
                own[f"{place}.weight"] = module.weight + added[module].difference()
        weights |= {f"{name}.bodies.{step}.{key}": value for key, value in own.items()}
