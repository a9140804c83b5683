"""Tests of evaluation: an independent computation confirms the figures; nothing is changed.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from archdsl.data.loading import load_data
from archdsl.data.types import IGNORE, Data
from archdsl.errors import ArchdslError
from archdsl.evaluation.dial_sweep import sweep
from archdsl.evaluation.evaluate import evaluate
from archdsl.lang.load import load
from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel

SKILL = load_data("skill:p-hop,hops=2,length=16")


def tiny(*overrides: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    spec = load("tiny", overrides=["dim=32", "context=16", *overrides])
    return build(spec, dtype=dtype)


@pytest.fixture
def text(tmp_path: Path) -> Data:
    for split, words in (("train", 400), ("validation", 90), ("test", 90)):
        sentences = " ".join(f"naïve word {n}" for n in range(words))
        (tmp_path / f"{split}.txt").write_text(sentences, encoding="utf-8")
    return load_data(str(tmp_path), cache=tmp_path / "cache")


def by_hand(model: LanguageModel, data: Data) -> tuple[list[float], list[int], int]:
    """Compute loss, number of targets and correct predictions of each window with numpy."""
    losses, counts, right = [], [], 0
    for batch in data.held_out("validation", 64, 16):
        logits_BTV = model(batch.tokens_BT).detach().numpy().astype(np.float64)
        for logits_TV, targets_T in zip(logits_BTV, batch.targets_BT.numpy(), strict=True):
            asked = [t for t in range(len(targets_T)) if targets_T[t] != IGNORE]
            if not asked:
                continue  # a window without a target is left out
            log_p = [logits_TV[t] - np.log(np.exp(logits_TV[t]).sum()) for t in asked]
            losses.append(-sum(p[targets_T[t]] for p, t in zip(log_p, asked, strict=True)))
            counts.append(len(asked))
            right += sum(int(logits_TV[t].argmax() == targets_T[t]) for t in asked)
    return losses, counts, right


@pytest.mark.parametrize("hops", [2, 7])  # with 7, some windows have no target
def test_loss_accuracy_and_standard_error_are_those_of_a_float64_computation(hops: int) -> None:
    model, data = tiny(dtype=torch.float64), load_data(f"skill:p-hop,hops={hops},length=16")
    losses, counts, right = by_hand(model, data)
    found = evaluate(model, data)
    loss = sum(losses) / sum(counts)
    rest = np.array(losses) - loss * np.array(counts)
    assert len(set(counts)) > 1  # the windows must differ in their number of targets
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-12)
    assert found.tokens == sum(counts)
    assert found.accuracy == pytest.approx(right / sum(counts))
    expected = rest.std(ddof=1) / math.sqrt(len(rest)) / np.mean(counts)
    assert found.standard_error == pytest.approx(expected, rel=1e-9)


def test_the_way_windows_are_batched_changes_nothing() -> None:
    model = tiny(dtype=torch.float64)
    whole, parts = (evaluate(model, SKILL, batch_size=size) for size in (1024, 37))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (parts.tokens, parts.accuracy) == (whole.tokens, whole.accuracy)


@pytest.mark.parametrize("router", ["top_k", "threshold", "prefix"])
def test_a_window_longer_than_the_text_changes_nothing(text: Data, router: str) -> None:
    """Nothing fills it up: that would compete with the text for the capacity of a router."""
    targets = sum(batch.targets_BT.numel() for batch in text.held_out("validation", 1, 64))
    model = tiny(f"blocks.1.router={{kind: {router}, capacity: 0.5}}", "context=4096")
    whole = evaluate(model, text, context=targets)
    assert whole.tokens == targets
    swept = sweep(model, text, [], context=targets)
    for context in (targets + 1, 2 * targets, 4096):
        assert evaluate(model, text, context=context) == whole
        assert sweep(model, text, [], context=context) == swept


def test_guessing_costs_log2_of_the_vocabulary_in_bits_per_token(text: Data) -> None:
    model = tiny()
    nn.init.zeros_(model.head.weight)
    found = evaluate(model, text)
    bytes_per_token = text.bytes_per_token("validation")
    assert bytes_per_token is not None
    assert found.bits_per_byte == pytest.approx(math.log2(257) / bytes_per_token)
    assert found.perplexity == pytest.approx(257)
    assert evaluate(model, SKILL).bits_per_byte is None


def test_a_limit_bounds_the_tokens_and_the_split_is_the_one_asked_for(text: Data) -> None:
    model = tiny()
    assert evaluate(model, text, limit_tokens=100).tokens <= 100
    assert evaluate(model, text, split="test") != evaluate(model, text)
    assert evaluate(model, text, limit_tokens=1).standard_error is None  # there is a single window


def test_a_leaking_router_is_marked_and_scored_causally_too() -> None:
    model = tiny("blocks.1.router={kind: top_k, capacity: 0.5}")
    leaking = evaluate(model, SKILL)
    with model.causal_routing():
        alone = evaluate(model, SKILL)
    assert leaking.leaks
    assert leaking.causal == alone
    assert not alone.leaks
    assert leaking.loss != alone.loss
    assert model.leaks  # as before
    assert evaluate(tiny(), SKILL).causal is None


class Noisy(nn.Module):
    """A block that adds random numbers, as a router or dropout could, and records the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def forward(self, x_BTD: Tensor, ctx: object) -> Tensor:
        self.modes.add(self.training)
        return x_BTD + torch.randn_like(x_BTD)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_mode_random_numbers_and_gradients_alone(training: bool) -> None:
    model, noise = tiny(), Noisy()
    model.blocks.append(noise)
    model.layers.append(noise)
    model.train(training)
    first = evaluate(model, SKILL)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert evaluate(model, SKILL) == first  # the random numbers are the same each time
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training
    assert noise.modes == {False}
    assert all(parameter.grad is None for parameter in model.parameters())
    model(
        torch.zeros(1, 16, dtype=torch.int64)
    ).sum().backward()  # fails if evaluation left tensors without gradients in a cache


def test_the_mode_comes_back_after_an_error() -> None:
    model = tiny().train()
    model.head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate(model, SKILL)
    assert model.training


def fail(*_: Any) -> None:
    raise RuntimeError("in the middle")


def test_the_logits_of_one_batch_are_gone_before_the_next_are_made() -> None:
    model, alive = tiny(), list[StorageWeakRef]()
    most = 0

    def before(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(not ref.expired() for ref in alive))

    def after(_: Any, __: Any, logits_BTV: Tensor) -> None:
        alive.append(StorageWeakRef(logits_BTV.untyped_storage()))

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)
    evaluate(model, SKILL, batch_size=256)
    assert len(alive) == 4
    assert most == 0


def test_what_does_not_fit_is_said_in_words(text: Data) -> None:
    with pytest.raises(
        ArchdslError, match=r"has 257 different tokens, but tiny has only a vocab_size"
    ):
        evaluate(tiny("vocab_size=8"), text)
    with pytest.raises(ArchdslError, match=r"context of 64 tokens was requested, but tiny takes"):
        evaluate(tiny(), text, context=64)
