"""Tests of the learning-rate schedule, and of the checks of a training config."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from archdsl.training.config import TrainConfig

KINDS: tuple[Literal["cosine", "wsd", "constant"], ...] = ("cosine", "wsd", "constant")


def rates(config: TrainConfig) -> list[float]:
    return [config.learning_rate(step) for step in range(config.steps)]


@given(
    schedule=st.sampled_from(KINDS),
    steps=st.integers(1, 300),
    warmup=st.none() | st.integers(0, 400),
    ratio=st.floats(0, 1),
    share=st.floats(0.01, 1),
)
def test_the_rate_rises_once_then_never_again_and_stays_within_its_bounds(
    schedule: Literal["cosine", "wsd", "constant"],
    steps: int,
    warmup: int | None,
    ratio: float,
    share: float,
) -> None:
    config = TrainConfig(
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup,
        min_lr_ratio=ratio,
        decay_share=share,
        lr=2.0,
    )
    found = rates(config)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert all(0 <= rate <= 2 for rate in found)
    assert top <= max(0, config.warmup - 1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_has_the_least_rate_and_the_end_of_the_warm_up_the_highest(
    schedule: Literal["cosine", "wsd"],
) -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1, schedule=schedule)
    found = rates(config)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[99] == pytest.approx(0.1)
    assert config.learning_rate(1000) == pytest.approx(0.1)


def test_cosine_is_halfway_down_in_the_middle_and_wsd_decays_its_share_alone() -> None:
    cosine = TrainConfig(steps=101, warmup_steps=0, lr=1.0, min_lr_ratio=0.0)
    assert cosine.learning_rate(50) == pytest.approx(0.5)
    assert cosine.learning_rate(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    wsd = cosine.model_copy(update={"schedule": "wsd", "decay_share": 0.5, "steps": 100})
    assert rates(wsd)[:50] == [1.0] * 50
    assert rates(wsd)[50:] == pytest.approx([(49 - step) / 50 for step in range(50)])


def test_a_single_step_trains_at_the_full_rate() -> None:
    assert rates(TrainConfig(steps=1, lr=0.5, schedule="cosine")) == [0.5]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 10, "accumulate": 4}, "accumulate must divide batch_size, got 4 and 10"),
        ({"lr": 0}, r"lr\n  must be above 0(\.0)?, got 0"),
        ({"lr": math.nan}, "finite"),
        ({"betas": (0.9, 1.0)}, r"must be below 1(\.0)?, got 1\.0"),
        ({"device": "cdua"}, "device"),
        ({"learning_rate": 0.1}, "learning_rate"),
    ],
)
def test_a_config_refuses_what_cannot_train(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainConfig.model_validate(settings)


def test_a_config_survives_json() -> None:
    config = TrainConfig(clip=None, betas=(0.8, 0.99))
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
