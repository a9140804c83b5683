"""Tests of what shows a training: loggers, figures of speed, losses of loop steps, and profiles."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archdsl.costs.receipt import cost
from archdsl.errors import ArchdslError
from archdsl.files import WriteError
from archdsl.model.build import build
from archdsl.training.loggers import numbers
from archdsl.training.profile import profile_of
from archdsl.training.run import Trainer, train
from archdsl.training.throughput import Throughput, peak_of, train_flops_per_token
from tests.training.test_run import (
    CONFIG,
    SKILL,
    HookedData,
    Killed,
    config,
    kill,
    metrics,
    same,
    spec,
)


def test_tensorboard_shows_the_figures_once_also_after_a_resumption(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = config(log=["tensorboard"])
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), watched, tmp_path)
    train(spec(), SKILL, watched, tmp_path)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    lines = metrics(tmp_path)
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert len(shown.Scalars("loss")) == len(losses) == 12
    assert [event.step for event in shown.Scalars("validation/loss")] == [6, 12]


class Calls:
    """A stand-in for the modules wandb and trackio, which notes how it is called."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, project: str, **options: Any) -> Any:
        self.started.append({"project": project} | options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.ended += 1


def test_wandb_and_trackio_get_the_numbers_of_one_run_also_after_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = {name: Calls() for name in ("wandb", "trackio")}
    for name, calls in fakes.items():
        monkeypatch.setitem(sys.modules, name, calls)
    watched = config(log=["wandb", "trackio"], loss_per_step=True)
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), watched, tmp_path / "mine")
    train(spec(), SKILL, watched, tmp_path / "mine")
    for calls in fakes.values():
        first, second = calls.started
        assert (first["project"], first["name"], first["resume"]) == ("archdsl", "mine", "allow")
        assert first["config"]["lr"] == 1e-3
        assert first.get("id") == second.get("id")
        assert calls.ended == 2
        assert [step for step, _ in calls.logged] == [*range(1, 8), *range(6, 13)]
        assert {"loss", "tokens_per_s", "flops_per_s", "validation/loss"} <= calls.logged[-1][
            1
        ].keys()
        assert "loss_of_steps/3" in calls.logged[-1][1]
    assert fakes["wandb"].started[0]["id"]


def test_a_package_that_is_missing_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        wanted = rf"^log: {name} is not installed: pip install 'archdsl\[{name}\]'$"
        with pytest.raises(ArchdslError, match=wanted):
            train(spec(), SKILL, config(log=name), tmp_path / name)
    with pytest.raises(ArchdslError, match="log: wandb needs the folder of the run"):
        train(spec(), SKILL, config(log="wandb"))


def test_numbers_have_the_names_of_where_they_stand() -> None:
    figures = {"a": 1, "b": {"c": 2.5, "d": None, "e": "x"}, "f": [3, {"g": 4}], "h": True}
    assert dict(numbers(figures)) == {"a": 1, "b/c": 2.5, "f/1": 3, "f/2/g": 4}


def test_mfu_is_the_share_of_the_peak_that_the_flops_of_training_take() -> None:
    plain = spec()
    model = build(plain)
    per_token = train_flops_per_token(model, 16)
    assert per_token == pytest.approx(cost(plain).train_flops_per_token, rel=0.05)
    speed = Throughput(model, 16, peak=1e9, devices=2)
    assert speed.figures(1000.0) == pytest.approx(
        {"flops_per_s": 1000 * per_token, "mfu": 1000 * per_token / 2e9}, rel=1e-3
    )
    assert "mfu" not in Throughput(model, 16, peak=None).figures(1000.0)


def test_the_flops_are_those_of_the_tokens_that_the_routers_selected() -> None:
    run = Trainer(build(spec("blocks.1.router.kind=threshold")), SKILL, CONFIG)
    run.run(1)
    before = train_flops_per_token(run.model, 16)
    shares = run.model.router_shares()
    run.model.router_shares = lambda: dict.fromkeys(shares, 0.0)  # type: ignore[method-assign]
    assert train_flops_per_token(run.model, 16) < 0.9 * before


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),  # which is slower than an A10
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_the_last_loss_of_the_steps_is_that_of_the_model_and_measuring_changes_nothing(
    tmp_path: Path,
) -> None:
    plain = train(spec(), SKILL, CONFIG)
    measured = train(spec(), SKILL, config(loss_per_step=True), tmp_path)
    assert same(plain.model, measured.model)
    losses = metrics(tmp_path)[-1]["loss_of_steps"]
    run = Trainer(measured.model, SKILL, config(eval_tokens=4 * 16))
    assert len(losses) == len(measured.model.loops[-1].passes) == 3
    assert losses[-1] == pytest.approx(run.evaluate().loss, rel=1e-5)
    assert losses[0] != losses[-1]


def test_a_profile_has_a_span_for_each_step_of_a_loop_and_leaves_no_hook(tmp_path: Path) -> None:
    result = train(spec(), SKILL, config(profile=2, steps=6), tmp_path)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name == "trace-step-000003.json"
    spans = [
        e["name"]
        for e in json.loads(file.read_text())["traceEvents"]
        if e.get("cat") == "user_annotation"
    ]
    for step in range(3):
        assert spans.count(f"blocks.1 step {step}") == 2
    assert spans.count("layer 1") == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())
    assert same(result.model, train(spec(), SKILL, config(steps=6)).model)


def test_a_profile_adds_no_hooks_to_layers_that_are_compiled(tmp_path: Path) -> None:
    model = build(spec())
    compiled = profile_of(model, config(profile=1, compile=True), tmp_path)
    assert compiled is not None
    compiled.after_step(1)
    compiled.after_step(2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    compiled.close()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["trace-step-000003.json"]


def test_a_trace_that_was_not_written_ends_the_training_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: object, path: str) -> None:  # so does the profiler of torch on a full disk
        Path(f"{path}.tmp").write_text("{")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", half)
    with pytest.raises(WriteError, match=r"trace-step-000003.json could not be written: the disk"):
        train(spec(), SKILL, config(profile=2, steps=6), tmp_path)
    assert not list((tmp_path / "profile").iterdir())
