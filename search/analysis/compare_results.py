"""What a comparison of given models shows: figures with intervals, and differences.

Differences are those of a model minus the reference, paired by seed. A loss is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from archdsl.costs.receipt import cost, train_flops
from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.compare_setup import CompareSetup
from archdsl.search.analysis.comparison import ComparisonEntry
from archdsl.search.stats.paired import MOST_SEEDS, Difference, half_width, paired, seeds_to_tell
from archdsl.search.trials.proxy import ProxyScore, Task


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, and half the width of its 95% interval (infinite with one seed)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of at least one value."""
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return cls(fmean(values), math.inf)
        return cls(fmean(values), half_width(stdev(values), len(values)))

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """Return ``1.234 ± 0.010``; without an interval if there is none."""
        mean = f"{self.mean * scale:.{digits}f}"
        if not math.isfinite(self.half_width):
            return mean
        return f"{mean} ± {self.half_width * scale:.{digits}f}"

    def as_json(self) -> dict[str, float | None]:
        """Return both figures, null for what is not finite."""
        return {"mean": finite(self.mean), "half_width": finite(self.half_width)}


@dataclass(frozen=True)
class DataShare:
    """The share of the tokens after which a model has the reference's final loss.

    ``share``: over the seeds in which it has it; None if there are none. ``reached``: their number,
    of ``seeds``.
    """

    share: Estimate | None
    reached: int
    seeds: int

    def __str__(self) -> str:
        if self.share is None:
            return "not reached"
        only = "" if self.reached == self.seeds else f" ({self.reached} of {self.seeds} seeds)"
        return f"{self.share.text(0, 100)}%{only}"


@dataclass(frozen=True)
class TaskResult:
    """A model on a task: ``scores`` by seed, and those of the ``reference`` with the same seeds.

    ``trained``: its spec of the size that was trained. ``comparisons``: the number of loss
    differences whose intervals hold together.
    """

    trained: ModelSpec
    task: Task
    scores: Sequence[ProxyScore]
    reference: Sequence[ProxyScore]
    comparisons: int

    @cached_property
    def loss(self) -> Estimate:
        """The held-out loss."""
        return Estimate.of(_losses(self.scores))

    @cached_property
    def difference(self) -> Difference:
        """The held-out loss minus the reference's."""
        return paired(_losses(self.scores), _losses(self.reference), self.comparisons)

    @cached_property
    def accuracy(self) -> Estimate | None:
        """The share of right predictions."""
        return self._estimate(lambda score: score.accuracy)

    @cached_property
    def accuracy_difference(self) -> Difference | None:
        """The accuracy minus the reference's."""
        own, other = ([s.accuracy for s in some] for some in (self.scores, self.reference))
        if None in own or None in other:
            return None
        return paired(own, other, self.comparisons)  # type: ignore[arg-type]

    @cached_property
    def bits_per_byte(self) -> Estimate | None:
        """The loss in bits per byte; None if the data are not text."""
        return self._estimate(lambda score: score.bits_per_byte)

    @cached_property
    def flops(self) -> Estimate | None:
        """Forward FLOPs per token, as executed on the held-out data."""
        return self._estimate(lambda score: score.flops_per_token)

    @cached_property
    def tokens_per_second(self) -> Estimate | None:
        """Training tokens per second of one worker, without evaluations."""
        tokens = self.task.batch_size * self.task.length
        return self._estimate(
            lambda s: s.steps * tokens / s.step_seconds if s.step_seconds else None
        )

    @property
    def peak_bytes(self) -> int:
        """The largest memory of a worker that trained the model."""
        return max(score.peak_bytes for score in self.scores)

    @property
    def tokens(self) -> int:
        """The training tokens."""
        return self.task.batch_size * self.task.length * self.task.rungs[-1]

    @cached_property
    def step_flops(self) -> float:
        """The FLOPs of a training step, at the capacities of the routers."""
        return train_flops(self.trained, tokens=self.task.length) * self.task.batch_size

    @cached_property
    def data_share(self) -> DataShare:
        """When the model had the final loss of the reference, seed by seed."""
        pairs = zip(self.scores, self.reference, strict=True)
        shares = [
            _share(own.held_out, other.held_out)
            if own.loss is not None and other.loss is not None  # else the last loss is not final
            else None
            for own, other in pairs
        ]
        known = [share for share in shares if share is not None]
        return DataShare(Estimate.of(known) if known else None, len(known), len(shares))

    def _estimate(self, of: Callable[[ProxyScore], float | None]) -> Estimate | None:
        values = [of(score) for score in self.scores]
        known = [value for value in values if value is not None]
        return Estimate.of(known) if len(known) == len(values) and known else None


def _losses(scores: Sequence[ProxyScore]) -> list[float]:
    return [math.inf if score.loss is None else score.loss for score in scores]


Points = Sequence[tuple[int, float]]  # training step, held-out loss


def _share(own: Points, reference: Points) -> float | None:
    """Return the share of the steps after which ``own`` first has the reference's last loss.

    Between two points the loss is taken as a straight line; before the first it is not known, so
    that the share is at least that of the first point. None if it never has it.
    """
    if not own or not reference:
        return None
    goal = reference[-1][1]
    before: tuple[int, float] | None = None
    for step, loss in own:
        if loss <= goal:
            if before is None or before[1] == loss:
                return step / own[-1][0]
            part = (before[1] - goal) / (before[1] - loss)
            return (before[0] + part * (step - before[0])) / own[-1][0]
        before = (step, loss)
    return None


def task_results(
    setup: CompareSetup, entries: Sequence[ComparisonEntry]
) -> dict[str, dict[str, TaskResult]]:
    """Return the results by task and model, for models that could be trained, if the reference was.

    The reference comes first; all have the same seeds.
    """
    known = [entry for entry in entries if not entry.error]
    own = next((entry for entry in known if entry.role == "reference"), None)
    if own is None:
        return {}
    return {
        name: {
            entry.name: TaskResult(
                setup.small[name][entry.name],
                task,
                entry.scores[name],
                own.scores[name],
                setup.comparisons,
            )
            for entry in known
        }
        for name, task in setup.proxy.tasks.items()
    }


# sentences


def sentences(setup: CompareSetup, entries: Sequence[ComparisonEntry]) -> dict[str, str]:
    """Say of each model but the reference whether it is better, by how much, and how surely.

    The last sentence, ``intervals``, says what the intervals are.
    """
    found = task_results(setup, entries)
    failed = {e.name: f"could not be trained: {e.error}." for e in entries if e.error}
    if not found:
        return failed or {"": "No seed has been trained with all models yet: nothing is known."}
    first = next(iter(found.values()))
    reference, *others = first
    said = {
        name: f"with {_costs(first[name], first[reference])}: "
        f"{'; '.join(_on_task(task, of[name], reference) for task, of in found.items())}."
        for name in others
    }
    return {**said, **failed, "intervals": _how_sure(first[reference])}


def _how_sure(one: TaskResult) -> str:
    seeds = len(one.scores)
    if seeds == 1:
        return "With one seed there is no interval, so nothing is shown; use --seeds."
    many = f"the {one.comparisons} loss differences" if one.comparisons > 1 else "the difference"
    together = " together (Bonferroni)" if one.comparisons > 1 else ""
    return f"Over {seeds} seeds; the intervals of {many} hold{together} with 95%."


def _on_task(name: str, found: TaskResult, reference: str) -> str:
    gap = found.difference
    if not math.isfinite(gap.mean):
        return f"on {name} a training diverged"
    said = f"on {name} {_than(gap, reference, found.comparisons)}"
    if found.accuracy_difference is not None and found.bits_per_byte is None:
        said += f", its accuracy {_points(found.accuracy_difference)}"
    share = found.data_share
    if gap.conclusion == "higher" and share.reached == share.seeds:
        said += f"; it had the final loss of {reference} after {share} of the tokens"
    return said


def _than(gap: Difference, reference: str, comparisons: int) -> str:
    """Say which loss is lower. ``conclusion`` speaks of the reference, which is subtracted."""
    side = "below" if gap.mean < 0 else "above"
    if gap.pairs == 1:
        return f"its loss is {abs(gap.mean):.3f} nats {side} that of {reference}"
    amount = f"its loss is {abs(gap.mean):.3f} ± {gap.half_width:.3f} nats {side}"
    if gap.conclusion == "cannot tell":
        seeds = seeds_to_tell(gap.deviation, gap.mean, comparisons)
        many = f"{seeds}" if seeds else f"more than {MOST_SEEDS}"
        return f"cannot be told from {reference}: {amount} (about {many} seeds would tell so much)"
    return f"is {'better' if gap.mean < 0 else 'worse'} than {reference}: {amount}"


def _costs(found: TaskResult, reference: TaskResult) -> str:
    """Say what a model costs, in parts of what the reference costs."""
    ratios = {"parameters": cost(found.trained).params / cost(reference.trained).params}
    if found.flops and reference.flops:
        ratios["FLOPs per token"] = found.flops.mean / reference.flops.mean
    return " and ".join(f"{ratio:.2f} times the {name}" for name, ratio in ratios.items())


def _points(gap: Difference) -> str:
    width = f" ± {100 * gap.half_width:.1f}" if math.isfinite(gap.half_width) else ""
    return f"{100 * gap.mean:+.1f}{width} points"


def finite(value: float) -> float | None:
    """Return the value, or None for infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def as_json(
    setup: CompareSetup, entries: Sequence[ComparisonEntry]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all figures by task and model."""
    return {
        task: {name: _figures(found) for name, found in by_model.items()}
        for task, by_model in task_results(setup, entries).items()
    }


def _figures(found: TaskResult) -> dict[str, Any]:
    share = found.data_share
    estimates = {
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
        "executed_flops_per_token": found.flops,
        "tokens_per_second": found.tokens_per_second,
        "data_share": share.share,
    }
    return {
        **{name: value.as_json() if value else None for name, value in estimates.items()},
        "data_share_reached": share.reached,
        "difference": _difference(found.difference),
        "accuracy_difference": _difference(found.accuracy_difference),
        "params": cost(found.trained).params,
        "tokens": found.tokens,
        "train_flops": found.step_flops * found.task.rungs[-1],
        "peak_bytes": found.peak_bytes,
        "scores": [score.model_dump(mode="json") for score in found.scores],
    }


def _difference(gap: Difference | None) -> dict[str, Any] | None:
    if gap is None:
        return None
    return {
        "mean": finite(gap.mean),
        "half_width": finite(gap.half_width),
        "deviation": finite(gap.deviation),
        "seeds": gap.pairs,
    }
