"""Comparisons: what is trained and when, what complete seeds show, and what may be concluded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import archdsl
from archdsl.costs.receipt import cost, sequence_cost
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.model.build import build
from archdsl.reports.tables import short
from archdsl.search.analysis.baselines import (
    EQUAL_FLOPS,
    EQUAL_FLOPS_LOOP,
    EQUAL_PARAMS,
    RANDOM_ROUTING,
    WINNER,
)
from archdsl.search.analysis.comparison import (
    OBJECTIVE,
    ComparisonEntry,
    Key,
    as_json,
    comparison_jobs,
    differences,
    entries,
    role_of,
    run_comparison,
    stored_scores,
)
from archdsl.search.analysis.conclusions import ablation_conclusion, conclusion, costs_sentence
from archdsl.search.analysis.noise import noise
from archdsl.search.report.tables import (
    comparison_legend,
    comparison_table,
    difference_table,
    failures,
)
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.workers.pool import InProcess, JobFailed

TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(1, 2), eval_tokens=120
)
HALF = TASK.model_copy(update={"weight": 0.5})
PROXY = Proxy(dim=16, head_size=8, tasks={"a": TASK, "b": HALF})


def score(loss: float | None) -> ProxyScore:
    return ProxyScore(steps=2, loss=loss, accuracy=None, bits_per_byte=None, seconds=1.0)


class Scripted:
    """A pool in which a function says what comes of each job, in the order of asking."""

    def __init__(self, outcome: Callable[[Job], ProxyScore], workers: int = 2) -> None:
        self.outcome, self.workers = outcome, workers
        self.jobs: list[Job] = []

    def submit(self, work: Any) -> Future[Any]:
        self.jobs.append(work)
        future: Future[Any] = Future()
        try:
            future.set_result(self.outcome(work))
        except JobFailed as failure:
            future.set_exception(failure)
        return future


def times(n: int) -> Callable[[], bool]:
    left = iter([True] * n)
    return lambda: next(left, False)


@pytest.fixture
def winner() -> ModelSpec:
    return archdsl.load("tiny")


@pytest.fixture
def jobs(winner: ModelSpec, tmp_path: Path) -> dict[Key, Job]:
    return comparison_jobs(winner, PROXY, (7, 8, 9), tmp_path, ablate=True)


def quiet(_: str) -> None: ...


def test_one_seed_comes_before_the_next_and_baselines_before_ablations(
    winner: ModelSpec, jobs: dict[Key, Job], tmp_path: Path
) -> None:
    seeds = [seed for seed, _ in groupby(job.seed for job in jobs.values())]
    assert seeds == [7, 8, 9]
    first = [role_of(name) for name, _, seed in jobs if seed == 7]
    assert [role for role, _ in groupby(first)] == ["winner", "baseline", "ablation"]
    unablated = comparison_jobs(winner, PROXY, (7, 8, 9), tmp_path, ablate=False)
    assert unablated == {k: v for k, v in jobs.items() if role_of(k[0]) != "ablation"}
    assert all(job.steps == TASK.rungs[-1] for job in jobs.values())


def test_baselines_are_equal_at_the_size_that_is_trained(jobs: dict[Key, Job]) -> None:
    own, layer = (sequence_cost(jobs[name, "a", 7].spec) for name in (WINNER, EQUAL_PARAMS))
    assert layer.params == pytest.approx(own.params, rel=0.03)
    for baseline in (EQUAL_FLOPS, EQUAL_FLOPS_LOOP):
        assert sequence_cost(jobs[baseline, "a", 7].spec).flops == pytest.approx(own.flops, rel=0.1)


def test_what_is_entered_is_of_full_size(winner: ModelSpec, jobs: dict[Key, Job]) -> None:
    found = entries(winner, jobs, dict.fromkeys(jobs, score(1.0)))
    assert found[0].spec == winner
    assert found[0].receipt == cost(winner)
    assert {entry.spec.dim for entry in found} == {winner.dim}
    assert [entry.role for entry in found][:2] == ["winner", "baseline"]
    assert len({entry.name for entry in found}) == len(found) == len(jobs) / 6


def test_only_whole_seeds_count(winner: ModelSpec, jobs: dict[Key, Job]) -> None:
    of_seed = len(jobs) // 3
    rivals = [key for key in jobs if key[2] == 8 and role_of(key[0]) != "ablation"]
    for submitted, with_baselines, with_ablations in (
        (of_seed - 1, 1, 0),
        (of_seed, 1, 1),
        (of_seed + len(rivals) - 1, 1, 1),
        (of_seed + len(rivals), 2, 1),
        (len(jobs), 3, 3),
    ):
        done = {key: score(1.0) for key in list(jobs)[:submitted]}
        found = {entry.name: entry for entry in entries(winner, jobs, done)}
        for entry in found.values():
            seeds = with_ablations if entry.role == "ablation" else with_baselines
            assert {len(scores) for scores in entry.scores.values()} == {seeds}
        assert any(entry.role == "ablation" for entry in found.values()) == bool(with_ablations)


def test_nothing_is_begun_that_may_not_be(jobs: dict[Key, Job]) -> None:
    pool = Scripted(lambda job: score(1.0))
    said: list[str] = []
    # the loop asks once for itself, and once for each job
    results = run_comparison(pool, jobs, times(6), said.append)
    assert set(results) == set(list(jobs)[: len(results)])
    assert 0 < len(results) <= 6
    assert pool.jobs == list(jobs.values())[: len(results)]
    assert said[-1] == f"{len(results)} of {len(jobs)} trainings"


def test_no_more_are_under_way_than_there_are_workers(jobs: dict[Key, Job]) -> None:
    pending: list[Future[Any]] = []

    class Slow:
        workers = 3

        def submit(self, work: Any) -> Future[Any]:
            pending.append(Future())
            return pending[-1]

    def finish_one(_: str) -> None:
        assert len(pending) <= 3
        if pending:
            pending.pop(0).set_result(score(1.0))

    assert len(run_comparison(Slow(), jobs, lambda: True, finish_one)) == len(jobs)


def test_one_that_fails_is_shown_with_its_reason(winner: ModelSpec, jobs: dict[Key, Job]) -> None:
    loop = jobs[EQUAL_FLOPS_LOOP, "a", 8].spec

    def outcome(job: Job) -> ProxyScore:
        if job.spec == loop and job.seed == 8:
            raise JobFailed("out of memory", "killed twice")
        return score(1.0 if job.spec == jobs[WINNER, "a", 8].spec else 2.0)

    results = run_comparison(Scripted(outcome), jobs, lambda: True, quiet)
    assert len(results) == len(jobs)
    found = entries(winner, jobs, results)
    failed = {entry.name: entry.error for entry in found if entry.error}
    assert failed == {EQUAL_FLOPS_LOOP: "a, seed 8: out of memory: killed twice"}
    assert EQUAL_FLOPS_LOOP not in differences(found, PROXY)
    said = conclusion(found, PROXY)
    assert "better than 3 of its 4 baselines" in said
    assert f"the {EQUAL_FLOPS_LOOP} baseline failed" in said
    assert as_json(found, PROXY)[3]["error"] == failed[EQUAL_FLOPS_LOOP]


def test_what_was_trained_before_is_read_back_without_being_allowed_anything(
    winner: ModelSpec, tmp_path: Path
) -> None:
    few = dict(list(comparison_jobs(winner, PROXY, (7,), tmp_path, ablate=False).items())[:1])
    first = run_comparison(InProcess(), few, lambda: True, quiet)
    assert set(stored_scores(few)) == set(few)
    again = run_comparison(
        Scripted(lambda job: pytest.fail("trained again")), few, lambda: False, quiet
    )
    losses = [[r.loss for r in rs.values() if isinstance(r, ProxyScore)] for rs in (first, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


def entry(name: str, *losses: float | None, error: str = "") -> ComparisonEntry:
    """One of loss ``losses`` in task a, by seed, and of 1 in task b."""
    spec = archdsl.load("tiny")
    scores = {"a": [score(loss) for loss in losses], "b": [score(1.0) for _ in losses]}
    return ComparisonEntry(name, role_of(name), spec, cost(spec), scores, error)


def test_differences_are_paired_by_seed_over_those_that_both_have() -> None:
    own = entry(WINNER, 1.0, 3.0, 2.0)
    found = differences([own, entry(EQUAL_PARAMS, 1.5, 3.5, 2.5), entry("without x", 1.2)], PROXY)
    assert list(found) == [EQUAL_PARAMS, "without x"]
    assert list(found[EQUAL_PARAMS]) == [OBJECTIVE, "a", "b"]
    gap = found[EQUAL_PARAMS][OBJECTIVE]
    assert [gap.mean, gap.half_width, gap.pairs] == pytest.approx([0.5, 0, 3])
    assert found["without x"]["a"].mean == pytest.approx(0.2)
    assert found["without x"]["a"].half_width == math.inf


SEEDS = "over 3 seeds that the search did not use (95% interval for each difference)"
NOT_WORSE = f"Cheaper and not shown to be worse: the {EQUAL_PARAMS} baseline (20 nominal FLOPs per"
ROUTER = "blocks.1.router.capacity"
OWN = (1.0, 1.1, 1.2)
ABOVE, BELOW, AROUND = (1.3, 1.41, 1.5), (0.7, 0.81, 0.9), (1.0, 1.2, 1.1)


def cases() -> Iterator[tuple[list[ComparisonEntry], str]]:
    yield [], "No seed has been trained with all baselines yet, so nothing is known."
    yield (
        [entry(WINNER, *OWN)],
        "The best model found is a plain model, so it equals its baselines.",
    )
    yield (
        [entry(WINNER, *OWN), entry(EQUAL_PARAMS, *ABOVE), entry(EQUAL_FLOPS, *ABOVE)],
        f"The best model found is better than all of its 2 baselines: {SEEDS}, its loss is 0.303 ± "
        f"0.014 nats below the {EQUAL_PARAMS} baseline and 0.303 ± 0.014 nats below the "
        f"{EQUAL_FLOPS} baseline.",
    )
    yield (
        [entry(WINNER, *OWN), entry(EQUAL_PARAMS, *ABOVE)],
        f"The best model found is better than its only baseline: {SEEDS}, its loss is 0.303 ± "
        f"0.014 nats below the {EQUAL_PARAMS} baseline.",
    )
    yield (
        [entry(WINNER, *OWN), entry(EQUAL_PARAMS, *BELOW), entry(EQUAL_FLOPS, *BELOW)],
        f"The best model found is not shown to be better than any of its 2 baselines: {SEEDS}, its "
        f"loss is 0.297 ± 0.014 nats above the {EQUAL_PARAMS} baseline and 0.297 ± 0.014 nats "
        f"above the {EQUAL_FLOPS} baseline.",
    )
    yield (
        [
            entry(WINNER, *OWN),
            entry(EQUAL_PARAMS, *ABOVE),
            entry(EQUAL_FLOPS, *BELOW),
            entry(EQUAL_FLOPS_LOOP, *AROUND),
            entry(RANDOM_ROUTING, 1.3, None, 1.5),
        ],
        f"The best model found is better than 1 of its 4 baselines: {SEEDS}, its loss is 0.303 ± "
        f"0.014 nats below the {EQUAL_PARAMS} baseline and 0.297 ± 0.014 nats above the "
        f"{EQUAL_FLOPS} baseline, not clearly different from the {EQUAL_FLOPS_LOOP} baseline "
        f"(0.000 ± 0.248 nats below); the {RANDOM_ROUTING} baseline diverged. "
        "To tell that difference from zero, if it is as measured, takes more than 1,000 seeds.",
    )
    yield (
        [entry(WINNER, 1.0), entry(EQUAL_PARAMS, 9.0)],
        "The best model found is not shown to be better than its only baseline: with one seed that "
        "the search did not use (one seed: no interval), its loss is 8.000 nats below the "
        f"{EQUAL_PARAMS} baseline.",
    )
    yield (
        [replace(entry(WINNER, 1.0), name="model"), entry(EQUAL_PARAMS, 9.0)],
        "The model is not shown to be better than its only baseline: with one seed (one seed: no "
        f"interval), its loss is 8.000 nats below the {EQUAL_PARAMS} baseline.",
    )
    yield (
        [entry(WINNER, 1.0, None), entry(EQUAL_PARAMS, 2.0, 2.0)],
        "The best model found diverged when trained with 2 seeds that the search did not use.",
    )
    yield (
        [entry(WINNER, error="a, seed 1: crash: x"), entry(EQUAL_PARAMS, 2.0, 2.0)],
        "The best model found could not be trained: a, seed 1: crash: x.",
    )


@pytest.mark.parametrize(("found", "sentence"), list(cases()))
def test_the_conclusion_says_no_more_than_the_intervals(
    found: list[ComparisonEntry], sentence: str
) -> None:
    assert conclusion(found, PROXY) == sentence


def test_the_conclusion_says_which_trial_won() -> None:
    found = [entry(WINNER, *OWN), entry(EQUAL_PARAMS, *ABOVE)]
    said = conclusion(found, PROXY, "the winner, trial 7,")
    assert said.startswith("The winner, trial 7, is better than its only baseline: over 3 seeds ")


@pytest.mark.parametrize(
    ("losses", "share", "said"),
    [
        (AROUND, 0.5, NOT_WORSE),
        (BELOW, 0.5, f"Cheaper and better: the {EQUAL_PARAMS} baseline (20 nominal FLOPs per"),
        (ABOVE, 0.5, ""),  # cheaper, but worse
        (AROUND, 0.995, ""),  # a difference that rounding to whole layers makes
        (BELOW, 1.5, ""),
        ((1.0,), 0.5, NOT_WORSE),
        ((1.5,), 0.5, ""),  # one seed, in which it is worse
    ],
)
def test_a_baseline_that_is_cheaper_and_not_worse_is_named(
    losses: tuple[float, ...], share: float, said: str
) -> None:
    own, other = entry(WINNER, *OWN[: len(losses)]), entry(EQUAL_PARAMS, *losses)
    own = replace(own, receipt=own.receipt._replace(expected=40.0))
    other = replace(other, receipt=other.receipt._replace(expected=40 * share))
    told = conclusion([own, other], PROXY)
    assert said in told
    assert ("Cheaper" in told) == bool(said)
    more = replace(other, receipt=other.receipt._replace(params=2 * other.receipt.params))
    assert "Cheaper" not in conclusion([own, more], PROXY)  # it costs more in something else


def test_what_the_winner_costs_of_what_was_allowed() -> None:
    spec = archdsl.load("tiny")
    receipt = cost(spec)
    limits = Budget(params=200_000, flops=1_000_000)
    assert costs_sentence(spec, limits, 123_456.0) == (
        f"It costs {short(receipt.params)} of the 200.0k parameters allowed and "
        f"{short(receipt.expected)} of the 1.00M nominal FLOPs per token allowed. A token takes "
        f"{short(receipt.expected)} FLOPs at the routers' capacities (nominal), and 123.5k at the "
        "shares of tokens that its proxies' routers selected (executed)."
    )
    said = costs_sentence(spec, Budget(kv=10_000), receipt.expected)
    assert "of the 10.0k bytes of KV cache per token allowed" in said
    assert f"It has {short(receipt.params)} parameters." in said
    assert said.endswith(" FLOPs, nominal and executed.")
    said = costs_sentence(spec, Budget(), None)
    assert said.startswith("No limit on its costs was set. It has ")
    assert said.endswith("those executed were not measured.")


def trial(number: int, loss: float) -> Trial:
    return Trial(number, {}, fingerprint=str(number), outcome="complete", values={"loss": loss})


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((1.0, 1.1, 1.2), "Warning: the trials differ by 0.100 nats (standard deviation), and the"),
        ((1.0, 1.1, 3.0, 4.0), "The seed alone may order the best trial and 1 of the 3 others"),
        ((1.0, 3.0, 5.0), ""),
        ((1.0, 1.1), None),  # too few models
    ],
)
def test_a_ranking_within_the_spread_of_seeds_is_called_noise(
    losses: tuple[float, ...], said: str | None
) -> None:
    trials = [trial(number, loss) for number, loss in enumerate(losses)]
    # the second seed moves both models alike, and the third one by .2 against the other
    rivals = [entry(WINNER, 1.0, 2.0, 1.1), entry(EQUAL_PARAMS, 1.0, 2.0, 1.3)]
    others = [entry("without x", 9.0), entry(EQUAL_FLOPS, 1.0, None, 1.0)]  # which do not count
    found = noise(trials, [*rivals, *others], PROXY)
    if said is None:
        assert found is None
        return
    assert found is not None
    assert found.between_seeds == pytest.approx(math.sqrt(0.2**2 / 3 / 2))
    assert found.sentence().startswith(said)
    assert bool(found.sentence()) == bool(said)
    assert noise(trials, [entry(WINNER, 1.0), entry(EQUAL_PARAMS, 2.0)], PROXY) is None  # one seed
    assert noise(trials, rivals[:1], PROXY) is None  # no other model


def test_an_entry_knows_the_flops_that_its_proxies_executed(
    winner: ModelSpec, jobs: dict[Key, Job]
) -> None:
    small = jobs[WINNER, "a", 7].spec
    model = build(small.canonical())
    model(torch.zeros(1, 4, dtype=torch.long))  # its routers are named when they have run
    shares = dict.fromkeys(model.router_shares(), 0.25)
    selective = score(1.0).model_copy(update={"shares": shares})
    results = {key: selective if key[0] == WINNER else score(1.0) for key in jobs}
    own, plain = entries(winner, jobs, results)[:2]
    assert own.executed == pytest.approx(cost(winner.patch(ROUTER, 0.25)).expected, rel=1e-6)
    assert own.executed != own.receipt.expected
    assert as_json([own], PROXY)[0]["executed_flops_per_token"] == own.executed
    assert plain.executed == plain.receipt.expected


def test_what_matters_is_what_the_winner_is_worse_without() -> None:
    found = [
        entry(WINNER, *OWN),
        entry(EQUAL_PARAMS, *ABOVE),
        entry("without router", *ABOVE),
        entry("without encoding", *AROUND),
        entry("without residual", *ABOVE),
    ]
    assert ablation_conclusion(found, PROXY) == (
        "The best model found is worse without router, without residual; it shows no clear "
        "difference without encoding (each comparison by its own 95% interval)."
    )
    assert ablation_conclusion(found[:2], PROXY) == ""


def test_tables_show_what_failed_and_what_only_some_seeds_say() -> None:
    found = [
        entry(WINNER, *OWN),
        entry(EQUAL_PARAMS, *ABOVE),
        entry(EQUAL_FLOPS_LOOP, error="a, seed 1: crash: x"),
        entry("without router", 1.5),
    ]
    read = {"a": [one.model_copy(update={"bits_per_byte": 2.5}) for one in found[0].scores["a"]]}
    found[0] = replace(found[0], scores=found[0].scores | read)
    table = Console(width=80, record=True, file=StringIO())
    table.print(comparison_table(found, PROXY), difference_table(found, PROXY))
    text = table.export_text()
    assert re.search(rf"{EQUAL_PARAMS} +\+0.303 ± 0.014", text)
    assert re.search(rf"{EQUAL_FLOPS_LOOP} +failed", text)
    assert re.search(r"without router +\+0.500, one seed", text)
    assert re.search(r"params +nominal +executed +proxy +a +b", text)
    assert re.search(rf"{WINNER} +127.7k +\S+ +1.100 \(2.500\) +1.000", text)
    assert comparison_legend(found)[1] == (
        "losses",
        "held-out nats per prediction, mean over the seeds; in brackets the bits per byte of a "
        "text",
    )
    assert failures(found) == [("failed", f"{EQUAL_FLOPS_LOOP}: a, seed 1: crash: x")]


def test_what_another_process_trains_is_waited_for_last(jobs: dict[Key, Job]) -> None:
    pool = Scripted(lambda job: score(1.0))
    busy = next(iter(jobs.values())).stored_run
    with busy.locked(lambda: None):
        results = run_comparison(pool, jobs, lambda: True, quiet)
    assert len(results) == len(jobs)
    at_it = [job.stored_run.folder == busy.folder for job in pool.jobs]
    assert at_it == sorted(at_it)
    assert any(at_it)
