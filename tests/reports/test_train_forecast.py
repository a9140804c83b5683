"""What a training run will do, as `archdsl train --dry-run` says before it starts."""

from __future__ import annotations

import pytest

import archdsl
from archdsl.costs.devices import DevicesError, devices, traffic
from archdsl.reports.train_forecast import forecast_training
from archdsl.reports.training_memory import passes_of_step, training_memory
from archdsl.reports.units import units
from archdsl.training.config import TrainConfig


def test_a_run_on_eight_devices_by_hand() -> None:
    spec, config = archdsl.load("itt"), TrainConfig(steps=10, batch_size=32, accumulate=2)
    found = forecast_training(spec, config, devices(8))
    assert (found.sequences, found.passes, found.tokens) == (4, 2, 10 * 32 * 4096)
    assert found.flops == pytest.approx(found.tokens * archdsl.cost(spec).train_flops_per_token)
    assert found.memory == training_memory(spec, 4, accumulate=2, devices=devices(8))
    assert found.sent == traffic(units(spec), devices(8), passes=2)


def test_muon_gathers_each_of_its_matrices_once_more() -> None:
    spec = archdsl.load("transformer")
    adamw, muon = (
        forecast_training(spec, TrainConfig(batch_size=8, optimizer=name), devices(8))
        for name in ("adamw", "muon")
    )
    matrices = spec.dim * (4 * spec.dim + 3 * 2560) * 8  # of 8 layers
    assert muon.sent.all_gather - adamw.sent.all_gather == 7 * 4 * matrices // 8
    assert muon.sent.reduce_scatter == adamw.sent.reduce_scatter
    assert adamw.memory.optimizer - muon.memory.optimizer == 4 * matrices // 8


def test_sequences_that_draw_their_own_depth_are_computed_in_a_pass_for_each() -> None:
    drawn = "training={depth: {law: uniform, min: 2, max: 4, per: sequence}}"
    spec = archdsl.load("loop", overrides=[drawn])
    assert passes_of_step(spec, 2) == 2
    assert passes_of_step(spec, 12) == 3
    assert passes_of_step(spec, 12, accumulate=2) == 3
    assert passes_of_step(spec, 12, accumulate=4) == 6
    assert passes_of_step(archdsl.load("itt"), 12, accumulate=4) == 4


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    config = TrainConfig(batch_size=16, accumulate=4)
    with pytest.raises(DevicesError, match="8 devices in 4 parts each; use a multiple of 32"):
        forecast_training(archdsl.load("itt"), config, devices(8))
