"""A proxy's held-out quality, and what its routers did meanwhile.

Shapes: B batch, T tokens, D width.
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
from archdsl.nn.block import Context
from archdsl.nn.loop import Choice, Router, Step
from archdsl.training.trainer import Trainer


@dataclass
class RouterHealth:
    """How undecided routers are: the entropy of selecting a token, in bits, by loop and step."""

    bits: dict[str, float] = field(default_factory=dict)  # sums over tokens
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def entropies(self) -> dict[str, float]:
        return {name: total / max(1, self.tokens[name]) for name, total in self.bits.items()}

    def note(
        self, router: Router, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None
    ) -> None:
        """Adds the choice that the router has just made with these arguments."""
        bits_BT = entropy(router.scores(x_BTD, at.row, ctx))
        for asked_BT in (active_BT, ctx.stream.real(x_BTD)):
            if asked_BT is not None:
                bits_BT = bits_BT.where(asked_BT, torch.nan)
        self.bits[at.name] = self.bits.get(at.name, 0.0) + float(bits_BT.nansum())
        self.tokens[at.name] = self.tokens.get(at.name, 0) + int((~bits_BT.isnan()).sum())


def entropy(score_BT: Tensor) -> Tensor:
    """Bits, of a yes or no whose log-odds is the score."""
    score_BT = score_BT.float()
    nats_BT = F.softplus(score_BT) - score_BT * score_BT.sigmoid()
    return nats_BT / torch.log(torch.tensor(2.0))


@dataclass(frozen=True)
class HeldOutScores:
    """A held-out evaluation; ``meter`` and ``health`` are of its causal passes."""

    evaluation: Evaluation
    meter: Meter
    health: RouterHealth


def held_out(trainer: Trainer, heartbeat: Callable[[], None]) -> HeldOutScores:
    """Scores what was trained so far. Raises TrainingDiverged."""
    with _watched(trainer, heartbeat) as (meter, health):
        return HeldOutScores(trainer.evaluate(), meter, health)


@contextmanager
def _watched(
    trainer: Trainer, heartbeat: Callable[[], None]
) -> Iterator[tuple[Meter, RouterHealth]]:
    model, meter, health = trainer.model, Meter(), RouterHealth()

    def after_pass(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        heartbeat()
        if not model.leaks:  # leaking models are scored causally, too
            meter.note(model, *args)

    def after_choice(router: nn.Module, args: tuple[Any, ...], _: Choice) -> None:
        assert isinstance(router, Router)
        if not model.leaks:
            health.note(router, *args)

    with ExitStack() as hooks:
        hooks.enter_context(_removed(model.register_forward_hook(after_pass)))
        for router in model.routers:
            if router.learned:
                hooks.enter_context(_removed(router.register_forward_hook(after_choice)))
        yield meter, health


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """At the end of the block."""
    try:
        yield
    finally:
        handle.remove()
