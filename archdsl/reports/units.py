"""The units of a model, in which training on several devices gathers and reduces parameters."""

from __future__ import annotations

from torch import nn

from archdsl.costs.devices import Unit, Units
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model


def units(spec: ModelSpec) -> Units:
    """Returns the units of a model, without its weights: one for each layer, and the root.

    A layer is an entry of ``layers`` of the model, such as a loop.
    """
    model = meta_model(spec)
    layers = [Unit([tuple(one.shape) for one in layer.parameters()]) for layer in model.layers]
    inside = {one for layer in model.layers for one in layer.parameters()}
    rest = [tuple(one.shape) for one in model.parameters() if one not in inside]
    linear = [
        one for one in model.modules() if isinstance(one, nn.Linear) and one is not model.head
    ]
    matrices = [tuple(one.weight.shape) for one in linear if min(one.weight.shape) > 1]
    return Units(layers, Unit(rest), Unit(matrices))
