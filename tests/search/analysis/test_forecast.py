"""The forecast: exact where a sum is exact, a line through two rungs elsewhere."""

from __future__ import annotations

import io
import json
import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from archdsl.blocks.loop import LoopSpec
from archdsl.lang.load import fitted
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import fill
from archdsl.search.analysis.comparison import comparison_jobs
from archdsl.search.analysis.forecast import (
    Resources,
    SearchForecast,
    forecast_from_timing,
    forecast_search,
    wilson,
)
from archdsl.search.analysis.timing import Probe, Speed, Timing, measure_timing, measured
from archdsl.search.report.forecast_tables import shown
from archdsl.search.space.feasibility import NothingFitsError, Survey, survey
from archdsl.search.trials.proxy import Proxy, ProxyScore, Task
from archdsl.search.workers.pool import InProcess, JobFailed

SKILL = "skill:p-hop,hops=1,length=8,alphabet=3"
PROXY = Proxy(
    dim=16,
    head_size=8,
    tasks={
        "skill": Task(data=SKILL, context=8, batch_size=4, rungs=(3, 9), eval_tokens=64),
        "other": Task(data=SKILL, context=8, batch_size=2, rungs=(4, 8), eval_tokens=64),
    },
)
SPACE = parse("""\
name: space
vocab_size: 64
context: 32
dim: {fit: {multiple_of: 16, default: 32}}
budget: {params: 50k}
blocks:
  - kind: loop
    steps: {search: {low: 1, high: 3, default: 2}}
    residual: {search: {choices: [overwrite, thinking], default: overwrite}}
    body: {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
""")


def model(steps: int = 2) -> ModelSpec:
    picked = {"blocks.0.steps": steps, "blocks.0.residual": "overwrite"}
    return fitted(fill(SPACE, lambda name, _: picked[name]))


def score(steps: int, seconds: float, flops: float) -> ProxyScore:
    held: dict[str, Any] = {"loss": 1.0, "accuracy": 0.5, "bits_per_byte": None}
    return ProxyScore(steps=steps, seconds=seconds, train_flops=flops, peak_bytes=7 * steps, **held)


def test_two_rungs_tell_what_a_step_and_what_a_rung_costs() -> None:
    # a rung takes 2 s and a step half a second; starting the child took 1 s more
    found = measured(score(4, 2 + 4 * 0.5, 40.0), score(24, 2 + 20 * 0.5, 200.0), elapsed=17.0)
    assert found == Speed(per_step=0.5, per_rung=3.0, flops_per_step=10.0, peak_bytes=7 * 24)
    assert found.seconds(steps=100, rungs=2) == 2 * 3.0 + 100 * 0.5
    # of times that are mere noise no step costs less than nothing
    noise = measured(score(1, 0.3, 1.0), score(4, 0.1, 3.0), elapsed=0.4)
    assert noise.per_step == 0
    assert noise.per_rung == pytest.approx(0.3)


SPEED = Speed(per_step=1.0, per_rung=5.0, flops_per_step=100.0, peak_bytes=1000)


def predicted(resources: Resources, found: Survey, after: float = 10) -> SearchForecast:
    """With trials of 37 s and 1700 FLOPs, 17 s and 700 FLOPs if they stop on the first rung."""
    by_task = {"skill": SPEED, "other": SPEED}
    timing = Timing([model()], [by_task], failures=[], seconds=1.0)
    return forecast_from_timing(found, Budget(), PROXY, timing, resources, after=after)


LARGE = Survey(size=10**6, tried=100, feasible=90, invalid=5, models=(model(),))


def test_what_is_used_up_first_ends_the_search() -> None:
    time = predicted(Resources(workers=2, seconds=1000), LARGE)
    assert time.seconds_after == 10 * 37 / 2
    assert (time.all_promoted.trials, time.all_promoted.stops_at) == ((2000 - 370) // 37, "time")
    assert (time.all_stopped.trials, time.all_stopped.stops_at) == ((2000 - 370) // 17, "time")
    assert time.all_promoted.seconds == (44 * 37 + 370) / 2 <= 1000
    assert time.all_promoted.train_flops == 44 * 1700 + 17_000

    flops = predicted(Resources(workers=2, seconds=1000, train_flops=50_000), LARGE)
    assert (flops.all_promoted.trials, flops.all_promoted.stops_at) == (
        33_000 // 1700,
        "train_flops",
    )
    trials = predicted(Resources(workers=2, seconds=1000, trials=7), LARGE)
    assert (trials.all_promoted.trials, trials.all_stopped.stops_at) == (7, "trials")
    assert trials.all_promoted.seconds == (7 * 37 + 370) / 2
    assert trials.all_stopped.seconds == (7 * 17 + 370) / 2
    small = replace(LARGE, size=100, models=tuple(model(steps) for steps in (1, 2, 3)))
    assert predicted(Resources(workers=1, seconds=9999), small).all_promoted.trials == 3
    endless = predicted(Resources(workers=1), LARGE)
    assert endless.all_promoted.trials == math.inf
    assert endless.as_json()["estimated"]["climbing"]["trials"] is None
    short = predicted(Resources(workers=1, seconds=100), LARGE)
    assert short.all_promoted.trials == 0


def test_a_share_that_was_sampled_has_an_interval_that_covers_it() -> None:
    assert predicted(Resources(1), LARGE).interval == wilson(90, 100)
    assert predicted(Resources(1), replace(LARGE, size=100)).interval is None
    for share in (0.02, 0.3, 0.9, 0.995):
        covered = sum(
            math.comb(100, k) * share**k * (1 - share) ** (100 - k)
            for k in range(101)
            if wilson(k, 100)[0] <= share <= wilson(k, 100)[1]
        )
        assert covered > 0.91
    assert wilson(0, 50)[0] == 0 < wilson(0, 50)[1] < 0.1
    assert wilson(50, 50)[1] == 1


def test_a_plan_trains_a_few_proxies_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    budget = Budget(params=50_000, train_flops=10**12)
    found = forecast_search(InProcess(), SPACE, budget, PROXY, seconds=3600, timing=0.0, wider=2)
    assert list(tmp_path.glob("archdsl*")) == []
    assert (found.survey.size, found.survey.feasible, found.survey.distinct) == (6, 6, 5)
    assert len(found.timing.models) == 2  # no time, so the least
    assert found.kept["params"][0] == 50_000 >= found.kept["params"][2]

    # FLOPs are a sum over steps: those of whole trainings, to the last
    flops = []
    for trained in found.timing.models:
        jobs = [
            task.job(tmp_path / "store", PROXY.shrink(trained, task), 0, task.rungs[-1])
            for task in PROXY.tasks.values()
        ]
        flops.append(sum(job.run(lambda: None).train_flops for job in jobs))
    assert (found.trial.flops.least, found.trial.flops.most) == (min(flops), max(flops))
    compared = [
        sum(
            job.run(lambda: None).train_flops
            for job in comparison_jobs(m, PROXY, [0], tmp_path / "store", ablate=False).values()
        )
        for m in found.timing.models
    ]
    in_trainings = [3 * after / own for after, own in zip(compared, flops, strict=True)]
    assert found.after == pytest.approx(sum(in_trainings) / 2 + 2)

    said = words(found)
    assert "6 points, 6 of which fit the budget; 5 different models" in said
    assert "of 50,000 parameters" in said
    assert "ends when every model of the space has been tried" in said
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["space"]["whole"] is True


def words(found: SearchForecast) -> str:
    console = Console(file=io.StringIO(), width=1000)
    console.print(shown(found))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_the_words_say_what_was_sampled_and_what_is_too_short() -> None:
    said = words(predicted(Resources(workers=2, seconds=1000), LARGE))
    assert (
        "of 100 random points 90 fit the budget (95% interval of the share: 82.6% to 94.5%)" in said
    )
    assert "5 have invalid combinations of choices" in said
    assert (
        "44 to 95 trials (if all reach the last rung, or all stop on the first); ends with --time"
        in said
    )
    assert "the cost of 10 trainings of a trial, for the winner, its baselines" in said
    assert "3.1 min, 19% of the total" in said
    short = words(predicted(Resources(workers=1, seconds=100), LARGE))
    assert "the limits are too low for one trial and the evaluation, which take 6.8 min" in short
    assert "duration 1.7 min, too short for all baselines" in short
    assert "never ends; give --time" in words(predicted(Resources(workers=1), LARGE))


class Failing(InProcess):
    """Cannot train some of the proxies."""

    def __init__(self, task: str, steps: set[int]) -> None:
        self.task, self.steps = task, steps

    def submit(self, work: Any) -> Future[Any]:
        if isinstance(work, Probe) and work.job.task == PROXY.tasks[self.task]:
            loop = work.job.spec.blocks[0]
            assert isinstance(loop, LoopSpec)
            if loop.steps in self.steps:
                future: Future[Any] = Future()
                future.set_exception(JobFailed("crash", "it fell over"))
                return future
        return super().submit(work)


def test_proxies_that_cannot_be_trained_are_named_and_do_not_count(tmp_path: Path) -> None:
    models = [model(steps) for steps in (1, 2, 3)]
    found = measure_timing(Failing("other", {1}), models, PROXY, tmp_path, seconds=60)
    assert found.models == models[1:]
    assert found.failures == ["crash: it fell over"]
    with pytest.raises(JobFailed, match="it fell over"):
        measure_timing(Failing("skill", {1, 2, 3}), models, PROXY, tmp_path / "b", seconds=60)


def test_a_space_in_which_nothing_fits_has_no_plan() -> None:
    with pytest.raises(NothingFitsError, match="none of its 6 points does"):
        forecast_search(InProcess(), SPACE, Budget(params=10), PROXY, seconds=60)
    assert survey(SPACE, Budget(params=10)).models == ()
