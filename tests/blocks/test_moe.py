"""Mixture of experts: against its definition, its balancing, and when it is a feed-forward."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import archdsl
from archdsl.blocks.modules.moe import Moe
from archdsl.blocks.moe import MoeSpec
from archdsl.costs.receipt import cost
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from archdsl.nn.cache import Stream
from archdsl.testing import small_model
from tests import naive

D = 6
MOE: dict[str, Any] = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 5}
LAYER = {"kind": "layer", "attention": {"head_size": 8}}


def spec(**fields: Any) -> MoeSpec:
    return MoeSpec.model_validate(MOE | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "softmax", "top_k": 1, "shared": 2},
        {"normalise": True, "top_k": 3, "activation": "gelu", "balance": "none"},
        {"gate": "softmax", "normalise": True, "balance": "loss"},
        {"experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_agrees_with_the_definition(fields: dict[str, Any]) -> None:
    naive.agrees(spec(**fields), D)


def test_the_bias_decides_about_the_choice_alone() -> None:
    module = built()
    x_BTD = naive.stream(2, 7, D)
    assert module.bias_E is not None
    module.bias_E[3] = 9.0
    naive.agree(module(x_BTD, Context()), naive.block(module, x_BTD), [x_BTD])
    assert (module.chosen(module.scores(x_BTD[0].detach(), Context()))[:, 0] == 3).all()


def test_every_expert_on_all_tokens_gives_the_same_at_fixed_shapes() -> None:
    module, x_BTD = built(shared=1, normalise=True), naive.stream(3, 1, D)
    static = Context(Stream(torch.zeros(3, dtype=torch.long), None, 8, static=True))
    naive.agree(module(x_BTD, static), module(x_BTD, Context()), [x_BTD, *module.parameters()])


def built(**fields: Any) -> Moe:
    module = naive.initialised(spec(**fields).build(D)).eval()
    assert isinstance(module, Moe)
    naive.randomise(module)
    return module


# Balance


def looped(**fields: Any) -> ModelSpec:
    router = {"kind": "prefix", "capacity": 0.6}
    body = LAYER | {"ffn": MOE | fields}
    return small_model({"kind": "loop", "steps": 3, "router": router, "body": body})


def moe_of(model: LanguageModel) -> Moe:
    (found,) = [module for module in model.modules() if isinstance(module, Moe)]
    return found


def test_a_batch_moves_each_bias_once_by_the_sign_of_what_its_load_lacks() -> None:
    tokens_BT = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))

    def taught(parts: int) -> tuple[Tensor, Tensor]:
        model = archdsl.build(looped(bias_step=0.25)).train()
        moe, loads = moe_of(model), torch.zeros(4)

        def note(_: Any, given: tuple[Tensor, Context], __: Any) -> None:
            x_BTD, ctx = given
            real_BT = ctx.stream.real(x_BTD)
            index_NK = moe.chosen(moe.scores(x_BTD.flatten(0, 1), ctx))
            kept = index_NK if real_BT is None else index_NK[real_BT.flatten()]
            loads.add_(kept.flatten().bincount(minlength=4))

        handle = moe.register_forward_hook(note)
        for part in tokens_BT.chunk(parts):
            model(part)
        handle.remove()
        seen = chain(moe.pending.values(), *moe.parts.values())
        assert torch.stack(list(seen)).sum(0).equal(loads)  # of all passes of the loop
        before = moe.get_buffer("bias_E").clone()
        with torch.no_grad():
            moe.select.weight.mul_(1)  # as an optimizer does: another version
        model(tokens_BT[:1])
        return moe.get_buffer("bias_E") - before, loads

    for parts in (1, 4):
        moved_E, load_E = taught(parts)
        assert load_E.unique().numel() > 1
        assert moved_E.equal(0.25 * (load_E.mean() - load_E).sign())


def test_the_bias_balances_the_load() -> None:
    module = naive.initialised(spec(experts=8, bias_step=0.01).build(D)).train()
    assert isinstance(module, Moe)
    x_BTD = naive.stream(8, 64, D).float() + 1  # without a bias, some experts get most tokens

    def share() -> float:
        index_NK = module.chosen(module.scores(x_BTD.flatten(0, 1), Context()).detach())
        return index_NK.flatten().bincount(minlength=8).max().item() / index_NK.numel()

    assert share() > 0.25
    for _ in range(300):
        module(x_BTD, Context())
        module.commit()
    assert share() < 0.15


def test_the_loss_is_that_of_the_shares_without_padding() -> None:
    module = built(balance="loss", loss_weight=0.5).train()
    x_BTD, length_B = naive.stream(2, 6, D), torch.tensor([6, 4])
    ctx = Context(Stream(length_B=length_B))
    module(x_BTD, ctx)
    x_ND = torch.cat([x_BTD[0], x_BTD[1, :4]])
    score_NE = module.scores(x_ND, ctx)
    chosen = module.chosen(score_NE.detach()).flatten().tolist()
    wanted = torch.zeros(())
    for e in range(4):
        mean = torch.stack([row[e] / row.sum() for row in score_NE]).mean()
        wanted = wanted + 0.5 * 4 * chosen.count(e) / len(chosen) * mean
    (loss,) = ctx.trace.losses.values()
    naive.agree(loss, wanted, [x_BTD, module.select.weight])


# What it means and costs


def test_one_expert_of_weight_1_is_a_feed_forward() -> None:
    dense = small_model(LAYER | {"ffn": {"hidden": 15}})
    for fields in ({"gate": "softmax"}, {"normalise": True}):
        moe = MOE | {"experts": 1, "top_k": 1, "shared": 2, **fields}
        assert small_model(LAYER | {"ffn": moe}).fingerprint() == dense.fingerprint()
    weighed = small_model(LAYER | {"ffn": MOE | {"experts": 1, "top_k": 1, "shared": 2}})
    assert weighed.fingerprint() != dense.fingerprint()


def test_settings_without_effect_have_no_meaning() -> None:
    def print_of(**fields: Any) -> str:
        return small_model(MOE | fields).fingerprint()

    assert print_of(balance="none") == print_of(balance="none", bias_step=0.5, loss_weight=3)
    assert print_of(top_k=4) == print_of(top_k=4, balance="loss")
    assert print_of() != print_of(bias_step=0.5)
    assert print_of() != print_of(balance="none")


def test_the_receipt_has_the_parameters_that_a_token_uses() -> None:
    receipt = cost(small_model(LAYER | {"ffn": MOE | {"shared": 1}}))
    assert receipt.params - receipt.active == 2 * 3 * 16 * 5
    lora = {"kind": "loop", "parameters": {"lora": {"rank": 2}}, "body": MOE}
    model = meta_model(small_model(lora))
    receipt = cost(model.spec)
    assert receipt.params == sum(weight.numel() for weight in model.parameters())
    assert receipt.params - receipt.active == 2 * 3 * (16 * 5 + 2 * 2 * (16 + 5))
    assert cost(archdsl.load("tiny")).active == cost(archdsl.load("tiny")).params


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"top_k": 5}, "top_k.*must be at most experts, 4; got 5"),
        ({"top_k": 1, "normalise": True}, "normalise.*the gate cannot learn"),
        ({"ratio": 2.0}, "either hidden or ratio"),
    ],
)
def test_refuses_what_does_not_go_together(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){says}"):
        small_model(MOE | fields)
