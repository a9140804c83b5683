"""Tests of the choice of the optimizer: what Muon does, to which parameters, and how it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archdsl.lang.load import load
from archdsl.lang.spec import Sizes
from archdsl.model.build import build
from archdsl.reports.training_memory import training_memory
from archdsl.training.optimizers import Muon, Optimizer, orthogonal
from archdsl.training.run import RunMismatchError, Trainer, train
from tests.training.test_run import (
    CONFIG,
    SKILL,
    HookedData,
    Killed,
    config,
    grown,
    kill,
    same,
    spec,
    weights,
)

MUON = config(optimizer="muon")


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_muon_does_what_the_optimizer_of_torch_does_but_for_its_rounding(
    shape: tuple[int, int],
) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    muon = Muon([ours], lr=0.1, weight_decay=0.5)
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for optimizer, weight in ((muon, ours), (peer, theirs)):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (ours.detach() - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch rounds to bfloat16
    spread = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.6 < spread.min() <= spread.max() < 1.3


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    small = Sizes(dim=64, context=16, vocab_size=8, head_size=8, repeat=1)  # of rank 2, not 1
    for name in ("ouro-tiny", "mor-lora-tiny", "moeut-tiny", "tiny"):
        model = build(load(name).resized(small))
        kept = Optimizer(model, MUON).moments
        by_muon = {name for name, moments in kept.items() if moments == ("momentum_buffer",)}
        assert by_muon == {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not name.endswith(("head", "exit.score"))  # of an exit it is a vector
        }
        assert kept.keys() == dict(model.named_parameters()).keys()


def test_a_looped_matrix_gets_one_update_however_often_it_runs() -> None:
    run = Trainer(build(spec("blocks.1.steps=4")), SKILL, config(optimizer="muon", warmup_steps=0))
    before = weights(run.model)
    run.run(1)
    for name, moments in run.optimizer.moments.items():
        if "momentum_buffer" in moments:
            moved = (run.optimizer.parameters[name] - before[name]).norm()
            rows, columns = before[name].shape
            largest = 1e-3 * 0.2 * max(rows, columns) ** 0.5 * min(rows, columns) ** 0.5
            assert 0.1 * largest < moved < 1.4 * largest, name


def test_a_killed_run_with_muon_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(spec(), SKILL, MUON, tmp_path / "whole")
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 7, kill), MUON, tmp_path / "run")
    again = train(spec(), SKILL, MUON, tmp_path / "run")
    assert again.resumed_from == 5
    assert same(whole.model, again.model)
    assert not same(whole.model, train(spec(), SKILL, CONFIG).model)
    with pytest.raises(RunMismatchError, match=r"config.optimizer: 'muon' there, 'adamw' now"):
        train(spec(), SKILL, CONFIG, tmp_path / "run")


def test_muon_trains_what_a_retrofit_added_alone(tmp_path: Path) -> None:
    start = grown(tmp_path)
    run = Trainer(start.model, SKILL, config(optimizer="muon", only="new"), start)
    before = weights(run.model)
    run.run(2)
    changed = {name for name, p in run.model.named_parameters() if not p.equal(before[name])}
    assert changed == start.new_parameters == run.optimizer.state().keys()


@pytest.mark.parametrize("name", ["itt", "mor-lora-tiny"])
def test_the_memory_of_muon_is_one_moment_less_for_each_matrix(name: str) -> None:
    small = load(name).resized(Sizes(dim=64, context=16, vocab_size=99, head_size=8, repeat=1))
    optimizer = Optimizer(build(small), MUON)
    numbers = sum(
        optimizer.parameters[name].numel() * (1 if "momentum_buffer" in moments else 2)
        for name, moments in optimizer.moments.items()
    )
    assert training_memory(small, optimizer="muon").optimizer == pytest.approx(
        4 * numbers, rel=0.005
    )
