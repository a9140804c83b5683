"""Tests of dial sweeps: their figures agree with separate evaluations, differences are paired."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archdsl.costs.receipt import sequence_cost
from archdsl.data.loading import load_data
from archdsl.data.types import IGNORE
from archdsl.errors import ArchdslError
from archdsl.evaluation.dial_sweep import (
    AS_TRAINED,
    PAPER_CAPACITIES,
    DialSetting,
    SweepPoint,
    dialled,
    plot,
    preset_settings,
    sweep,
)
from archdsl.evaluation.evaluate import evaluate
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.compute_meter import metered
from archdsl.model.language_model import LanguageModel

SKILL = load_data("skill:p-hop,hops=2,length=16")
LIMIT = 2048  # tokens
ROUTER = "blocks.1.router"


def tiny(*overrides: str) -> LanguageModel:
    spec = load("tiny", overrides=["dim=32", "context=16", "blocks.1.steps=4", *overrides])
    model = build(spec, dtype=torch.float64)
    for name, weight in model.named_parameters():
        if "phi" in name:
            torch.nn.init.normal_(weight)  # otherwise further steps would have no effect
    return model.eval()


def points(model: LanguageModel, *settings: DialSetting) -> list[SweepPoint]:
    return sweep(model, SKILL, settings, limit_tokens=LIMIT, batch_size=32)


def window_losses(model: LanguageModel) -> tuple[Any, Any]:
    """Compute the summed loss and the number of targets of each window with numpy."""
    losses, counts = [], []
    for batch in SKILL.held_out("validation", 32, 16, LIMIT):
        with torch.no_grad():
            logits_BTV = model(batch.tokens_BT).numpy()
        log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
        for log_p_TV, targets_T in zip(log_p_BTV, batch.targets_BT.numpy(), strict=True):
            asked = np.flatnonzero(targets_T != IGNORE)
            losses.append(-log_p_TV[asked, targets_T[asked]].sum())
            counts.append(len(asked))
    return np.array(losses), np.array(counts)


def test_each_point_is_an_evaluation_at_its_setting() -> None:
    model = tiny()
    settings = [
        DialSetting(capacity=0.3),
        DialSetting(capacity=(0.9, 0.0, 0.5)),
        DialSetting(steps=6),
    ]
    found = points(model, *settings)
    assert [point.setting for point in found] == [AS_TRAINED, *settings]
    for point in found:
        with dialled(model, point.setting):
            alone = evaluate(model, SKILL, limit_tokens=LIMIT)
        assert point.loss == pytest.approx(alone.loss, rel=1e-12)
        assert point.standard_error == pytest.approx(alone.standard_error, rel=1e-9)
        assert point.tokens == alone.tokens
    assert len({point.loss for point in found}) == 4


def test_differences_to_the_trained_setting_pair_the_windows() -> None:
    model, setting = tiny(), DialSetting(capacity=(0.9, 0.0, 0.5))
    trained, found = points(model, setting)
    base_W, asked_W = window_losses(model)
    with dialled(model, setting):
        loss_W, _ = window_losses(model)
    difference = (loss_W - base_W).sum() / asked_W.sum()
    rest_W = loss_W - base_W - difference * asked_W
    error = rest_W.std(ddof=1) / math.sqrt(len(rest_W)) / asked_W.mean()
    assert found.difference == pytest.approx(difference, rel=1e-9)
    assert found.difference_error == pytest.approx(error, rel=1e-9)
    assert found.difference == pytest.approx(found.loss - trained.loss)
    assert (trained.difference, trained.difference_error) == (0.0, 0.0)


def test_executed_flops_are_the_closed_form_where_the_shares_are_known() -> None:
    model = tiny(f"{ROUTER}.capacity=0.5")
    _, every, none, skipped = points(
        model,
        DialSetting(capacity=1.0),
        DialSetting(capacity=0.0),
        DialSetting(capacity=(1.0, 0.0, 1.0)),
    )
    plain = load("tiny", overrides=["dim=32", "context=16", "blocks.1.steps=1"])
    flops = sequence_cost(plain).flops / 16, sequence_cost(model.spec).heaviest / 16
    assert (none.flops_per_token, every.flops_per_token) == pytest.approx(flops)
    assert skipped.flops_per_token == pytest.approx(flops[0] + 2 / 3 * (flops[1] - flops[0]))
    assert none.shares == {}
    assert every.selected == skipped.selected == 1.0


def test_shares_are_those_of_the_tokens_over_all_batches() -> None:
    model = tiny(f"{ROUTER}.capacity=[0.75, 0.5, 0.25]")
    shares, tokens = np.zeros(3), 0
    for batch in SKILL.held_out("validation", 48, 16, LIMIT):  # the last batch is smaller
        model(batch.tokens_BT)
        shares += np.array(list(model.router_shares().values())) * batch.tokens_BT.numel()
        tokens += batch.tokens_BT.numel()
    [point] = sweep(model, SKILL, (), limit_tokens=LIMIT, batch_size=48)
    assert list(point.shares.values()) == pytest.approx(list(shares / tokens))
    assert point.selected == pytest.approx(shares.mean() / tokens)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (2, "90, 70, 50, 0, 100"),
        (3, "90, 70/90, 70, 50, 90/0, 0/90, 100, 0"),
        (4, "90, 70/70/90, 70, 50, 90/90/0, 90/0/90, 0/90/90, 100, 0"),
        (
            7,
            "90, 70/70/70/70/90/90, 70, 50, 90/90/90/90/0/0, 90/90/0/0/90/90, "
            "0/0/90/90/90/90, 100, 0",
        ),
    ],
)
def test_the_papers_settings_are_stretched_over_the_routed_steps(steps: int, expected: str) -> None:
    found = preset_settings(tiny(f"blocks.1.steps={steps}"))
    assert ", ".join(map(str, found)) == expected
    if steps == 4:
        assert {s.capacity for s in found} >= {PAPER_CAPACITIES[1], *PAPER_CAPACITIES[4:7]}


def test_a_preset_holds_what_the_model_can_be_run_at() -> None:
    nested = tiny(f"{ROUTER}.nested=true", f"{ROUTER}.capacity=[0.7, 0.5, 0.3]")
    assert ", ".join(map(str, preset_settings(nested))) == "90, 70, 50, 90/90/0, 100, 0"
    assert ", ".join(map(str, preset_settings(tiny(f"{ROUTER}=null")))) == "@1, @2, @8"
    weights = tiny(f"{ROUTER}=null", "blocks.1.steps=6", "blocks.1.parameters=per_step")
    assert (
        ", ".join(map(str, preset_settings(weights))) == "@1, @2, @4"
    )  # further steps would have no weights
    two = tiny(
        "blocks.0={kind: loop, steps: 3, router: {kind: prefix}, body: {kind: feed_forward}}"
    )
    assert ", ".join(map(str, preset_settings(two))) == "90, 70, 50, 100, 0"


def test_a_leaking_model_is_swept_both_ways() -> None:
    model = tiny(f"{ROUTER}.kind=top_k")
    found = points(model, DialSetting(capacity=0.3), DialSetting(capacity=1.0))
    causal, leaking = found[:3], found[3:]
    assert {point.routing for point in causal} == {"causal"}
    assert {point.routing for point in leaking} == {"leaking"}
    assert causal[1].loss != leaking[1].loss
    assert causal[2].loss == leaking[2].loss  # all tokens are selected, whatever the routing
    assert leaking[0].difference == 0.0
    assert model.leaks


def test_what_cannot_be_served_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(type(model), "forward", fail)
    for bad in (DialSetting(capacity=1.5), DialSetting(capacity=(0.5, 0.5)), DialSetting(steps=0)):
        with pytest.raises(ArchdslError, match=r"blocks\.1: "):
            points(model, DialSetting(capacity=0.5), bad)
    with pytest.raises(ArchdslError, match="no loops"):
        preset_settings(
            build(load("transformer", overrides=["dim=64", "context=16", "vocab_size=8"]))
        )


def fail(*_: Any) -> Tensor:
    raise RuntimeError("in the middle")


def test_afterwards_the_dial_stands_as_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = tiny(), torch.arange(16).view(1, 16)
    before = model(tokens_BT)
    points(model, DialSetting(capacity=0.1, steps=2))
    torch.testing.assert_close(model(tokens_BT), before)
    with pytest.raises(RuntimeError, match="middle"), dialled(model, DialSetting(steps=1)):
        fail()
    torch.testing.assert_close(model(tokens_BT), before)


def test_a_meter_counts_tokens_but_no_padding_and_keys_of_tokens_before() -> None:
    model = tiny(f"{ROUTER}.capacity=1.0")
    tokens_BT = torch.arange(24).view(2, 12)
    mask_BT = torch.arange(12) < torch.tensor([[12], [5]])
    with torch.no_grad(), metered(model) as padded:
        model(tokens_BT, mask_BT=mask_BT)
    assert padded.tokens == 17
    cache = model.new_cache()
    with torch.no_grad(), metered(model) as decoded:
        model(tokens_BT[:, :11], cache=cache)
        model(tokens_BT[:, 11:], cache=cache)
    per_token = [sequence_cost(model.spec, tokens=n).flops / n for n in (11, 12)]
    assert decoded.tokens == 24
    assert decoded.flops == pytest.approx(22 * per_token[0] + 2 * per_token[1])
    model(tokens_BT)
    assert decoded.tokens == 24  # outside the context nothing is counted


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (AS_TRAINED, "trained"),
        (DialSetting(capacity=0.5), "50"),
        (DialSetting(capacity=(0.9, 0.125, 0.0)), "90/12.5/0"),
        (DialSetting(capacity=0.5, steps=6), "50@6"),
        (DialSetting(steps=6), "@6"),
    ],
)
def test_settings_are_named_as_in_the_paper(setting: DialSetting, text: str) -> None:
    assert str(setting) == text


def test_a_plot_is_a_png_that_appears_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = points(tiny(f"{ROUTER}.kind=top_k"), DialSetting(capacity=0.3))
    plot(found, tmp_path / "dial.png")
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["dial.png"]


def test_thresholds_of_an_exit_are_settings() -> None:
    model = tiny("blocks.1.router=null", "blocks.1.exit=halting")
    sweep_of = points(model, DialSetting(exit=0.2), DialSetting(exit=0.99))
    first, few, many = sweep_of
    assert [str(point.setting) for point in sweep_of] == ["trained", "exit 0.2", "exit 0.99"]
    assert few.flops_per_token < many.flops_per_token == first.flops_per_token
    assert few.difference != 0
    assert many.difference == 0
