"""The states of a trial: what is taken next, what it knows, and what counts of several attempts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from archdsl.lang.source import parse
from archdsl.lang.spec import Budget
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.study import Study, _as_frozen_trial
from archdsl.search.study.trial import RunningTrial
from archdsl.search.trials.proxy import ProxyScore
from tests.search.study.test_sampler import SPACE

SAMPLER = TrialSampler(parse(SPACE, "small.yaml"), Budget(params=60_000), 1, 0)
SCORE = ProxyScore(steps=2, loss=2.5, accuracy=None, bits_per_byte=None, seconds=1.0)


@pytest.fixture
def study() -> Study:
    return Study(InMemoryStorage(), "study", SAMPLER, ("loss",), window=4)


def take(study: Study, below: int = 1000) -> RunningTrial:
    trial = study.take(lambda number: number < below)
    assert trial is not None
    return trial


def complete(study: Study, loss: float) -> RunningTrial:
    trial = take(study)
    study.record_rung(trial, {"skill": SCORE}, (loss,))
    study.finish(trial, "complete", (loss,))
    return trial


def add(study: Study, **changes: Any) -> None:
    """Write the next trial as a worker does that has proposed this."""
    number = len(study.attempts())
    proposal = replace(SAMPLER.propose(0, [], {}), number=number)
    study._enqueue(_as_frozen_trial(replace(proposal, **changes)))


def test_no_trial_starts_that_may_not(study: Study) -> None:
    asked: list[int] = []

    def may_start(number: int) -> bool:
        asked.append(number)
        return number < 1

    assert study.take(may_start) is not None
    assert study.take(may_start) is None
    assert asked == [0, 1]


def test_a_trial_knows_the_trials_before_its_window(study: Study) -> None:
    first, *_ = [take(study) for _ in range(4)]
    study.record_rung(first, {"skill": SCORE}, (2.5,))
    study.finish(first, "complete", (2.5,))
    fifth = take(study)
    assert fifth.number == 4
    assert [trial.losses for trial in fifth.earlier] == [(2.5,)]  # not those of 1, 2 and 3


def test_a_released_trial_is_continued(study: Study) -> None:
    trial = take(study)
    study.record_rung(trial, {"skill": SCORE}, (2.5,))
    study.release(trial)
    assert study.finished() == []
    again = take(study)
    assert (again.number, again.losses, again.rungs) == (0, (2.5,), ({"skill": SCORE},))


@pytest.mark.parametrize("writes", range(4))
def test_a_kill_between_two_writes_of_a_rung_loses_none_of_them(
    study: Study, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    trial, done = take(study), 0

    def counted(write: Any, *given: Any) -> None:
        nonlocal done
        if done == writes:
            raise KeyboardInterrupt
        done += 1
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(study, "_unless_finished", counted)
        with pytest.raises(KeyboardInterrupt):
            study.record_rung(trial, {"skill": SCORE}, (2.5,))
    study.release(trial)
    again = take(study)
    assert len(again.rungs) == len(again.losses)
    if not again.losses:
        study.record_rung(again, {"skill": SCORE}, (2.5,))
    (attempt,) = study.attempts().values()
    assert attempt.intermediate_values == {1: 2.5}
    assert attempt.user_attrs["losses"] == [2.5]


def test_an_outcome_that_was_not_told_is_forgotten_when_the_trial_is_taken_again(
    study: Study,
) -> None:
    trial = take(study)
    study._set_attr(trial.attempt_id, "outcome", "complete")  # the worker dies before telling it
    study.fail_running()
    take(study)
    assert "outcome" not in study.all_attempts()[-1].user_attrs


def test_a_reused_trial_counts_with_the_result_of_its_model(study: Study) -> None:
    complete(study, 1.5)
    add(study, outcome="reused", same_as=0)
    earlier = study._observed(1, study.attempts())
    assert (earlier.losses, earlier.complete) == ((1.5,), True)


def test_of_two_equal_proposals_one_counts(study: Study) -> None:
    trial = take(study)
    study._enqueue(_as_frozen_trial(SAMPLER.propose(0, [], {})))  # by a worker at the same time
    assert study.take(lambda number: number < 1) is None
    study.finish(trial, "complete", (1.0,))
    assert [found.value for found in study.finished()] == [1.0]
    assert study.unfinished == 0
    assert all(found.state.is_finished() for found in study.all_attempts())


def test_only_trained_trials_count_as_trained(study: Study) -> None:
    complete(study, 1.0)
    for outcome in ("infeasible", "invalid", "reused"):
        add(study, outcome=outcome)
    take(study)
    assert study.trained() == 2
    assert [study.trained(before=number) for number in range(6)] == [0, 1, 1, 1, 1, 2]


def test_a_space_is_exhausted_after_three_known_models_in_a_row(study: Study) -> None:
    complete(study, 1.0)
    exhausted = []
    for _ in range(3):
        add(study, outcome="reused", same_as=0)
        exhausted.append(study.exhausted)
    assert exhausted == [False, False, True]
    add(study)
    assert not study.exhausted


@pytest.mark.parametrize("count", [7, 24])
def test_the_importance_of_choices_for_the_loss_needs_eight_trials(count: int) -> None:
    study = Study(InMemoryStorage(), "study", SAMPLER, ("loss", "flops"), window=4)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0, 1) for name in ("cause", "other")
    }
    for number in range(count):
        params = {"cause": number / count, "other": (7 * number % count) / count}
        trial = create_trial(
            values=[params["cause"], params["other"]],
            params=params,
            distributions=distributions,
            user_attrs={"draw": number, "outcome": "complete"},
            state=TrialState.COMPLETE,
        )
        study._enqueue(trial)
    found = study.importance()
    assert bool(found) == (count == 24)
    if found:
        assert found["cause"] > 0.8
