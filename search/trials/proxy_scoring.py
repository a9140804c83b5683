"""Measure the held-out quality of a proxy and the behaviour of its routers.

Shapes: B is the batch, T the tokens and D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archdsl.evaluation.evaluate import Evaluation
from archdsl.model.compute_meter import Meter
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from archdsl.nn.loop import Router, Selection, Step
from archdsl.training.trainer import Trainer


@dataclass
class RouterHealth:
    """How undecided the routers are: the entropy of their choices, by loop and step.

    ``bits``: the sum of the entropies over tokens, in bits. ``tokens``: the number of tokens.
    """

    bits: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def entropies(self) -> dict[str, float]:
        """The mean entropy per token in bits, from 0 to 1, by loop and step."""
        return {name: total / max(1, self.tokens[name]) for name, total in self.bits.items()}

    def add(self, other: RouterHealth) -> None:
        """Add what was noted of the same routers on other tokens."""
        for name, bits in other.bits.items():
            self.bits[name] = self.bits.get(name, 0.0) + bits
            self.tokens[name] = self.tokens.get(name, 0) + other.tokens[name]

    def note(
        self, router: Router, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None
    ) -> None:
        """Add the entropies of the choice that the router has just made with these arguments.

        ``active_BT``: True for tokens that the router may select; None means all tokens. Padding
        is left out.
        """
        bits_BT = entropy(router.scores(x_BTD, at.row, ctx))
        for asked_BT in (active_BT, ctx.stream.real(x_BTD)):
            if asked_BT is not None:
                bits_BT = bits_BT.where(asked_BT, torch.nan)
        self.bits[at.name] = self.bits.get(at.name, 0.0) + float(bits_BT.nansum())
        self.tokens[at.name] = self.tokens.get(at.name, 0) + int((~bits_BT.isnan()).sum())


def entropy(score_BT: Tensor) -> Tensor:
    """Return the entropy of each choice in bits, [B, T]; a score is the log-odds of selection."""
    score_BT = score_BT.float()
    nats_BT = F.softplus(score_BT) - score_BT * score_BT.sigmoid()
    return nats_BT / torch.log(torch.tensor(2.0))


@dataclass(frozen=True)
class HeldOutScores:
    """A held-out evaluation. ``meter`` and ``health`` were measured in its causal passes."""

    evaluation: Evaluation
    meter: Meter
    health: RouterHealth


def held_out(
    trainer: Trainer, heartbeat: Callable[[], None], tokens: int | None = None
) -> HeldOutScores:
    """Evaluate the model as trained so far, and call ``heartbeat`` after each forward pass.

    ``tokens``: the number of held-out tokens; None: as many as the config of the trainer says.
    All processes that train the model call this together. Raises TrainingDiverged if the loss is
    not finite.
    """
    own = Meter(), RouterHealth()
    evaluation = trainer.evaluate(tokens, lambda: _watched(trainer.model, heartbeat, *own))
    meter, health = Meter(), RouterHealth()
    for metered, noted in trainer.ranks.gather(own):
        meter.add(metered)
        health.add(noted)
    return HeldOutScores(evaluation, meter, health)


@contextmanager
def _watched(
    model: LanguageModel, heartbeat: Callable[[], None], meter: Meter, health: RouterHealth
) -> Iterator[None]:
    def after_pass(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        heartbeat()
        if not model.leaks:  # a model that leaks is also evaluated causally, and only that counts
            meter.note(model, *args)

    def after_choice(router: nn.Module, args: tuple[Any, ...], _: Selection) -> None:
        assert isinstance(router, Router)
        if not model.leaks:
            health.note(router, *args)

    with ExitStack() as hooks:
        hooks.enter_context(_removed(model.register_forward_hook(after_pass)))
        for router in model.routers:
            if router.learned:
                hooks.enter_context(_removed(router.register_forward_hook(after_choice)))
        yield


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove the hook at the end of the ``with`` block."""
    try:
        yield
    finally:
        handle.remove()
