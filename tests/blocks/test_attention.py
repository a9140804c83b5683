"""Attention against its definition, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import archdsl
from archdsl.blocks.attention import AttentionSpec
from archdsl.blocks.modules import attention
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import block_cost
from archdsl.lang.spec import ModelSpec
from archdsl.nn.block import Context
from archdsl.nn.cache import Stream
from tests import naive

D = 12


def spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"head_size": 4} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"heads": 5},
        {"queries_per_kv": 3},
        {"heads": 6, "head_size": 2, "queries_per_kv": 2},
        {"window": 1},
        {"window": 3},
        {"window": 99},
        {"qk_norm": True},
        {"rope_theta": None},
        {"rope_theta": 17.0},
        {"queries_per_kv": 3, "window": 4, "qk_norm": True, "rope_theta": 31.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 7, 13])
def test_agrees_with_the_definition(fields: dict[str, Any], tokens: int) -> None:
    naive.agrees(spec(**fields), D, tokens)


POS = [[0, 3, 4, 9, 20], [1, 2, 7, 8, 9]]


@pytest.mark.parametrize("fields", [{}, {"window": 4}, {"queries_per_kv": 3}], ids=str)
def test_selected_tokens_keep_their_places_in_the_sequence(fields: dict[str, Any]) -> None:
    module = built(**fields)
    x_BTD = naive.stream(2, 5, D)
    want = torch.stack(
        [
            torch.stack(naive.run(module, list(x_TD), pos, None))
            for x_TD, pos in zip(x_BTD, POS, strict=True)
        ]
    )
    got = module(x_BTD, Context(pos_BT=torch.tensor(POS)))
    naive.agree(got, want, [x_BTD, *module.parameters()])


def test_a_selection_of_a_selection_keeps_its_places_too() -> None:
    once = Context().at(torch.tensor([[2, 5, 6, 9]]), Stream())
    assert once.pos_BT is not None
    assert once.pos_BT.tolist() == [[2, 5, 6, 9]]
    twice = once.at(torch.tensor([[1, 3]]), Stream())
    assert twice.pos_BT is not None
    assert twice.pos_BT.tolist() == [[5, 9]]


@pytest.mark.parametrize("fields", [{}, {"window": 3}, {"qk_norm": True}], ids=str)
def test_a_later_pass_reads_the_keys_and_values_of_the_first(fields: dict[str, Any]) -> None:
    module = built(**fields)
    x_BTD, later_BKD = naive.stream(2, 10, D), naive.stream(2, 5, D, seed=5)
    picked = torch.tensor([[0, 3, 4, 8, 9], [1, 2, 6, 7, 8]])

    ctx = Context(handed={}, kv="shared")
    module(x_BTD, ctx)
    got = module(later_BKD, ctx.at(picked, Stream()))

    def rows() -> Iterator[torch.Tensor]:
        for x_TD, later_KD, pos in zip(x_BTD, later_BKD, picked.tolist(), strict=True):
            memory = naive.Memory("shared", module)
            naive.run(module, list(x_TD), list(range(10)), memory)
            yield torch.stack(naive.run(module, list(later_KD), pos, memory))

    naive.agree(got, torch.stack(list(rows())), [x_BTD, later_BKD, *module.parameters()])


def test_attentions_of_one_model_may_turn_at_different_speeds() -> None:
    body = [spec(rope_theta=theta) for theta in (17.0, 10_000.0)]
    naive.agrees(StackSpec(body=tuple(body)), D)


def test_rotary_positions_stay_apart_in_half_precision() -> None:
    x = torch.ones(1, 1, 4096, 8, dtype=torch.bfloat16)
    cos, sin = Context().rope(x, 10_000.0)
    want = torch.arange(4096).double()
    torch.testing.assert_close(cos[:, 0].double(), want.cos(), atol=5e-3, rtol=0)
    torch.testing.assert_close(sin[:, 4].double(), want.sin(), atol=5e-3, rtol=0)


def test_what_a_window_no_longer_sees_is_not_kept() -> None:
    assert block_cost(spec(window=5), D, 9).kv == 2 * 5 * D
    assert block_cost(spec(window=5), D, 3).kv == 2 * 3 * D
    assert block_cost(spec(queries_per_kv=3), D, 9).kv == 2 * 9 * D // 3


def built(**fields: Any) -> Attention:
    module = spec(**fields).build(D)
    naive.randomise(module)
    return module


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 256])
def test_a_chunk_may_end_in_padding_in_every_row(
    queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES", queries)  # parts of them may be padding alone
    layer = {"kind": "layer", "attention": {"head_size": 8, "window": window}}
    sizes = {"name": "padded", "vocab_size": 11, "context": 12, "dim": 16, "blocks": [layer]}
    model = archdsl.build(ModelSpec.model_validate(sizes)).double().eval()
    ids_BT = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(12)
    with torch.no_grad():
        wanted_BTV = model(ids_BT)
        first_BTV = model(ids_BT[:, :3], cache=cache)
        chunk_BT = F.pad(ids_BT[:, 3:], (0, 4))
        mask_BT = torch.arange(6).expand(2, 6) < 2
        rest_BTV = model(chunk_BT, mask_BT, cache)[:, :2]
    torch.testing.assert_close(torch.cat((first_BTV, rest_BTV), 1), wanted_BTV)
