"""How a model is trained, as far as its spec says so: the part ``training`` of a spec.

This module needs no torch and does not know which blocks exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from random import Random
from statistics import NormalDist
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from archdsl.lang.strict import Path, PerStep, Strict, validation_error

SIZES = 6  # the most numbers of passes that a law is drawn from
LEVELS = 8  # steps in which capacities fall
SPREAD = 0.5  # sigma of the log-normal law, as in Huginn


class Looping(NamedTuple):
    """A block whose number of passes the compute dial changes.

    ``path``: its place in the spec. ``steps``: its number of passes. ``injects``: whether further
    passes read its input again. ``own``: the fields that give a pass weights of its own.
    ``most``: the largest number of passes that it can run; None: any number. ``joins``: whether a
    pass attends to the keys and values of the passes before it. ``every``: the field that learns
    from every pass; None: there is none. ``expects``: whether the loss is expected over its passes.
    ``routed``: whether a router selects fewer than all tokens.
    """

    path: Path
    steps: int
    injects: bool
    own: tuple[str, ...]
    most: int | None
    joins: bool = False
    every: str | None = None
    expects: bool = False
    routed: bool = False

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


class Structure(NamedTuple):
    """What a rule of training needs to know of the blocks of a model.

    ``last``: the number of the last block. ``ends_with_loop``: whether the last block that runs is
    a loop.
    """

    loops: list[Looping]
    last: int
    ends_with_loop: bool


class DepthSpec(Strict):
    """The number of passes of all loops in training, and which of them get a gradient.

    The laws, for a number of passes r:

        fixed              r = mean
        uniform            r is one of min, ..., max with equal probabilities
        poisson_lognormal  r = 1 + Poisson(exp(N(log(mean) - s^2 / 2, s^2))) with s = 0.5, so that
                           the mean of r is mean + 1: Huginn (Geiping et al. 2502.05171)

    A law is drawn from at most six numbers, so that there are few graphs to compile: each stands
    for a sixth of the probability, and is the mean of the law there, rounded.
    """

    law: Literal["fixed", "uniform", "poisson_lognormal"] = Field(
        "fixed", description="the distribution of the number of passes"
    )
    mean: int | None = Field(
        None,
        ge=1,
        le=64,
        description="its mean, for poisson_lognormal one less; default: the steps of the loops",
    )
    min: int | None = Field(
        None, ge=1, le=64, description="the smallest number of passes; default: 1"
    )
    max: int | None = Field(
        None,
        ge=1,
        le=256,
        description="the largest number of passes; default: for uniform 2 mean - min, else any",
    )
    per: Literal["batch", "sequence"] = Field(
        "batch", description="draw once for each batch, or for each sequence"
    )
    backprop_last: int | None = Field(
        None,
        ge=1,
        le=64,
        description="the passes of a loop, counted from its last, that get a gradient; those "
        "before save no activations; default: all",
    )

    @model_validator(mode="after")
    def _limits_fit_the_law(self) -> Self:
        if problem := self._problem(self.mean):
            raise validation_error([problem])
        return self

    def _problem(self, mean: int | None) -> tuple[Path, str] | None:
        """Returns the place and the message of limits that do not fit together."""
        if self.law == "fixed":
            for name in ("min", "max"):
                if getattr(self, name) is not None:
                    return (name,), "law fixed has no limits: leave it out, or use another law"
            return None
        low, high = self.min or 1, self.max
        if self.law == "uniform" and self.mean is not None and high is not None:
            return ("mean",), "law uniform takes mean or max, not both"
        high = 2 * mean - low if high is None and mean and self.law == "uniform" else high
        if high is not None and high < low:
            return ("min",), f"must be at most {'mean' if self.max is None else 'max'}, got {low}"
        return None

    @property
    def needs_mean(self) -> bool:
        """Whether its numbers of passes depend on ``mean``."""
        return not (self.law == "uniform" and self.max)

    def sizes(self, steps: int) -> tuple[int, ...]:
        """Returns the numbers of passes that are drawn, equally likely and in rising order.

        ``steps``: the mean where none is given.
        """
        mean = self.mean or steps
        low = self.min or 1
        match self.law:
            case "fixed":
                return (mean,)
            case "uniform":
                numbers = range(low, (self.max or 2 * mean - low) + 1)
                if len(numbers) <= SIZES:
                    return tuple(numbers)
                return _representatives(dict.fromkeys(numbers, 1 / len(numbers)))
            case "poisson_lognormal":
                limited: dict[int, float] = {}
                for number, share in _poisson_lognormal(mean).items():
                    kept = min(max(number, low), self.max or number)
                    limited[kept] = limited.get(kept, 0.0) + share
                return _representatives(limited)

    def draw(self, steps: int, rows: int, seed: int, step: int) -> list[int]:
        """Returns the number of passes for each row of a batch.

        It depends on the seed and the number of the training step alone. ``per: sequence`` spreads
        the rows evenly over the law (systematic sampling), so that the number of rows with a depth
        differs by at most one between steps.
        """
        sizes, random = self.sizes(steps), Random(f"depth/{seed}/{step}")
        start = random.random()
        if self.per == "batch":
            return [sizes[int(start * len(sizes))]] * rows
        drawn = [sizes[int((row + start) / rows * len(sizes))] for row in range(rows)]
        random.shuffle(drawn)
        return drawn

    def canonical(self, steps: int) -> DepthSpec | None:
        """Returns the standard form of all laws that mean the same; None without an effect."""
        sizes = self.sizes(steps)
        last = self.backprop_last
        last = None if last is not None and last >= sizes[-1] else last
        if len(set(sizes)) == 1:
            if last is None and sizes[0] == steps:
                return None
            return DepthSpec(mean=sizes[0], backprop_last=last)
        update: dict[str, object] = {"mean": self.mean or steps, "backprop_last": last}
        if self.law == "uniform":
            low = self.min or 1
            update |= {"mean": None, "min": low, "max": self.max or 2 * (self.mean or steps) - low}
        elif self.min == 1:
            update["min"] = None  # the default
        return self.model_copy(update=update)

    def problems(self, loops: Sequence[Looping]) -> Iterator[tuple[Path, str]]:
        """Yields (path, message) for values that do not go with the loops of a model."""
        if not loops:
            yield (), "needs a loop with more than one pass among the blocks; there is none"
            return
        one, other = loops[0], next((at for at in loops if at.steps != loops[0].steps), None)
        if other and self.mean is None and self.needs_mean:
            found = f"{one} has {one.steps} steps and {other} has {other.steps}"
            yield (), f"mean must be given, as {found}"
            return
        if problem := self._problem(self.mean or one.steps):
            yield problem
            return
        sizes = self.sizes(one.steps)
        for loop in loops:
            if loop.most is not None and sizes[-1] > loop.most:
                found = f"but {loop} has weights for {loop.most}, each pass its own"
                yield ("mean" if self.mean else "law",), f"draws up to {sizes[-1]} passes, {found}"
            if self.backprop_last is not None and sizes[-1] > self.backprop_last:
                yield from self._cuts(loop, sizes)

    def _cuts(self, loop: Looping, sizes: tuple[int, ...]) -> Iterator[tuple[Path, str]]:
        """Yields the weights that would never get a gradient."""
        if not loop.injects:
            yield (
                ("backprop_last",),
                f"cuts the gradient to all that stands before {loop}, as its further passes do not "
                f"read its input: set {loop}.injection to add, or leave backprop_last out",
            )
        if loop.joins:
            yield (
                ("backprop_last",),
                f"does not go with kv: all, by which passes of {loop} attend to those without a "
                f"gradient: set {loop}.kv to own, or leave backprop_last out",
            )
        if loop.every:
            yield (
                ("backprop_last",),
                f"leaves passes without a gradient, but {loop}.{loop.every} learns from each of "
                "them: leave out one of the two",
            )
        for field in loop.own if self.backprop_last and sizes[0] > self.backprop_last else ():
            yield (
                ("backprop_last",),
                f"leaves the first pass of {loop} without a gradient in every step, but "
                f"{loop}.{field} has weights for that pass alone: use at least {sizes[0]}, or "
                "another law",
            )


class CapacitySpec(Strict):
    """The capacities of routers fall from 1 to their own in the first part of training.

    As in Mixture-of-Recursions (Bae et al. 2507.10524, in its public code): with the share t of the
    warm-up that has passed, a capacity c is c + (1 - c) (1 + cos(pi t)) / 2. Here the last factor
    is rounded to eighths, so that there are few graphs to compile.
    """

    warmup: float = Field(
        0.1, gt=0, le=1, description="the share of all training steps in which capacities fall"
    )

    def openness(self, step: int, steps: int) -> float:
        """Returns how far the capacities are from their own (0) towards 1 in a training step.

        ``step``: its number, counted from 0. ``steps``: the number of all training steps.
        """
        return self._at(step / (self.warmup * steps))

    def _at(self, share: float) -> float:
        return round(LEVELS * (1 + math.cos(math.pi * min(1.0, share))) / 2) / LEVELS

    def levels(self) -> dict[float, float]:
        """Returns the share of training in which capacities are as open as each of the levels."""
        shares = {0.0: 1 - self.warmup}
        for i in range(1000):
            level = self._at((i + 0.5) / 1000)
            shares[level] = shares.get(level, 0.0) + self.warmup / 1000
        return shares


class TrainingSpec(Strict):
    """What of the training makes the model what it is. It does not change the model's inference."""

    depth: DepthSpec | None = Field(
        None, description="the number of passes of all loops; default: their steps"
    )
    loss: Literal["last", "every_step"] = Field(
        "last",
        exclude_if=lambda loss: loss == "last",
        description="what is predicted from: the last pass; or every pass of the last loop, each "
        "through the last norm and the head",
    )
    loss_weights: PerStep[Annotated[float, Field(gt=0, le=1000)]] = Field(
        (1.0,),
        min_length=1,
        max_length=64,
        exclude_if=lambda weights: set(weights) == {1.0},
        description="the weight of each pass in the loss every_step, divided by their sum; further "
        "passes have the last one",
    )

    capacity: CapacitySpec | None = Field(
        None,
        exclude_if=lambda capacity: capacity is None,
        description="let the capacities of the routers fall from 1 to their own at the beginning",
    )

    router_z_loss: float = Field(
        0.0,
        ge=0,
        le=100,
        exclude_if=lambda weight: weight == 0,
        description="weight of the z-loss of routers: the mean square of a score",
    )
    router_aux_loss: float = Field(
        0.0,
        ge=0,
        le=100,
        exclude_if=lambda weight: weight == 0,
        description="weight of the auxiliary loss of routers: the cross-entropy of a score, as the "
        "log-odds of being selected, and the selection",
    )

    def problems(self, blocks: Structure) -> Iterator[tuple[Path, str]]:
        """Yields (path, message) for values that do not go with the blocks of a model."""
        if self.depth is not None:
            found = self.depth.problems(blocks.loops)
            yield from ((("depth", *path), said) for path, said in found)
        for name in ("router_z_loss", "router_aux_loss"):
            if getattr(self, name) and not any("router" in loop.own for loop in blocks.loops):
                yield (name,), "needs a router with learned scores; there is none among the blocks"
        if self.capacity is not None and not any(loop.routed for loop in blocks.loops):
            yield ("capacity",), "needs a router that selects fewer than all tokens; there is none"
        if self.loss == "every_step" and not blocks.ends_with_loop:
            yield (
                ("loss",),
                f"every_step needs a loop as the last block, and blocks.{blocks.last} is none: let "
                "the model end with a loop, or use loss: last",
            )
        ends = [loop for loop in blocks.loops if loop.path[:2] == ("blocks", blocks.last)]
        for loop in ends if self.loss == "every_step" else ():
            if loop.every:
                yield (
                    ("loss",),
                    f"every_step predicts from each pass alone, but {loop}.{loop.every} learns how "
                    "to weigh the passes: use loss: last, or leave the exit out",
                )
        cut = self.depth is not None and self.depth.backprop_last is not None
        if cut and set(self.loss_weights) != {1.0}:
            yield (
                ("loss_weights",),
                "must be equal beside depth.backprop_last, by which a pass has no fixed number "
                "among those that learn",
            )
        if self.loss == "last" and set(self.loss_weights) != {1.0}:
            yield ("loss_weights",), "only the loss every_step has weights, and loss is last"

    def pass_weights(self, count: int) -> list[float]:
        """Returns the weights of ``count`` passes in the loss, which sum up to 1."""
        given = self.loss_weights
        weights = [given[min(i, len(given) - 1)] for i in range(count)]
        return [weight / math.fsum(weights) for weight in weights]

    def without_problems(self, blocks: Structure) -> TrainingSpec:
        """Returns the same without the fields that do not go with the blocks of a model."""
        same, fields = self, type(self).model_fields
        while wrong := {str(path[0]) for path, _ in same.problems(blocks)}:
            same = same.model_copy(update={name: fields[name].default for name in wrong})
        return same

    def canonical(self, blocks: Structure) -> TrainingSpec | None:
        """Returns the standard form of all that mean the same; None without an effect."""
        same = self.without_problems(blocks)
        depth = same.depth and same.depth.canonical(blocks.loops[0].steps)
        weights = tuple(weight / same.loss_weights[0] for weight in same.loss_weights)
        while len(weights) > 1 and weights[-1] == weights[-2]:  # further ones are as the last
            weights = weights[:-1]
        same = same.model_copy(update={"depth": depth, "loss_weights": weights})
        return None if same == TrainingSpec() else same


@cache
def _poisson_lognormal(mean: int) -> Mapping[int, float]:
    """Returns the probabilities of the numbers of passes, in rising order, without the last 1e-6.

    The log-normal rate is taken at 99 evenly spaced quantiles.
    """
    rate = NormalDist(math.log(mean) - SPREAD**2 / 2, SPREAD)
    rates = [math.exp(rate.inv_cdf((i + 0.5) / 99)) for i in range(99)]
    terms = [math.exp(-rate) / 99 for rate in rates]
    found: dict[int, float] = {}
    missing = 1.0
    while missing > 1e-6:
        number = len(found) + 1
        found[number] = math.fsum(terms)
        missing -= found[number]
        terms = [term * rate / number for term, rate in zip(terms, rates, strict=True)]
    return found


def _representatives(shares: Mapping[int, float]) -> tuple[int, ...]:
    """Returns the rounded means of the six sixths of a distribution, in rising order.

    ``shares``: the probability of each number; the numbers rise.
    """
    each = math.fsum(shares.values()) / SIZES
    means: list[int] = []
    total, room = 0.0, each
    for number, share in shares.items():
        while share > room and len(means) < SIZES - 1:
            means.append(round((total + number * room) / each))
            share, total, room = share - room, 0.0, each
        total, room = total + number * share, room - share
    return (*means, round(total / (each - room)))
