"""The units of a model, in which training on several devices gathers and reduces parameters."""

from __future__ import annotations

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
    return Units(layers, Unit(rest))
