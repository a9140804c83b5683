"""The result of a search that never ran: real specs, scores and sums, made up losses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from archdsl.costs.receipt import cost
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget, ModelSpec, parse_spec
from archdsl.lang.template import Choice, Distribution, fill
from archdsl.search.analysis.comparison import ComparisonEntry, Role
from archdsl.search.analysis.proxy_validation import ProxyValidation, WiderPoint
from archdsl.search.analysis.supernet_validation import SupernetPoint, SupernetValidation
from archdsl.search.report.report import SearchReport
from archdsl.search.space.objectives import FLOPS, LOSS, others
from archdsl.search.stats.paired import Correlation
from archdsl.search.study.settings import Settings
from archdsl.search.study.spending import Limits, SpendingSummary, Spent
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy, Task, objective
from archdsl.search.trials.proxy_training import ProxyScore

SPACE = """
name: small
vocab_size: 32000
context: 1024
dim: {search: {choices: [512, 768, 1024], default: 768}}
blocks:
  - kind: stack
    repeat: 4
    body:
      - &layer {kind: layer, attention: {head_size: 64}, ffn: {ratio: 2.5}}
      - search:
          default: itt
          choices:
            plain: *layer
            itt:
              kind: loop
              steps: {search: {low: 2, high: 4, default: 4}}
              router:
                kind: {search: {choices: [prefix, random], default: prefix}}
                capacity: {search: {low: 0.3, high: 0.9, step: 0.1, default: 0.7}}
              residual: {kind: {search: {choices: [thinking, overwrite], default: thinking}}}
              body: *layer
  - *layer
"""
PROXY = Proxy(
    dim=32,
    tasks={
        "text": Task(rungs=(50, 100, 200)),
        "skill": Task(data="skill:p-hop,hops=1,length=12", rungs=(100, 200, 400), weight=0.15),
    },
)
BASELINES = ("equal-parameters plain", "equal-FLOPs plain", "equal-FLOPs Loop")


def made_up(
    trials: int = 30, seeds: int = 3, seed: int = 0, axes: tuple[str, ...] = (LOSS, FLOPS)
) -> dict[str, Any]:
    """As `result.json` of a search over ``trials`` trials; the same for the same arguments."""
    return made_up_report(trials, seeds, seed, axes).as_json()


def made_up_report(
    trials: int = 30, seeds: int = 3, seed: int = 0, axes: tuple[str, ...] = (LOSS, FLOPS)
) -> SearchReport:
    rng = random.Random(seed)
    made = [_trial(number, axes, rng) for number in range(trials)]
    done = [one for one in made if one.value is not None]
    best = min(done, key=lambda one: one.value or 0.0)
    outcomes = [one.outcome for one in made]
    correlation = Correlation(0.71, 0.42, 0.93, min(8, len(done)))
    of_best = [best, *(one for one in done if one is not best)]  # the winner is trained alone, too
    points = [(one.number, one.value or 0.0) for one in of_best[:8]]
    return SearchReport(
        folder=Path("runs/small"),
        settings=Settings(parse(SPACE, "small.yaml"), Budget(params=162_000_000), PROXY, axes),
        trials=made,
        outcomes={name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        entries=_entries(best, seeds, rng),
        proxy_validation=ProxyValidation(
            between_rungs=Correlation(0.62, 0.41, 0.8, len(done)),
            wider=correlation,
            width=64,
            points=[WiderPoint(n, loss, 0.8 * loss + rng.gauss(0, 0.03)) for n, loss in points],
        ),
        supernet_validation=SupernetValidation(
            correlation=Correlation(0.55, 0.2, 0.85, len(points)),
            points=[
                SupernetPoint(n, loss + rng.gauss(0.2, 0.05), loss, 5e12) for n, loss in points
            ],
            settings=24,
            shared_flops=4.1e12,
        ),
        spending=SpendingSummary(598.2, _spent(), workers=2),
        limits=Limits(seconds=600),
        importance={"blocks.0.body.1": 0.46, "dim": 0.31, "blocks.0.body.1[itt].steps": 0.23},
        interrupted=False,
    )


def _spent() -> dict[str, Spent]:
    return {
        "search": Spent(810.0, 4.4e13, 5e12, 60),
        "baselines": Spent(250.0, 1.4e13, 2e12, 12),
        "proxy validation": Spent(70.0, 4e12, 1e12, 8),
    }


def _point(rng: random.Random) -> tuple[dict[str, Any], ModelSpec]:
    picked: dict[str, Any] = {}

    def pick(name: str, distribution: Distribution) -> Any:
        if isinstance(distribution, Choice):
            picked[name] = rng.choice(list(distribution.choices))
        else:
            step = distribution.step or 1
            value = distribution.low + step * rng.randrange(
                round((distribution.high - distribution.low) / step) + 1
            )
            picked[name] = int(value) if distribution.is_whole else round(value, 3)
        return picked[name]

    return picked, parse_spec(fill(parse(SPACE, "small.yaml"), pick))


def _trial(number: int, axes: tuple[str, ...], rng: random.Random) -> Trial:
    choices, spec = _point(rng)
    flops = cost(spec).expected
    outcome = rng.choice(["complete", "complete", "pruned", "pruned", "diverged", "failed"])
    rungs_reached = {"complete": 3, "pruned": rng.randint(1, 2), "diverged": 1, "failed": 0}[
        outcome
    ]
    quality = 2.2 + 0.9 / (flops / 1e8) ** 0.5 + rng.gauss(0, 0.02)
    rungs = [_scores(spec, quality, rung, rng) for rung in range(rungs_reached)]
    if outcome == "diverged":
        rungs = [{task: s.model_copy(update={"loss": None}) for task, s in rungs[0].items()}]
    loss = objective(rungs[-1], PROXY) if outcome == "complete" else None
    return Trial(
        number=number,
        spec_yaml=spec.to_yaml(),
        fingerprint=spec.fingerprint(),
        params=choices,
        outcome=outcome,
        values=None
        if loss is None
        else dict(zip(axes, (loss, *others(axes, spec, spec, {})), strict=True)),
        rungs=tuple(rungs),
        error="out of memory" if outcome == "failed" else "",
    )


def _scores(
    spec: ModelSpec, quality: float, rung: int, rng: random.Random
) -> dict[str, ProxyScore]:
    return {
        name: _score(spec, name, quality, task.rungs[rung], rng)
        for name, task in PROXY.tasks.items()
    }


def _score(
    spec: ModelSpec, task: str, quality: float, steps: int, rng: random.Random
) -> ProxyScore:
    routed = "router" in spec.to_yaml()
    names = [f"blocks.0.blocks.{loop}.{step}" for loop in (1, 3) for step in range(3)]

    def loss(at: int) -> float:
        return quality + 3 * 0.985**at + rng.gauss(0, 0.01)

    return ProxyScore(
        steps=steps,
        loss=loss(steps),
        accuracy=min(1.0, 0.9 / quality),
        bits_per_byte=quality / 0.7 if task == "text" else None,
        seconds=steps / 25,
        train_flops=steps * 1e9,
        eval_flops=1e10,
        flops_per_token=3e6,
        shares={name: rng.uniform(0.2, 0.9) for name in names} if routed else {},
        entropies={name: rng.uniform(0.1, 1.0) for name in names} if routed else {},
        curve=tuple((at, loss(at)) for at in range(0, steps + 1, max(1, steps // 50))),
    )


def _entries(best: Trial, seeds: int, rng: random.Random) -> list[ComparisonEntry]:
    own = _entry("winner", "winner", best.spec, best.value or 0.0, seeds, rng)
    losses = [(best.value or 0.0) + 0.06 - 0.04 * i for i in range(len(BASELINES))]
    baselines = [
        _entry(name, "baseline", _point(rng)[1], loss, seeds, rng)
        for name, loss in zip(BASELINES, losses, strict=True)
    ]
    ablation = _entry("without residual", "ablation", best.spec, losses[0] + 0.1, seeds, rng)
    none: dict[str, list[ProxyScore]] = {task: [] for task in PROXY.tasks}
    failed = ComparisonEntry(
        "without router", "ablation", best.spec, cost(best.spec), none, "out of memory"
    )
    return [own, *baselines, ablation, failed]


def _entry(
    name: str, role: Role, spec: ModelSpec, loss: float, seeds: int, rng: random.Random
) -> ComparisonEntry:
    quality = (loss - 0.147) / 1.15
    by_seed = [_scores(spec, quality, -1, rng) for _ in range(seeds)]
    scores = {task: [rungs[task] for rungs in by_seed] for task in PROXY.tasks}
    nominal = cost(spec).expected
    routed = any(score.shares for of_task in scores.values() for score in of_task)
    executed = 0.9 * nominal if routed else nominal
    return ComparisonEntry(name, role, spec, cost(spec), scores, executed=executed)
