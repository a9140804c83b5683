"""A super-net: one model that is trained at many settings of its loops, and then stands for each.

Neither the steps of a loop nor the capacities of its router are in the shapes of its weights, so a
model of the most steps holds the weights of all models with fewer. It is trained by the sandwich
rule (Yu & Huang 1903.05134): each step adds up the gradients of the largest setting, the smallest
and a few drawn ones, on the same batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import NamedTuple

import torch

from archdsl.blocks.loop import LoopSpec, loops_in, with_loops
from archdsl.costs.receipt import sequence_cost
from archdsl.data.types import Batch, Data
from archdsl.lang.spec import ModelSpec, at_step
from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer

RANDOM_SETTINGS = 2  # settings of a step besides the largest and the smallest
CALIBRATION = 20  # passes in which routers learn what scores are like at a setting


class LoopSetting(NamedTuple):
    """How a loop runs. ``capacity``: of each pass after the full ones; empty without a router."""

    steps: int
    capacity: tuple[float, ...]


Setting = tuple[LoopSetting, ...]
"""One for each loop of a spec, in the order of ``loops_in``; copies of a stack run alike."""


def setting_of(spec: ModelSpec) -> Setting:
    """How the loops of a spec run."""
    return tuple(_loop_setting(loop) for loop in loops_in(spec))


def _loop_setting(loop: LoopSpec) -> LoopSetting:
    router, further = loop.router, max(0, loop.steps - loop.full_steps)
    if router is None:
        return LoopSetting(loop.steps, ())
    return LoopSetting(loop.steps, tuple(at_step(router.capacity, step) for step in range(further)))


def with_setting(spec: ModelSpec, wanted: Setting) -> ModelSpec:
    """The spec with its loops run so."""
    return with_loops(spec, lambda i, loop: _at(loop, wanted[i]))


def _at(loop: LoopSpec, one: LoopSetting) -> LoopSpec:
    router = loop.router and loop.router.model_copy(update={"capacity": one.capacity or (1.0,)})
    return loop.model_copy(update={"steps": one.steps, "router": router})


def dial(model: LanguageModel, wanted: Setting) -> None:
    """Runs a model's loops so from now on."""
    by_loop = {id(loop): one for loop, one in zip(loops_in(model.spec), wanted, strict=True)}
    for loop in model.loops:
        one = by_loop[id(loop.spec)]
        loop.dial(one.capacity or None, one.steps)


@dataclass(frozen=True)
class Supernet:
    """``spec``: the most steps; a capacity is below 1 if it is so in any setting, as a pass that
    takes every token has no router. ``settings``: the largest, the smallest, a sample of others.
    """

    spec: ModelSpec
    settings: tuple[Setting, ...]

    @classmethod
    def of(cls, specs: Iterable[ModelSpec]) -> Supernet:
        """For specs that differ in steps and capacities alone."""
        ranked = sorted(specs, key=lambda spec: sequence_cost(spec).flops)
        settings = dict.fromkeys(map(setting_of, [ranked[-1], ranked[0], *ranked[1:-1]]))
        largest = [
            _largest(loop, of) for loop, *of in zip(loops_in(ranked[0]), *settings, strict=True)
        ]
        return cls(with_setting(ranked[0], tuple(largest)), tuple(settings))

    def serves(self, spec: ModelSpec) -> bool:
        """Whether a spec is this one but for its steps and capacities."""
        known = {"name": spec.name, "description": spec.description, "budget": spec.budget}
        mine = setting_of(self.spec)
        same = len(loops_in(spec)) == len(mine)
        return same and with_setting(spec, mine) == self.spec.model_copy(update=known)

    def sandwich(self, step: int, seed: int) -> list[Setting]:
        """The settings that a training step runs, the largest last."""
        ends, others = self.settings[:2], self.settings[2:]
        random = Random(f"{seed}/{step}").sample(others, min(RANDOM_SETTINGS, len(others)))
        return [*random, *reversed(ends)]


def _largest(loop: LoopSpec, of: Sequence[LoopSetting]) -> LoopSetting:
    capacity: list[float] = []
    for step in range(max(len(one.capacity) for one in of)):
        given = [one.capacity[step] for one in of if len(one.capacity) > step]
        capacity.append(max((share for share in given if share < 1), default=1.0))
        if loop.router is not None and loop.router.nested:
            capacity[-1] = min(capacity)
    return LoopSetting(max(one.steps for one in of), tuple(capacity))


class SandwichTrainer(Trainer):
    """Trains a super-net; ``model`` is of its spec."""

    def __init__(
        self, net: Supernet, model: LanguageModel, data: Data, config: TrainConfig
    ) -> None:
        super().__init__(model, data, config)
        self.net = net

    def add_gradient(self, batch: Batch) -> float:
        """The sum over the settings of this step; returns their mean loss."""
        losses = []
        for one in self.net.sandwich(self.step, self.config.seed):
            dial(self.model, one)
            losses.append(super().add_gradient(batch))
        return fmean(losses)


def build_net(net: Supernet, seed: int) -> LanguageModel:
    model = build(net.spec, seed=seed)
    for router in model.routers:
        router.serve_every_capacity()
    return model


def calibrate_routers(trainer: Trainer) -> None:
    """Routers that know what scores are like learn it anew, at the setting that the model has."""
    model, config = trainer.model, trainer.config
    if not sum(router.forget_statistics() for router in model.routers):
        return
    model.train()
    with torch.no_grad():
        for step in range(CALIBRATION):
            batch = trainer.data.batch(step, config.batch_size, trainer.context, config.seed)
            model(batch.tokens_BT.to(trainer.device))
    model.commit()
