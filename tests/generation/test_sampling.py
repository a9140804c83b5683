"""Tests of sampling: the probability of each token, and reproducibility by seed.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from archdsl.generation.sampling import generators, probabilities, sample_tokens, token_at
from archdsl.generation.sampling_config import Sampling

Logits = list[float]

# Few different values, so that ties are common.
LOGITS = st.lists(
    st.integers(-3, 3).map(float) | st.floats(-20, 20, width=32), min_size=1, max_size=9
)
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.01, 1),
)


def shares(weights: Logits) -> Logits:
    most = max(weights)
    exps = [math.exp(weight - most) for weight in weights]
    return [part / sum(exps) for part in exps]


def by_definition(logits: Logits, sampling: Sampling) -> Logits:
    """Compute the probabilities from the definition of top-k and top-p, token by token."""
    scaled = [logit / sampling.temperature for logit in logits]
    if sampling.top_k is not None:
        larger = [sum(other > one for other in scaled) for one in scaled]
        scaled = [
            one if n < sampling.top_k else -math.inf for one, n in zip(scaled, larger, strict=True)
        ]
    found = shares(scaled)
    if sampling.top_p is not None:
        before = [sum(other for other in found if other > one) for one in found]
        assume(all(abs(sum_ - sampling.top_p) > 1e-9 for sum_ in before))
        kept = [sum_ < sampling.top_p for sum_ in before]
        scaled = [one if keep else -math.inf for one, keep in zip(scaled, kept, strict=True)]
    return shares(scaled)


@given(LOGITS, SETTINGS)
def test_what_can_come_next_is_what_the_definition_says(logits: Logits, sampling: Sampling) -> None:
    [found_V] = probabilities(torch.tensor([logits], dtype=torch.float64), sampling)
    assert found_V.tolist() == pytest.approx(by_definition(logits, sampling), abs=1e-12)


@given(LOGITS, SETTINGS)
def test_the_likeliest_token_can_always_come_next(logits: Logits, sampling: Sampling) -> None:
    [found_V] = probabilities(torch.tensor([logits]), sampling)
    assert found_V[logits.index(max(logits))] > 0
    assert found_V.sum() == pytest.approx(1)


@given(LOGITS)
def test_without_a_temperature_the_first_of_the_likeliest_is_certain(logits: Logits) -> None:
    [found_V] = probabilities(torch.tensor([logits]), Sampling(temperature=0))
    assert found_V.tolist() == [float(i == logits.index(max(logits))) for i in range(len(logits))]


def test_a_temperature_next_to_nothing_overflows_nowhere() -> None:
    logits_BV = torch.tensor([[-1e4, 1e4, 1e4 - 8]])
    assert probabilities(logits_BV, Sampling(temperature=1e-300)).tolist() == [[0, 1, 0]]


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=1, max_size=6), st.floats(0, 1))
def test_a_number_picks_the_token_in_whose_share_it_falls(weights: Logits, at: float) -> None:
    assume(at < 1 and sum(weights) > 0)
    found = [weight / sum(weights) for weight in weights]
    ends = [math.fsum(found[: i + 1]) for i in range(len(found))]
    assume(all(abs(at - end) > 1e-9 for end in ends))
    token = token_at(torch.tensor([found], dtype=torch.float64), torch.tensor([at]).double())
    assert token.tolist() == [sum(end < at for end in ends)]


@pytest.mark.parametrize("at", [0.0, 1 - 2**-53])
def test_a_token_without_a_share_is_never_picked(at: float) -> None:
    probability_BV = torch.tensor([[0.0, 0.3, 0.7 - 1e-16, 0.0]], dtype=torch.float64)
    assert token_at(probability_BV, torch.tensor([at], dtype=torch.float64)).item() in (1, 2)


def test_draws_are_as_frequent_as_they_are_likely_and_decided_by_the_seed() -> None:
    probability_BV = torch.tensor([[0.5, 0.2, 0.0, 0.3]], dtype=torch.float64)

    def drawn(seed: int) -> list[int]:
        random = generators(Sampling(seed=seed), 1)
        return [sample_tokens(probability_BV, random)[0] for _ in range(3000)]

    tokens = drawn(1)
    assert drawn(1) == tokens != drawn(2)
    for token, share in enumerate(probability_BV[0].tolist()):
        assert tokens.count(token) / 3000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling.model_validate(wrong)
