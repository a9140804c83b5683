"""Attention of selected tokens by blocks, as on a GPU, against masks on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

import archdsl
from archdsl.blocks.modules import attention
from archdsl.lang.spec import ModelSpec
from archdsl.nn import selected_attention
from archdsl.nn.selected_attention import (
    BLOCK,
    _by_blocks,
    attend_by_blocks,
    blocks_are_possible,
    blocks_seen,
)

ROUTERS = ("top_k", "threshold", "prefix", "random", "predictor")

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler may warn


@pytest.fixture(autouse=True)
def nothing_is_compiled_before() -> Iterator[None]:
    selected_attention._compiled.cache_clear()
    yield
    selected_attention._compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are taken on the CPU, too; flex_attention has a backward pass there that it forbids,
    which makes all scores and looks at the mask alone."""
    monkeypatch.setattr(attention, "blocks_are_possible", lambda _: True)
    monkeypatch.setattr(selected_attention, "_compiled", lambda: selected_attention._by_blocks)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def places(counts: list[int], T: int, S: int) -> Tensor:
    """For each row so many selected places, which grow, and others that fill up the row."""
    rows = []
    for count in counts:
        order = torch.randperm(S)
        rows.append(torch.cat((order[:count].sort().values, order[count:T].sort().values)))
    return torch.stack(rows)


@given(st.data())
def test_each_block_is_left_out_masked_or_whole_as_its_queries_see_it(data: st.DataObject) -> None:
    S = data.draw(st.integers(1, 5 * BLOCK))
    T = data.draw(st.integers(1, S))
    counts = data.draw(st.lists(st.integers(1, T), min_size=1, max_size=2))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    place_BT = places(counts, T, S)
    mask = blocks_seen(place_BT, S)
    masked_BNM, whole_BNM = (
        listed(count, index).squeeze(1)
        for count, index in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (masked_BNM & whole_BNM).any()
    for row, count in enumerate(counts):
        seen_TS = place_BT[row, :count].unsqueeze(1) >= torch.arange(S)
        for n, queries in enumerate(seen_TS.split(BLOCK)):
            for m, seen in enumerate(queries.split(BLOCK, 1)):
                if whole_BNM[row, n, m]:
                    assert seen.all()
                elif not masked_BNM[row, n, m]:
                    assert not seen.any()
                if len(seen) == BLOCK and seen.all():
                    assert whole_BNM[row, n, m]
    # the gradients of keys go by the same blocks, listed by keys
    by_keys = listed(mask.q_num_blocks, mask.q_indices)
    whole_by_keys = listed(mask.full_q_num_blocks, mask.full_q_indices)
    assert torch.equal(by_keys.squeeze(1), masked_BNM.transpose(1, 2))
    assert torch.equal(whole_by_keys.squeeze(1), whole_BNM.transpose(1, 2))


def listed(count: Tensor | None, index: Tensor | None) -> Tensor:
    """Which blocks are among the first ``count`` of each list."""
    assert count is not None
    assert index is not None
    among = torch.arange(index.size(-1)) < count.unsqueeze(-1)
    return torch.zeros(index.shape).scatter_add(-1, index.long(), among.float()).bool()


@pytest.mark.parametrize(("T", "S"), [(1, 3), (96, 200), (300, 700)])
def test_values_and_gradients_are_those_of_a_mask(T: int, S: int, on_this_machine: None) -> None:
    torch.manual_seed(0)
    place_BT = places([T, max(1, T // 2)], T, S)
    q, k, v = (
        torch.randn(2, heads, n, 8, dtype=torch.float64, requires_grad=True)
        for heads, n in ((4, T), (2, S), (2, S))
    )
    seen_B1TS = (place_BT.unsqueeze(2) >= torch.arange(S)).unsqueeze(1)
    found = attend_by_blocks(q, k, v, place_BT, grouped=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen_B1TS, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), slope),
        torch.autograd.grad(wanted, (q, k, v), slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("router", "compiled"),
    [*((router, False) for router in ROUTERS), ("top_k", True), ("prefix", True)],
)
def test_a_loop_with_shared_keys_computes_the_same(
    router: str, compiled: bool, on_this_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = archdsl.build(shared_keys(router)).double().train()
    ids_BT = torch.randint(50, (3, 64))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # of the random router
        model.loss(ids_BT, ids_BT).backward()
        # a compiled layer has zeros for what it does not use
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    monkeypatch.setattr(attention, "blocks_are_possible", lambda _: False)
    wanted = gradients()
    monkeypatch.setattr(attention, "blocks_are_possible", lambda _: True)
    if compiled:
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for one, other in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, other)


def shared_keys(router: str) -> ModelSpec:
    layer = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
    loop = {"kind": "loop", "steps": 3, "kv": "shared", "body": layer}
    loop |= {"router": {"kind": router, "capacity": 0.5}}
    sizes = {"name": "shared", "vocab_size": 50, "context": 64, "dim": 16}
    return ModelSpec.model_validate({**sizes, "blocks": [layer, loop]})


def test_a_process_may_train_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    for heads in range(1, 13):
        q, k, v = (torch.randn(1, heads, n, 4) for n in (5, 9, 9))
        attend_by_blocks(q, k, v, places([5], 5, 9), grouped=False)


@pytest.mark.slow
def test_a_kernel_that_computes_only_these_blocks_has_the_values_of_a_mask() -> None:
    torch.manual_seed(0)
    T, S = 300, 700
    place_BT = places([300, 140], T, S)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, T), (2, S), (2, S)))
    with torch.no_grad():
        found = attend_by_blocks(q, k, v, place_BT, grouped=True)
    seen_B1TS = (place_BT.unsqueeze(2) >= torch.arange(S)).unsqueeze(1)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen_B1TS, enable_gqa=True
    )
    for row, count in enumerate([300, 140]):
        torch.testing.assert_close(found[row, :, :count], wanted[row, :, :count])


@pytest.mark.slow
def test_when_compiled_each_sequence_has_its_own_lists_of_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels for a GPU find the lists of a sequence by the stride of the heads, of which there is
    one; those of a CPU by that of the sequences."""
    from torch._inductor import config
    from torch._inductor.kernel.flex import flex_cpu

    realize: Any = vars(flex_cpu)["maybe_realize"]
    strides: list[int] = []

    def noted(given: list[Any]) -> list[Any]:
        made: list[Any] = realize(given)
        lists = [one for one in made if hasattr(one, "get_size") and one.get_dtype() == torch.int32]
        strides.extend(int(one.get_stride()[1]) for one in lists if len(one.get_size()) > 2)
        return made

    monkeypatch.setattr(flex_cpu, "maybe_realize", noted)
    torch.compiler.reset()
    q, k, v = (torch.randn(3, 2, n, 16) for n in (300, 700, 700))
    place_BT = places([300, 140, 9], 300, 700)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        torch.compile(_by_blocks, fullgraph=True)(q, k, v, place_BT, False)
    assert len(strides) >= 4
    assert 0 not in strides


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_values_and_gradients_are_those_of_a_mask() -> None:
    torch.manual_seed(0)
    T, S = 300, 700
    place_BT = places([T, T], T, S).cuda()
    q, k, v = (
        torch.randn(2, heads, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads, n in ((4, T), (2, S), (2, S))
    )
    assert blocks_are_possible(q)
    seen_B1TS = (place_BT.unsqueeze(2) >= torch.arange(S, device="cuda")).unsqueeze(1)
    found = attend_by_blocks(q, k, v, place_BT, grouped=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen_B1TS, enable_gqa=True
    )
    slope = torch.randn_like(found)
    pairs = zip(
        (found, *torch.autograd.grad(found, (q, k, v), slope)),
        (wanted, *torch.autograd.grad(wanted, (q, k, v), slope)),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)


def test_blocks_are_for_half_precision_on_cuda() -> None:
    assert not blocks_are_possible(torch.empty(1, 1, 256, 64))
    assert not blocks_are_possible(torch.empty(1, 1, 256, 64, dtype=torch.bfloat16))
