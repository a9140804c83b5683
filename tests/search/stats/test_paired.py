"""Differences are paired by seed and come with Student's interval."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archdsl.search.stats.paired import kendall_tau, paired


def test_the_interval_is_students() -> None:
    # differences 1, 2, 3: mean 2, standard deviation 1, t(2 degrees of freedom) = 4.303
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert found.conclusion == "cannot tell"


def test_what_all_seeds_share_cancels() -> None:
    found = paired([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert found.mean == pytest.approx(0.1)
    assert found.conclusion == "lower"
    assert paired([1.0, 5.0, 9.0], [1.1, 5.1, 9.1]).conclusion == "higher"


def test_one_seed_tells_nothing() -> None:
    assert paired([9.0], [1.0]).conclusion == "cannot tell"


def test_a_diverged_run_tells_nothing() -> None:
    assert paired([math.inf, 1.0, 1.0], [0.9, 0.9, 0.9]).conclusion == "cannot tell"


def scores(order: Sequence[int]) -> list[tuple[float, float]]:
    return [(float(i), float(value)) for i, value in enumerate(order)]


@given(st.lists(st.integers(0, 4), min_size=3, max_size=7))
def test_tau_counts_the_pairs_in_order_less_those_out_of_order(order: list[int]) -> None:
    n = len(order)
    signs = [(order[i] > order[j]) - (order[i] < order[j]) for i in range(n) for j in range(i)]
    found = kendall_tau(scores(order))
    assert found.tau == pytest.approx(sum(signs) / len(signs))
    assert found.tau is not None
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low <= found.tau <= found.high <= 1
    assert found == kendall_tau(scores(order))


def test_taus_interval_narrows_with_more_trials() -> None:
    few = kendall_tau(scores([0, 2, 1, 3, 5, 4]))
    many = kendall_tau(scores([6 * (i // 6) + (0, 2, 1, 3, 5, 4)[i % 6] for i in range(60)]))
    assert few.low is not None
    assert many.low is not None
    assert few.low < 0.5 < 0.8 < many.low


def test_taus_interval_holds_zero_as_often_as_it_promises() -> None:
    rng = random.Random(0)
    held = [kendall_tau(scores(rng.sample(range(12), 12))).is_significant for _ in range(200)]
    assert sum(held) / 200 <= 0.05  # one side of 95% is 2.5%


def test_perfect_agreement_of_three_shows_nothing() -> None:
    # one in six rankings of three agrees by chance
    assert not kendall_tau(scores([0, 1, 2])).is_significant
    assert kendall_tau(scores(range(8))).is_significant


def test_tau_needs_three_trials() -> None:
    found = kendall_tau([(1.0, 2.0), (2.0, 3.0)])
    assert (found.tau, found.low, found.high, found.pairs) == (None, None, None, 2)
    assert str(found) == "too few to say (2)"
