"""Differences are paired by seed and come with Student's interval."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archdsl.search.compare import kendall_tau, paired, spread


def test_the_interval_is_students() -> None:
    # differences 1, 2, 3: mean 2, standard deviation 1, t(2 degrees of freedom) = 4.303
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert found.verdict == "cannot tell"


def test_what_all_seeds_share_cancels() -> None:
    found = paired([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert found.mean == pytest.approx(0.1)
    assert found.verdict == "lower"
    assert paired([1.0, 5.0, 9.0], [1.1, 5.1, 9.1]).verdict == "higher"


def test_one_seed_tells_nothing() -> None:
    assert paired([9.0], [1.0]).verdict == "cannot tell"


def test_a_diverged_run_tells_nothing() -> None:
    assert paired([math.inf, 1.0, 1.0], [0.9, 0.9, 0.9]).verdict == "cannot tell"


@given(st.permutations(range(6)))
def test_tau_counts_the_pairs_in_order(order: list[int]) -> None:
    pairs = [(float(i), float(value)) for i, value in enumerate(order)]
    agree = sum(order[i] > order[j] for i in range(6) for j in range(i))
    assert kendall_tau(pairs) == pytest.approx((agree - (15 - agree)) / 15)


def test_tau_needs_three_trials() -> None:
    assert kendall_tau([(1.0, 2.0), (2.0, 3.0)]) is None


def test_spread_is_the_range() -> None:
    assert spread([1.0, 4.0, 2.0]) == (2.5, 1.5)
