"""A supernet: one model that is trained at many settings of its loops and then scores each of them.

The shapes of the weights depend neither on the steps of a loop nor on the capacities of its router.
So the model with the most steps holds the weights of all models with fewer steps. It is trained by
the sandwich rule (Yu & Huang 1903.05134): each training step adds the gradients of the largest
setting, the smallest setting and a few random settings, all on the same batch.
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

RANDOM_SETTINGS = 2  # random settings in a training step, besides the largest and the smallest
CALIBRATION = 20  # forward passes in which routers measure the distribution of their scores


class LoopSetting(NamedTuple):
    """How a loop runs: its number of steps and the capacities of its router.

    ``capacity``: the capacity of each pass after the full passes; empty without a router.
    """

    steps: int
    capacity: tuple[float, ...]


Setting = tuple[LoopSetting, ...]
"""One LoopSetting for each loop of a spec, in the order of ``loops_in``.

The copies of a stack's body have the same setting.
"""


def setting_of(spec: ModelSpec) -> Setting:
    """Return the setting that a spec gives to its loops."""
    return tuple(_loop_setting(loop) for loop in loops_in(spec))


def _loop_setting(loop: LoopSpec) -> LoopSetting:
    router, further = loop.router, max(0, loop.steps - loop.full_steps)
    if router is None:
        return LoopSetting(loop.steps, ())
    return LoopSetting(loop.steps, tuple(at_step(router.capacity, step) for step in range(further)))


def with_setting(spec: ModelSpec, wanted: Setting) -> ModelSpec:
    """Return the spec with the wanted setting of its loops."""
    return with_loops(spec, lambda i, loop: _at(loop, wanted[i]))


def _at(loop: LoopSpec, one: LoopSetting) -> LoopSpec:
    router = loop.router and loop.router.model_copy(update={"capacity": one.capacity or (1.0,)})
    return loop.model_copy(update={"steps": one.steps, "router": router})


def dial(model: LanguageModel, wanted: Setting) -> None:
    """Change the setting of a model's loops in place.

    Raises DialError if a loop cannot run at the wanted setting.
    """
    by_loop = {id(loop): one for loop, one in zip(loops_in(model.spec), wanted, strict=True)}
    for loop in model.loops:
        one = by_loop[id(loop.spec)]
        loop.dial(one.capacity or None, one.steps)


@dataclass(frozen=True)
class Supernet:
    """A spec whose weights serve many settings, and the settings that are trained.

    ``spec``: has the most steps of all settings. A capacity in it is below 1 if it is below 1 in
    any setting, because a pass that takes every token has no router. ``settings``: the setting with
    the most FLOPs, then the one with the fewest, then the others.
    """

    spec: ModelSpec
    settings: tuple[Setting, ...]

    @classmethod
    def of(cls, specs: Iterable[ModelSpec]) -> Supernet:
        """Return the supernet of specs that differ only in their steps and capacities.

        Raises IndexError if there are no specs.
        """
        ranked = sorted(specs, key=lambda spec: sequence_cost(spec).flops)
        settings = dict.fromkeys(map(setting_of, [ranked[-1], ranked[0], *ranked[1:-1]]))
        largest = [
            _largest(loop, of) for loop, *of in zip(loops_in(ranked[0]), *settings, strict=True)
        ]
        return cls(with_setting(ranked[0], tuple(largest)), tuple(settings))

    def serves(self, spec: ModelSpec) -> bool:
        """Whether a spec differs from the supernet's spec only in its steps and capacities.

        Names, descriptions and budgets are ignored.
        """
        known = {"name": spec.name, "description": spec.description, "budget": spec.budget}
        mine = setting_of(self.spec)
        same = len(loops_in(spec)) == len(mine)
        return same and with_setting(spec, mine) == self.spec.model_copy(update=known)

    def sandwich(self, step: int, seed: int) -> list[Setting]:
        """Return the settings that a training step runs: random ones, the smallest, the largest."""
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
    """Train a supernet by the sandwich rule. ``model`` is built from the supernet's spec."""

    def __init__(
        self, net: Supernet, model: LanguageModel, data: Data, config: TrainConfig
    ) -> None:
        super().__init__(model, data, config)
        self.net = net
        self.depth = self.capacity = None  # the settings say at which it is trained

    def add_gradient(self, batch: Batch) -> float:
        """Add the gradients of all settings of this step, and return their mean loss in nats."""
        losses = []
        for one in self.net.sandwich(self.step, self.config.seed):
            dial(self.model, one)
            losses.append(super().add_gradient(batch))
        return fmean(losses)


def build_net(net: Supernet, seed: int) -> LanguageModel:
    """Build the model of a supernet, and prepare its routers for many capacities."""
    model = build(net.spec, seed=seed)
    for router in model.routers:
        router.serve_every_capacity()
    return model


def calibrate_routers(trainer: Trainer) -> None:
    """Measure the statistics of the routers' scores again, at the present setting of the model.

    Routers that keep no statistics are not changed.
    """
    model, config = trainer.model, trainer.config
    if not sum(router.forget_statistics() for router in model.routers):
        return
    model.train()
    with torch.no_grad():
        for step in range(CALIBRATION):
            batch = trainer.data.batch(step, config.batch_size, trainer.context, config.seed)
            model(batch.tokens_BT.to(trainer.device))
            model.commit()
