"""A state in which something is missing or cannot be is refused, and never trained from."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archdsl.model.build import build
from archdsl.model.checkpoint import CheckpointError
from archdsl.training.run import Trainer, train
from tests.shipped import STRUCTURES
from tests.training.damage import change_json, change_tensors
from tests.training.test_run import CONFIG, SKILL, HookedData, Killed, config, kill, same, spec

LAST = Path("checkpoints") / "step-000005"


@pytest.fixture(scope="module")
def _interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), CONFIG, out)
    return out


@pytest.fixture
def interrupted(_interrupted: Path, tmp_path: Path) -> Path:
    """The folder of a run whose last checkpoint is that of step 5."""
    return Path(shutil.copytree(_interrupted, tmp_path / "run"))


def dropped(*endings: str) -> Callable[[dict[str, Tensor]], object]:
    """Removes the tensors whose names end so."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def set_to(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict.clear, r"optimizer/\S+/step is missing, and without it other weights would be"),
        (dropped("exp_avg"), r"optimizer/\S+/exp_avg is missing"),
        (dropped("exp_avg_sq"), r"optimizer/\S+/exp_avg_sq is missing"),
        (dropped("head.weight/step"), r"optimizer/head.weight/step is missing"),
        (dropped("head.weight/exp_avg"), r"optimizer/head.weight/exp_avg is missing"),
        (
            set_to("optimizer/head.weight/exp_avg", torch.zeros(16, 8)),
            r"optimizer/head.weight/exp_avg has the shape \[16, 8\], and must have \[8, 16\]",
        ),
        (
            set_to("optimizer/head.weight/exp_avg", torch.zeros(8, 16, dtype=torch.int64)),
            r"optimizer/head.weight/exp_avg is of type int64, and must be of float32",
        ),
        (
            set_to("optimizer/head.weight/exp_avg", torch.full((8, 16), math.nan)),
            r"optimizer/head.weight/exp_avg has values that are not finite",
        ),
        (
            set_to("optimizer/head.weight/exp_avg_sq", torch.full((8, 16), -1.0)),
            r"optimizer/head.weight/exp_avg_sq has values below 0",
        ),
        (
            set_to("optimizer/head.weight/step", torch.tensor(6.0)),
            r"optimizer/head.weight/step is 6, and must be 1 to 5",
        ),
        (
            set_to("optimizer/other/step", torch.tensor(5.0)),
            r"optimizer/other/step is unexpected: it belongs to no parameter",
        ),
    ],
)
def test_moments_that_are_missing_or_cannot_be_are_refused_by_name(
    interrupted: Path, change: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    change_tensors(interrupted / LAST, "training.safetensors", change)
    with pytest.raises(CheckpointError, match=rf"^\S+/{LAST}/training.safetensors: {complaint}"):
        train(spec(), SKILL, CONFIG, interrupted)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("step", None, "must be a whole number, got nothing"),
        ("step", "five", "must be a whole number, got 'five'"),
        ("step", -1, "must be at least 0, got -1"),
        ("step", 13, "must be at most 12, the steps of the run, got 13"),
        ("tokens", 2.5, "must be a whole number, got 2.5"),
        ("lowest_loss", math.nan, "must be finite, got nan"),
        ("lowest_loss", [1], "must be a number, got a list of 1"),
        ("absurd_steps", True, "must be a whole number, got True"),
        ("made_by", 3, "must be a mapping, got 3"),
        *[(name, ..., "is required: ") for name in ("step", "tokens", "lowest_loss", "made_by")],
    ],
)
def test_what_a_state_counts_is_refused_by_name(
    interrupted: Path, field: str, value: Any, complaint: str
) -> None:
    def change(state: dict[str, Any]) -> None:
        state.pop(field) if value is ... else state.update({field: value})

    change_json(interrupted / LAST, "training.json", change)
    with pytest.raises(
        CheckpointError, match=rf"^\S+/{LAST}/training.json: {field}: {re.escape(complaint)}"
    ):
        train(spec(), SKILL, CONFIG, interrupted)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("validation"), "validation: is required: the evaluation"),
        (lambda state: state["validation"].pop("loss"), "validation.loss: is required"),
        (lambda state: state["validation"].update(loss="low"), "validation.loss: must be a number"),
        (lambda state: state.update(step=7), "step: must be 12, the last step of the run, got 7"),
    ],
)
def test_what_a_finished_run_says_of_its_end_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    train(spec(), SKILL, CONFIG, tmp_path)
    change_json(tmp_path / "final", "training.json", change)
    with pytest.raises(CheckpointError, match=rf"^\S+/final/training.json: {complaint}"):
        train(spec(), SKILL, CONFIG, tmp_path)


def test_a_refused_state_changes_nothing(interrupted: Path) -> None:
    change_tensors(interrupted / LAST, "training.safetensors", dropped("head.weight/exp_avg"))
    run, untouched = (Trainer(build(spec(), seed=3), SKILL, CONFIG) for _ in range(2))
    with pytest.raises(CheckpointError, match="is missing"):
        run.load(interrupted / LAST)
    assert run.step == 0
    assert same(run.model, untouched.model)


def test_a_parameter_without_a_gradient_has_no_moments_and_is_restored_without() -> None:
    def unused() -> Trainer:
        model = build(spec())
        model.unused = torch.nn.Parameter(torch.ones(3))
        return Trainer(model, SKILL, CONFIG)

    whole, first, second = unused(), unused(), unused()
    whole.run()
    first.run(5)
    assert first.state()["without_moments"] == ["unused"]
    second.model.load_state_dict(first.model.state_dict())
    second.restore(first.state())
    second.run()
    assert same(whole.model, second.model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_step_gives_all_parameters_of_the_shipped_specs_moments(name: str) -> None:
    from archdsl.lang.load import load
    from archdsl.lang.spec import Sizes

    small = load(name).resized(Sizes(dim=16, context=16, vocab_size=8, head_size=8, repeat=1))
    run = Trainer(build(small), SKILL, config(steps=1, context=16))
    run.run()
    assert "without_moments" not in run.state()
