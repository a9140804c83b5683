"""Validation of a proxy: which models are trained again, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import archdsl
from archdsl.blocks.loop import LoopSpec
from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.comparison import JobResult
from archdsl.search.analysis.proxy_validation import (
    Key,
    ProxyValidation,
    between_rungs,
    validate_proxy,
    validation_trials,
    wider,
)
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.workers.pool import JobFailed

TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(1, 2), eval_tokens=120
)
PROXY = Proxy(dim=16, head_size=8, tasks={"skill": TASK})
TINY = archdsl.load("tiny")


def score(loss: float | None, steps: int = 2) -> ProxyScore:
    return ProxyScore(steps=steps, loss=loss, accuracy=None, bits_per_byte=None, seconds=1.0)


@cache
def model(number: int) -> ModelSpec:
    return TINY.patch("blocks.1.steps", number + 1)


def finished(number: int, first: float, last: float | None, like: int | None = None) -> Trial:
    """A trial with these losses on its rungs; pruned without a last one."""
    losses = [first] if last is None else [first, last]
    return Trial(
        number=number,
        spec_yaml=model(number).to_yaml(),
        fingerprint=str(number if like is None else like),
        params={},
        outcome="complete" if last is not None else "pruned",
        values=None if last is None else {"loss": last},
        rungs=tuple({"skill": score(loss)} for loss in losses),
    )


def ranked(losses: Sequence[float]) -> list[Trial]:
    return [finished(number, loss, loss) for number, loss in enumerate(losses)]


@settings(max_examples=40)
@given(st.permutations(range(20)), st.integers(0, 20))
def test_the_best_and_a_spread_to_the_worst_are_trained_again(order: list[int], n: int) -> None:
    trials = ranked([float(rank) for rank in order[:n]])
    chosen = [trial.value for trial in validation_trials(trials) if trial.value is not None]
    ranking = sorted(trial.value for trial in trials if trial.value is not None)
    assert len(chosen) == min(8, n)
    assert chosen == sorted(set(chosen), key=ranking.index)  # each once, best first
    assert chosen[:3] == ranking[:3]
    assert chosen[-1:] == ranking[-1:]
    if n >= 8:
        places = [ranking.index(value) for value in chosen[2:]]
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps) - min(gaps) <= 1


def test_a_model_of_two_trials_counts_once() -> None:
    trials = [*ranked([1.0, 2.0, 3.0]), finished(3, 1.0, 1.0, like=0), finished(4, 9.0, None)]
    assert [trial.number for trial in validation_trials(trials)] == [0, 1, 2]
    assert between_rungs(trials, PROXY).pairs == 3


def test_rungs_are_compared_over_those_that_reached_the_last() -> None:
    trials = [finished(i, first, 3.0 - i) for i, first in enumerate((1.0, 2.0, 3.0))]
    found = between_rungs([*trials, finished(3, 0.0, None)], PROXY)
    assert (found.tau, found.pairs) == (-1.0, 3)
    one_rung = [replace(t, rungs=t.rungs[-1:]) for t in trials]
    assert between_rungs(one_rung, PROXY).tau is None  # it would agree with itself


def test_wider_has_more_heads_of_the_same_size() -> None:
    wide = wider(PROXY)
    assert wide is not None
    assert (wide.dim, wide.head_size, wide.tasks) == (32, 8, PROXY.tasks)
    assert wide.shrink(TINY, TASK).dim == 32
    assert wider(Proxy(dim=None, tasks=PROXY.tasks)) is None


def validated(loss: Callable[[int], float | None], store: Path) -> ProxyValidation:
    """Of ten models whose losses at the wider width are a function of their number."""

    def trained(job: Job) -> JobResult:
        body = job.spec.blocks[1]
        assert isinstance(body, LoopSpec)
        try:
            return score(loss(body.steps - 1))
        except JobFailed as failure:
            return failure

    def run(jobs: Mapping[Key, Job]) -> dict[Key, JobResult]:
        return {key: trained(job) for key, job in jobs.items()}

    trials = ranked([i / 10 for i in range(10)])
    return validate_proxy(run, trials, validation_trials(trials), PROXY, 0, store)


def test_a_ranking_that_holds_is_said_to_hold(tmp_path: Path) -> None:
    proxy_validation = validated(lambda number: number + 5.0, tmp_path)
    assert (proxy_validation.width, proxy_validation.wider.tau, proxy_validation.wider.pairs) == (
        32,
        1.0,
        8,
    )
    assert proxy_validation.sentence().startswith(
        "The proxy's ranking holds at width 32: Kendall's tau is"
    )
    assert "The rankings on the first and on the last rung agree" in proxy_validation.sentence()
    assert proxy_validation.points[0].number == 0
    assert (proxy_validation.points[1].loss, proxy_validation.points[1].wider_loss) == (0.1, 6.0)


def test_a_ranking_that_does_not_hold_is_said_not_to(tmp_path: Path) -> None:
    mixed = validated(lambda number: float(number * 7 % 5), tmp_path)
    assert not mixed.wider.is_significant
    assert mixed.sentence().startswith("It is not shown that the proxy's ranking holds at width 32")
    turned = validated(lambda number: -float(number), tmp_path)
    assert turned.sentence().startswith("The proxy's ranking is reversed at width 32")


def test_who_diverges_or_fails_at_the_larger_width_is_left_out(tmp_path: Path) -> None:
    def loss(number: int) -> float | None:
        if number == 1:
            raise JobFailed("crash", "it ended")
        return None if number == 2 else float(number)

    proxy_validation = validated(loss, tmp_path)
    assert proxy_validation.wider.pairs == 6
    assert {point.number for point in proxy_validation.points}.isdisjoint({1, 2})


def test_what_was_not_tried_is_not_claimed() -> None:
    few = kendall_tau([])
    assert ProxyValidation(few, few, 64, []).sentence() == (
        "Whether the proxy's ranking holds at width 64 is not known; --validate-proxy tests it."
    )
    own = ProxyValidation(few, few, None, []).sentence()
    assert own == "The models were trained at their own size, so there is no proxy to validate."
    rungs = Correlation(0.5, -0.1, 0.9, 6)
    said = ProxyValidation(rungs, few, 64, []).sentence()
    assert said.endswith(
        "The rankings on the first and on the last rung are not shown to agree: "
        "+0.50 (-0.10 to +0.90, 6 models)."
    )
