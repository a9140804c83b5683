"""A trial: one point of the search space, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution

from archdsl.lang.source import parse
from archdsl.lang.spec import ModelSpec, parse_spec
from archdsl.search.stats.pareto import Point
from archdsl.search.trials.proxy import ProxyScore

Scores = dict[str, ProxyScore]  # by task
UNTRAINED = ("infeasible", "invalid", "reused")  # outcomes of trials that need no training


@dataclass(frozen=True)
class Trial:
    """One point of the search space, as proposed, as far as it was trained, or finished.

    ``params`` and ``distributions``: the chosen values, and what they were chosen from, by the name
    of the choice. ``constraints``: for each limit of the budget, by what share the model exceeds
    it; at most 0 if it keeps to the limit. ``spec_yaml``: the spec of the full-size model; empty if
    the choices do not make a valid model. ``outcome``: empty until the trial is finished or needs
    no training, then complete (trained on all rungs), pruned, diverged, failed, or one of
    ``UNTRAINED``. ``rungs``: the scores of each rung that was trained. ``losses``: the objective
    loss at each of them. ``others``: the objectives after the loss, at the last of them.
    ``values``: all objectives by name; None unless the trial is complete. ``same_as``: the number
    of an earlier trial of the same model.
    """

    number: int
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)
    spec_yaml: str = ""
    fingerprint: str = ""
    outcome: str = ""
    rungs: tuple[Scores, ...] = ()
    losses: tuple[float, ...] = ()
    others: Point = ()
    values: dict[str, float] | None = None
    error: str = ""
    same_as: int | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        """The full-size model. Raises SpecError if the trial has none."""
        return parse_spec(parse(self.spec_yaml, f"trial {self.number}"))

    @property
    def choices(self) -> dict[str, Any]:
        """``params`` as a person would write them: Optuna's 0.6000000000000001 as 0.6."""
        return {name: _rounded(value) for name, value in self.params.items()}

    @property
    def value(self) -> float | None:
        """The objective loss; None unless the trial is complete."""
        return self.values["loss"] if self.values else None

    @property
    def point(self) -> Point:
        """All objectives, the loss first. For complete trials only."""
        assert self.values is not None
        return tuple(self.values.values())

    @property
    def complete(self) -> bool:
        """Whether the trial was trained on all rungs."""
        return self.outcome == "complete"


@dataclass(frozen=True)
class RunningTrial(Trial):
    """A trial that this process trains.

    ``attempt_id``: the trial of Optuna's storage that records it. ``earlier``: the trials that
    decide whether it is promoted to the next rung.
    """

    attempt_id: int = -1
    earlier: tuple[Trial, ...] = ()


def _rounded(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value
