"""What `compare` trains: given models, one of which is the reference, on the same tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import sequence_cost
from archdsl.errors import ArchdslError, Problem, SpecError, blamed_on
from archdsl.evaluation.evaluate import check_data_fits
from archdsl.lang.load import Source, load
from archdsl.lang.spec import ModelSpec, walk
from archdsl.search.analysis.baselines import Specs, with_depth_for
from archdsl.search.analysis.comparison import JobResult, Key, Role, trainings
from archdsl.search.trials.proxy import Job, Proxy, ProxyError, ProxyScore, Task

POINTS = 12  # held-out losses on the way of a training
FIRST_PART = 3  # of the points: what `--plan` trains
MOST_TIMES = 64  # as many layers as it has, at most, does a model get to match the reference
MOST_WIDER = 4  # than the reference, or less wide

LR_SEED = 0  # of the trainings that choose a learning rate; those of the comparison begin with 1

Match = Literal["params", "flops", "none"]
LrKey = tuple[str, str, float]  # name, task, learning rate


@dataclass(frozen=True)
class CompareSetup:
    """What is compared: the specs by task and name, of the size that is trained.

    ``reference`` is the name of the model that the others are compared with. ``lrs``: the learning
    rates, in rising order, of which each model gets its best; empty: all have that of the task.
    ``lr_losses``: of the trainings that choose it, by name and task, then by learning rate.
    """

    small: dict[str, Specs]
    reference: str
    proxy: Proxy
    lrs: tuple[float, ...] = ()
    lr_losses: Mapping[tuple[str, str], Mapping[float, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the models, the reference first."""
        names = list(next(iter(self.small.values())))
        return sorted(names, key=lambda name: name != self.reference)

    @property
    def main_specs(self) -> Specs:
        """The specs as they are trained on the first task."""
        return next(iter(self.small.values()))

    @property
    def comparisons(self) -> int:
        """The number of loss differences, whose intervals hold together."""
        return (len(self.names) - 1) * len(self.proxy.tasks)

    @property
    def digest(self) -> str:
        """A hash of the models and of how they are trained, without the number of seeds."""
        models = {
            t: {n: s.fingerprint() for n, s in small.items()} for t, small in self.small.items()
        }
        parts = [models, self.reference, self.proxy.model_dump(mode="json")]
        text = json.dumps([*parts, self.lrs] if self.lrs else parts)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def role(self, name: str) -> Role:
        """Return ``reference`` or ``model``."""
        return "reference" if name == self.reference else "model"

    def jobs(self, seeds: int, store: Path, *, first_part: bool = False) -> dict[Key, Job]:
        """Return the trainings with the seeds 1 to ``seeds``.

        With ``first_part`` they end after the first rung, from which the others go on.
        """
        found = trainings(self.names, self.small, self.proxy, range(1, 1 + seeds), store)
        if self.lr_losses:
            found = {key: _at_lr(job, self.lr(*key[:2])) for key, job in found.items()}
        if not first_part:
            return found
        return {key: replace(job, steps=job.task.rungs[0]) for key, job in found.items()}

    def lr_jobs(self, store: Path) -> dict[LrKey, Job]:
        """Return the trainings that choose the learning rates: each model with each of them."""
        found = trainings(self.names, self.small, self.proxy, [LR_SEED], store)
        return {
            (name, task, lr): _at_lr(job, lr)
            for (name, task, _), job in found.items()
            for lr in self.lrs
        }

    def with_lr_results(self, results: Mapping[LrKey, JobResult]) -> CompareSetup:
        """Return the setup with the results of all `lr_jobs`.

        Raises ArchdslError if one of them failed, because a failure tells nothing of the rate.
        """
        losses: dict[tuple[str, str], dict[float, float]] = {}
        for (name, task, lr), result in results.items():
            if not isinstance(result, ProxyScore):
                what = f"{name} on {task} with learning rate {lr:g}"
                raise ArchdslError(f"{what}: {result}; run the same command again to continue")
            loss = result.loss
            losses.setdefault((name, task), {})[lr] = math.inf if loss is None else loss
        return replace(
            self, lr_losses={k: dict(sorted(tried.items())) for k, tried in losses.items()}
        )

    def lr(self, name: str, task: str) -> float:
        """Return the learning rate of a model: the one with its lowest held-out loss."""
        tried = self.lr_losses.get((name, task))
        return min(tried, key=tried.__getitem__) if tried else self.proxy.tasks[task].lr


def _at_lr(job: Job, lr: float) -> Job:
    return replace(job, task=job.task.model_copy(update={"lr": lr}))


# what is compared


def trained_as(
    sizes: str | None,
    data: str | None,
    tasks: Sequence[str],
    *,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
) -> Proxy:
    """Return how models are trained. The arguments are those of `compare`.

    Raises ProxyError if ``sizes`` are not understood, or the context has no room for a target, and
    DataError if the data of a task cannot be loaded.
    """
    if context is not None and context < 2:
        raise ProxyError(f"context: must be at least 2 tokens, got {context}")
    base = Proxy.parse(sizes, data)
    named = dict(base.tasks)
    if data is None and tasks:
        named.pop("skill")
    for source in tasks:
        (task,) = Proxy.parse(sizes, source).tasks.values()
        named[_task_name(source, named)] = task
    update = {"context": context, "batch_size": batch_size, "lr": lr}
    given = {name: value for name, value in update.items() if value is not None}
    return base.model_copy(
        update={
            "tasks": {n: _timed(task.model_copy(update=given), tokens) for n, task in named.items()}
        }
    )


def _task_name(source: str, known: dict[str, Task]) -> str:
    name = source.removeprefix("skill:").partition(",")[0] or source
    if name not in known:
        return name
    return next(f"{name}-{i}" for i in range(2, 2 + len(known) + 1) if f"{name}-{i}" not in known)


def _timed(task: Task, tokens: int | None) -> Task:
    """Return the task with two rungs, and with ``POINTS`` held-out losses on the way.

    No more held-out tokens are read than the training has.
    """
    steps, of_step = task.rungs[-1], task.batch_size * task.length
    if tokens is not None:
        steps = max(1, round(tokens / of_step))
    every = max(1, steps // POINTS)
    steps = max(1, steps // every) * every  # the last point is that of the last step
    first = min(steps, FIRST_PART * every)
    update = {
        "rungs": (first, steps),
        "held_out_every": every,
        "early_eval_tokens": 0,  # `--plan` measures how much seeds differ
        "eval_tokens": min(task.eval_tokens, steps * of_step),
    }
    return task.model_copy(update=update)


def compare_setup(
    specs: Sequence[Source],
    proxy: Proxy,
    *,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    match: Match = "none",
    lrs: Sequence[float] = (),
) -> CompareSetup:
    """Return what `compare` trains. Raises SpecError if a spec or a name is wrong.

    ``lrs``: more than one learning rate are tried with each model, see `CompareSetup`.
    """
    full = _named([load(source, overrides=overrides) for source in specs])
    chosen = reference or next(iter(full))
    if chosen not in full:
        raise SpecError(Problem("reference", f"must be one of {', '.join(full)}, got {chosen!r}"))
    proxy = _in_proportion(proxy, full, full[chosen])
    small: dict[str, Specs] = {}
    for task, given in proxy.tasks.items():
        sized = {name: proxy.shrink(spec, given) for name, spec in full.items()}
        small[task] = {n: _matched(spec, sized[chosen], match) for n, spec in sized.items()}
        for name, spec in small[task].items():
            with blamed_on("specs"):
                check_data_fits(spec.model_copy(update={"name": name}), given.load(), given.context)
    tried = tuple(sorted(set(lrs)))
    return CompareSetup(small, chosen, proxy, tried if len(tried) > 1 else ())


def _in_proportion(proxy: Proxy, full: Specs, reference: ModelSpec) -> Proxy:
    """Return the proxy that keeps the ratios of the models' widths, and of their layers.

    Raises SpecError if the widths are too different for that.
    """
    if proxy.dim is None:
        return proxy
    copies = {name: _copies(spec) for name, spec in full.items()}
    if len({frozenset(found) for found in copies.values()}) > 1:
        least = min(count for found in copies.values() for count in found)
        proxy = proxy.model_copy(update={"of_repeat": max(least, proxy.repeat)})
    if all(spec.dim == reference.dim for spec in full.values()):
        return proxy
    for name, spec in full.items():
        if not 1 / MOST_WIDER <= spec.dim / reference.dim <= MOST_WIDER:
            message = (
                f"{name} has the width {spec.dim} and {reference.name} {reference.dim}, and small "
                f"proxies cannot have such a ratio; compare models whose widths differ by at most "
                f"a factor of {MOST_WIDER}, or train the models themselves (--proxy none)"
            )
            raise SpecError(Problem("specs", message))
    return proxy.relative_to(reference)


def _copies(spec: ModelSpec) -> set[int]:
    """Return the numbers of copies of the stacks that are repeated."""
    return {part.repeat for _, part in walk(spec) if isinstance(part, StackSpec)} - {1}


def _named(specs: Sequence[ModelSpec]) -> Specs:
    if len(specs) < 2:
        raise SpecError(Problem("specs", "at least two specs are needed, to compare them"))
    found: Specs = {}
    for spec in specs:
        if spec.name in found:
            message = f"two specs have the name {spec.name!r}; give one of them another `name:`"
            raise SpecError(Problem("specs", message))
        found[spec.name] = spec
    return found


def _matched(spec: ModelSpec, reference: ModelSpec, match: Match) -> ModelSpec:
    """Return the spec with as many layers as bring its costs closest to the reference's.

    Raises SpecError if that needs too many of them.
    """
    if match == "none" or spec is reference:
        return spec
    target = getattr(sequence_cost(reference), match)
    if target > MOST_TIMES * getattr(sequence_cost(spec), match):
        raise SpecError(
            Problem(
                "match",
                f"{reference.name} costs more than {MOST_TIMES} times as much as {spec.name}, "
                "and would need as many times its layers; compare models of similar sizes",
            )
        )
    return with_depth_for(spec, target, match).model_copy(update={"budget": None})
