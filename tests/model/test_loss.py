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
from archdsl.model import loss
from archdsl.model.language_model import LanguageModel
from archdsl.model.loss import _fused_scores, _scores, summed_cross_entropy
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
        with profile(profile_memory=True, acc_events=True) as seen:
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


def drawn(dtype: torch.dtype, streams: int = 2) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """A head, streams, targets of which some are IGNORE, and the weight of each target."""
    rng = torch.Generator().manual_seed(5)
    head_VD, *x = (torch.randn(n, 16, generator=rng).to(dtype) for n in (V, *streams * [40]))
    target_N = torch.randint(V, (40,), generator=rng)
    target_N[3:9] = IGNORE
    weight_PN = torch.rand(streams, 40, generator=rng, dtype=torch.float64)
    for tensor in (head_VD, *x, weight_PN):
        tensor.requires_grad_()
    return head_VD, x, target_N, weight_PN


def plain(head_VD: Tensor, x: list[Tensor], target_N: Tensor, weight_PN: Tensor) -> Tensor:
    """The weighted sum of the cross-entropies, from all logits at once."""
    nats = [F.cross_entropy(one @ head_VD.t(), target_N, reduction="none") for one in x]
    return (torch.stack(nats) * weight_PN).sum()


def test_weights_of_targets_get_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 7 * V)
    head_VD, x, target_N, weight_PN = drawn(torch.float64)
    found = summed_cross_entropy(x, head_VD, target_N, weight_PN)
    naive.agree(found, plain(head_VD, x, target_N, weight_PN), [weight_PN, head_VD, *x])


def test_a_second_backward_pass_raises_an_error() -> None:
    head_VD, x, target_N, weight_PN = drawn(torch.float64)
    nats = summed_cross_entropy(x, head_VD, target_N, weight_PN)
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nats.backward()


def test_the_gradient_of_the_head_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", V)  # one token at a time
    head_VD, x, target_N, _ = drawn(torch.bfloat16, streams=50)
    summed_cross_entropy(x, head_VD, target_N).backward()
    exact_VD = head_VD.detach().double().requires_grad_()
    weight_PN = torch.ones(50, 40, dtype=torch.float64)
    plain(exact_VD, [one.detach().double() for one in x], target_N, weight_PN).backward()
    assert head_VD.grad is not None
    assert exact_VD.grad is not None
    error = (head_VD.grad.double() - exact_VD.grad).norm() / exact_VD.grad.norm()
    assert error < 0.005  # as one rounding; a sum of 2,000 products in bfloat16 is off by far more


@pytest.mark.parametrize("slopes", [False, True])
def test_the_scores_for_a_compiler_equal_those_in_place(slopes: bool) -> None:
    head_VD, (x_ND,), target_N, weight_PN = drawn(torch.float64, streams=1)
    weight_N = (weight_PN[0] * (target_N != IGNORE)).detach()
    logit_NV = (x_ND @ head_VD.t()).detach()
    fused, in_place = (
        f(logit_NV.clone(), target_N, weight_N, slopes) for f in (_fused_scores, _scores)
    )
    torch.testing.assert_close(fused[0], in_place[0])
    if slopes:
        torch.testing.assert_close(fused[1], in_place[1])


def test_scores_are_compiled_only_where_triton_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for triton in (False, True):
        monkeypatch.setattr(loss, "TRITON", triton)
        for device in ("cuda", "xpu"):
            assert (loss._scores_on.__wrapped__(device) is _scores) == (not triton)
        assert loss._scores_on.__wrapped__("mps") is _scores
