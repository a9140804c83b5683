"""The loss that computes only some logits at a time equals the plain cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

import archdsl
from archdsl.costs.activations import LOGITS
from archdsl.data.types import IGNORE
from archdsl.evaluation.evaluate import cross_entropy
from archdsl.lang.spec import ModelSpec
from archdsl.model.language_model import LanguageModel
from tests import naive

V, T = 37, 16
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
LOOP = {"kind": "loop", "steps": 2, "router": {"kind": "predictor", "capacity": 0.4}, "body": LAYER}


def built(**fields: Any) -> LanguageModel:
    sizes = {"name": "m", "vocab_size": V, "context": T, "dim": 16, "blocks": [LAYER, LOOP]}
    model = archdsl.build(ModelSpec.model_validate(sizes | fields))
    naive.randomise(model)
    return model


def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    tokens_BT, targets_BT = (torch.randint(V, (3, T), generator=rng) for _ in range(2))
    targets_BT[0, 2:9] = IGNORE
    return tokens_BT, targets_BT


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [1, 5, 48, 1000], ids="{} rows at a time".format)
def test_loss_and_gradients_equal_the_plain_ones(
    rows: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGITS, "cpu", rows * V + V // 2)
    model, (tokens_BT, targets_BT) = built(tie_embeddings=tied), batch()
    # divided, and with a router's own loss: as the trainer has it
    wanted = cross_entropy(model(tokens_BT), targets_BT).sum() / 41
    wanted = wanted + sum(model.trace.losses.values())
    found = model.loss(tokens_BT, targets_BT) / 41
    found = found + sum(model.trace.losses.values())
    assert model.trace.losses
    naive.agree(found, wanted, list(model.parameters()))


def test_frozen_weights_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 5 * V)
    model, (tokens_BT, targets_BT) = built(), batch()
    model.head.weight.requires_grad_(False)
    model.loss(tokens_BT, targets_BT).backward()
    assert model.head.weight.grad is None
    assert all(p.grad is not None for p in model.blocks[0].parameters())


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 10 * 5000)
    model, (tokens_BT, targets_BT) = built(vocab_size=5000), batch()
    largest = []
    for nats in (model.loss, lambda *of: cross_entropy(model(of[0]), of[1]).sum()):
        with profile(profile_memory=True) as seen:
            nats(tokens_BT, targets_BT).backward()
        largest.append(max(event.self_cpu_memory_usage for event in seen.events()))
    logits = tokens_BT.numel() * 5000 * 8
    assert largest[0] < logits / 2 < logits <= largest[1]


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "bfloat16"])
def test_the_sum_of_losses_is_in_full_precision(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 64 * V)
    model = built(context=512).to(torch.bfloat16 if half else torch.float32)
    tokens_BT = torch.randint(V, (8, 512))
    with torch.autocast("cpu", torch.bfloat16, enabled=not half), torch.no_grad():
        nats = model.loss(tokens_BT, tokens_BT)
        logits_BTV = model(tokens_BT)
        model.head.weight.copy_(model.head.weight.bfloat16())
        assert model.loss(tokens_BT, tokens_BT) == nats, "the weights are rounded before they count"
    assert nats.dtype == torch.float32
    exact = F.cross_entropy(logits_BTV.double().flatten(0, 1), tokens_BT.flatten())
    assert float(nats) / tokens_BT.numel() == pytest.approx(float(exact), rel=5e-4)
