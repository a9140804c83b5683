"""Comparison of given models: what is trained, and what intervals, shares and powers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from archdsl.costs.receipt import sequence_cost
from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.load import load
from archdsl.lang.spec import BlockSpec
from archdsl.search.analysis.compare_results import (
    Estimate,
    _share,
    sentences,
    task_results,
)
from archdsl.search.analysis.compare_setup import CompareSetup, compare_setup, trained_as
from archdsl.search.analysis.comparison import ComparisonEntry, entries_of
from archdsl.search.report.compare_report import PICTURE, CompareReport, draw, lr_sentences
from archdsl.search.stats.paired import paired, seeds_to_tell, t_quantile, told_by
from archdsl.search.trials.proxy import Proxy, ProxyScore
from archdsl.search.workers.pool import JobFailed
from tests.cli.command import SKILL

HOW = trained_as("dim=16,head_size=8,repeat=2", SKILL, (), tokens=512, context=8, batch_size=4)


def setup(*names: str, how: Proxy = HOW, **given: object) -> CompareSetup:
    return compare_setup(names, how, **given)  # type: ignore[arg-type]


def entries(setup: CompareSetup, losses: dict[str, list[float | None]]) -> list[ComparisonEntry]:
    """Entries as if the models had been trained, with these losses by seed."""
    jobs = setup.jobs(len(next(iter(losses.values()))), Path())
    results = {
        (name, task, seed): ProxyScore(
            steps=12, loss=losses[name][seed - 1], accuracy=0.5, bits_per_byte=None, seconds=1.0
        )
        for name, task, seed in jobs
    }
    return entries_of(setup.main_specs, setup.role, jobs, results)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),  # NIST, Engineering Statistics Handbook, 1.3.6.7.2
    [(0.975, 1, 12.706), (0.95, 4, 2.132), (0.995, 9, 3.250), (0.999, 30, 3.385)],
)
def test_quantiles_of_student(probability: float, degrees: int, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=5e-4)


def test_the_intervals_hold_together() -> None:
    rng = np.random.default_rng(0)
    models, seeds, missed = 4, 5, 0
    for _ in range(1000):
        reference = rng.normal(size=seeds)
        gaps = [
            paired(list(rng.normal(size=seeds)), list(reference), models) for _ in range(models)
        ]
        missed += any(abs(gap.mean) > gap.half_width for gap in gaps)
    assert missed <= 65  # of 1000, where 50 are allowed: three standard deviations above


def test_as_many_seeds_as_said_tell_the_difference() -> None:
    n, comparisons, deviation = 6, 3, 0.2
    difference = told_by(n, deviation, comparisons)
    assert seeds_to_tell(deviation, difference, comparisons) == n
    assert seeds_to_tell(deviation, difference * 0.999, comparisons) == n + 1
    gaps = np.random.default_rng(1).normal(difference, deviation, size=(2000, n))
    told = sum(paired(list(row), [0.0] * n, comparisons).conclusion == "lower" for row in gaps)
    assert told / 2000 == pytest.approx(0.77, abs=0.03)
    assert seeds_to_tell(1.0, 0.001, 1) is None


def test_each_model_gets_the_learning_rate_of_its_lowest_loss() -> None:
    tried = setup("transformer", "loop", lrs=(0.1, 0.001, 0.01, 0.1))
    jobs = tried.lr_jobs(Path())
    assert {job.seed for job in jobs.values()} == {0}
    assert all(job.config.lr == lr for (_, _, lr), job in jobs.items())
    losses = {"transformer-162m": (2.0, 1.0, None), "loop-162m": (None, None, None)}
    assert set(losses) == set(tried.names)
    results = {
        (name, "data", lr): ProxyScore(
            steps=12, loss=loss, accuracy=None, bits_per_byte=None, seconds=1.0
        )
        for name, found in losses.items()
        for lr, loss in zip((0.001, 0.01, 0.1), found, strict=True)
    }
    assert set(results) == set(jobs)
    reverse = dict(reversed(results.items()))  # as results come in any order
    found = tried.with_lr_results(reverse).jobs(2, Path())
    assert {(name, job.config.lr) for (name, _, _), job in found.items()} == {
        ("transformer-162m", 0.01),
        ("loop-162m", 0.001),  # all diverged: the lowest
    }
    assert {job.seed for job in found.values()} == {1, 2}
    failed = JobFailed("out of memory", "killed")  # tells nothing of the rate
    with pytest.raises(ArchdslError, match=r"with learning rate 0\.001: out of memory"):
        tried.with_lr_results(results | {("loop-162m", "data", 0.001): failed})
    (said,) = lr_sentences(tried)  # as long as none is chosen
    assert "for all models, which can favour one of them" in said
    one = setup("transformer", "loop", lrs=(0.01,))
    assert not one.lr_jobs(Path())
    assert one.digest == setup("transformer", "loop").digest != tried.digest


def test_the_share_of_the_data_is_where_the_curve_crosses() -> None:
    reference = ((1, 9.0), (2, 5.0), (4, 3.0))
    assert _share(((1, 4.0), (2, 3.5), (4, 2.5)), reference) == pytest.approx(3 / 4)
    assert _share(((1, 3.0), (2, 3.5), (4, 2.5)), reference) == 1 / 4
    assert _share(reference, reference) == 1
    assert _share(((1, 9.0), (4, 3.1)), reference) is None


def test_tokens_are_those_of_the_sequences_even_if_the_context_is_longer() -> None:
    short = trained_as(None, "skill:p-hop,hops=1,length=12", (), tokens=19_200)
    (task,) = short.tasks.values()
    assert (task.context, task.length) == (32, 12)
    assert task.rungs[-1] * task.batch_size * task.length == 18_432  # 12 points, 4 steps apart


def test_proxies_are_as_wide_as_their_models_are_beside_the_reference() -> None:
    loop = load("loop")
    wide = loop.patch("dim", 1536).patch("name", "wide")
    found = compare_setup([loop, wide], HOW)
    assert {name: spec.dim for name, spec in found.main_specs.items()} == {
        loop.name: 16,
        "wide": 24,
    }
    assert found.proxy.of_dim == loop.dim
    assert setup("loop", "itt").proxy == HOW  # one width, as it is
    with pytest.raises(SpecError, match="differ by at most a factor of 4"):
        setup("tiny", "loop")
    as_they_are = setup("tiny", "loop", how=HOW.model_copy(update={"dim": None})).main_specs
    assert {spec.dim for spec in as_they_are.values()} == {load("tiny").dim, loop.dim}


def test_proxies_have_as_many_layers_as_their_models_have_beside_each_other() -> None:
    """The plain model repeats one layer eight times, the others two layers four times."""
    names = "transformer", "loop", "itt"
    for copies in (1, 2, 4):
        found = setup(*names, how=HOW.model_copy(update={"repeat": copies})).main_specs
        layers = [sum(len(b.unrolled()) for b in spec.blocks) for spec in found.values()]
        assert layers == [2 * copies] * 3
    assert setup("loop", "itt").proxy.of_repeat is None


@pytest.mark.parametrize("match", ["params", "flops"])
def test_matched_models_cost_as_much_as_a_number_of_layers_allows(match: str) -> None:
    """No other number of its layers comes closer to the reference."""
    deep = load("transformer").patch("blocks.0.repeat", 12)
    given = compare_setup([deep, "loop"], HOW).main_specs
    found = compare_setup([deep, "loop"], HOW, match=match).main_specs["loop-162m"]  # type: ignore[arg-type]
    reference = given["transformer-162m"]
    target = getattr(sequence_cost(reference), match)

    def distance(blocks: Sequence[BlockSpec]) -> int:
        spec = given["loop-162m"].model_copy(update={"blocks": tuple(blocks)})
        return abs(getattr(sequence_cost(spec), match) - target)

    layers = [leaf for block in given["loop-162m"].blocks for leaf in block.unrolled()]
    depths = range(1, 3 * len(layers))
    others = ([layers[i * len(layers) // n] for i in range(n)] for n in depths)
    assert distance(found.blocks) < distance(layers)
    assert distance(found.blocks) == min(map(distance, others))
    assert set(found.blocks) <= set(layers)


def test_a_sentence_for_each_model() -> None:
    what = setup("transformer", "loop", "itt")
    scores = {
        "transformer-162m": [1.0, 2.0, 3.0],
        "loop-162m": [0.9, 1.9, 2.9001],
        "itt-162m": [1.1, 1.9, 3.1],
    }
    found = sentences(what, entries(what, {n: [*losses] for n, losses in scores.items()}))
    assert list(found) == ["loop-162m", "itt-162m", "intervals"]
    assert (
        "is better than transformer-162m: its loss is 0.100 ± 0.000 nats below"
        in (found["loop-162m"])
    )
    assert "cannot be told from transformer-162m: its loss is 0.033" in found["itt-162m"]
    assert "the intervals of the 2 loss differences hold together" in found["intervals"]


def test_a_diverged_training_is_neither_better_nor_worse() -> None:
    what = setup("transformer", "loop")
    made = entries(what, {"transformer-162m": [1.0, 1.0], "loop-162m": [None, 0.5]})
    assert "a training diverged" in sentences(what, made)["loop-162m"]
    (by_model,) = task_results(what, made).values()
    assert math.isinf(by_model["loop-162m"].loss.mean)


def test_curves_of_diverged_trainings_end_early_and_say_nothing_of_the_data_saved(
    tmp_path: Path,
) -> None:
    what = setup("transformer", "loop")
    made = entries(what, {"transformer-162m": [None, 1.0], "loop-162m": [0.5, 0.5]})
    whole, early = [(3, 2.0), (6, 1.5), (9, 1.2), (12, 1.0)], [(3, 2.0), (6, 1.9)]
    for entry in made:
        for scores in entry.scores.values():
            scores[:] = [
                score.model_copy(update={"held_out": early if score.loss is None else whole})
                for score in scores
            ]
    (by_model,) = task_results(what, made).values()
    share = by_model["loop-162m"].data_share
    assert (share.reached, share.seeds) == (1, 2)
    draw(CompareReport(tmp_path, what, made, seeds=2, missing=0, interrupted=False))
    assert (tmp_path / PICTURE).stat().st_size > 1000


def test_an_estimate_of_one_seed_has_no_interval() -> None:
    assert Estimate.of([2.0]).text() == "2.000"
    assert Estimate.of([1.0, 3.0]).text(1) == "2.0 ± 12.7"
