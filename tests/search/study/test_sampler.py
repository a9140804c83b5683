"""What the sampler proposes and promotes: functions of the seed and of earlier trials alone."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from archdsl.costs.receipt import cost
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget
from archdsl.search.study.sampler import (
    STARTUP,
    TrialSampler,
    expected_gains,
    may_join_front,
)
from archdsl.search.study.trial import Trial

SPACE = """
name: small
vocab_size: 300
context: 64
dim: {fit: {multiple_of: 16, default: 32}}
blocks:
  - &layer {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
  - search:
      default: itt
      choices:
        plain: *layer
        itt:
          kind: loop
          steps: {search: {low: 2, high: 4, default: 2}}
          router:
            kind: prefix
            capacity: {search: {low: 0.02, high: 0.98, step: 0.02, default: 0.5}}
          body: *layer
"""
CAPACITY = "blocks.1[itt].router.capacity"


def sampler(space: str = SPACE, params: int = 60_000, axes: int = 1, seed: int = 3) -> TrialSampler:
    return TrialSampler(parse(space, "small.yaml"), Budget(params=params), axes, seed)


def complete(*losses: float, others: tuple[float, ...] = (), **fields: Any) -> Trial:
    given: dict[str, Any] = {"params": {}, "outcome": "complete", **fields}
    return Trial(0, losses=losses, others=others, **given)


def as_earlier(proposal: Trial, loss: float) -> Trial:
    return complete(loss, params=proposal.params, distributions=proposal.distributions)


# proposals


@pytest.mark.parametrize("seed", range(4))
def test_the_pure_models_come_first(seed: int) -> None:
    first = [sampler(seed=seed).propose(number, [], {}) for number in range(3)]
    assert [one.params["blocks.1"] for one in first[:2]] == ["itt", "plain"]
    assert first[0].params[CAPACITY] == 0.5
    assert [one.number for one in first] == [0, 1, 2]


def test_a_proposal_depends_on_the_seed_and_on_its_number() -> None:
    one = sampler()
    by_number = {str(one.propose(number, [], {}).params) for number in range(5, 15)}
    by_seed = {str(sampler(seed=seed).propose(5, [], {}).params) for seed in range(10)}
    assert len(by_number) > 4
    assert len(by_seed) > 4
    assert one.propose(7, [], {}) == sampler().propose(7, [], {})


def test_later_proposals_learn_from_earlier_losses() -> None:
    one = sampler()
    earlier = []
    for number in range(2, 42):
        found = one.propose(number, [], {})
        earlier.append(as_earlier(found, found.params.get(CAPACITY, 2.0)))
    later = [one.propose(number, earlier, {}) for number in range(42, 62)]
    learned = fmean(found.params.get(CAPACITY, 1.0) for found in later)
    assert learned < 0.6 * fmean(trial.params.get(CAPACITY, 1.0) for trial in earlier)


def test_a_model_that_is_known_is_not_proposed_again_while_there_are_others() -> None:
    one = sampler()
    first = one.propose(5, [], {})
    other = one.propose(5, [], {first.fingerprint: 2})
    assert other.outcome == ""
    assert other.fingerprint != first.fingerprint


def test_a_starting_point_that_is_known_is_reused() -> None:
    first = sampler().propose(0, [], {})
    again = sampler().propose(0, [], {first.fingerprint: 7})
    assert (first.outcome, first.same_as) == ("", None)
    assert (again.outcome, again.same_as) == ("reused", 7)


def test_a_model_above_the_budget_by_a_little_is_infeasible() -> None:
    fixed = SPACE.replace("{fit: {multiple_of: 16, default: 32}}", "32")
    spec = sampler(fixed).propose(1, [], {}).spec
    limit = cost(spec).params - 1
    found = sampler(fixed, params=limit).propose(1, [], {})
    assert found.outcome == "infeasible"
    assert f"exceed the budget of {limit:,}" in found.error
    assert sampler(fixed, params=limit + 1).propose(1, [], {}).outcome == ""


def test_a_budget_that_no_size_fits_and_a_wrong_combination_are_told_apart() -> None:
    large = sampler(params=100).propose(0, [], {})
    assert (large.outcome, list(large.constraints)) == ("infeasible", ["fit"])
    assert "no size fits" in large.error
    wrong = SPACE.replace("dim: {fit: {multiple_of: 16, default: 32}}", "dim: 40")
    found = sampler(wrong).propose(0, [], {})
    assert found.outcome == "invalid"
    assert "head_size" in found.error


# promotion


def test_with_one_objective_the_better_half_is_promoted() -> None:
    known = [complete(first, 9.0 - first) for first in (1.0, 2.0, 3.0, 4.0)]
    one = sampler()
    assert one.is_promoted((2.4,), (), known)
    assert not one.is_promoted((2.6,), (), known)
    assert one.is_promoted((99.0,), (), known[:3])  # too few are known


def test_with_several_objectives_a_stopped_trial_has_its_expected_loss() -> None:
    known = [complete(3.0, 3.0 - gain, others=(5.0,)) for gain in (0.9, 1.0, 1.1, 1.0)]
    stopped = Trial(9, {}, losses=(4.0,), others=(6.0,))
    study = sampler(axes=2)._study([*known, stopped])
    assert study.trials[-1].values == pytest.approx([3.0, 6.0])


def test_gains_are_those_from_each_rung_to_the_last() -> None:
    known = [complete(4.0, 2.0, 1.5 + luck) for luck in (0.0, 0.1, -0.1, 0.0)]
    gains = expected_gains(known)
    assert gains == pytest.approx({1: -2.5, 2: -0.5})
    assert expected_gains(known[:3]) == {}


def test_only_trials_of_the_last_rung_keep_others_off_the_front() -> None:
    known = [complete(3.0, 2.0, others=(10.0,))] * STARTUP
    stopped = Trial(9, {}, losses=(0.1,), others=(1.0,))
    assert may_join_front((2.9,), (10.0,), [*known, stopped])
    assert not may_join_front((3.1,), (10.0,), [*known, stopped])
