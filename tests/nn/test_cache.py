"""The cache: its content, its memory and its rows.

tests/blocks/test_contract.py tests for every block that decoding with a cache equals one pass.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import archdsl
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.language_model import DialError, LanguageModel
from archdsl.nn.cache import Cache, ContextFullError, Kept, Memory, RowsError, Stream
from tests import naive

V, T = 11, 16
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
LOOP = {"kind": "loop", "steps": 3, "router": {"kind": "prefix", "capacity": 0.4}, "body": LAYER}


def built(*blocks: Any) -> LanguageModel:
    fields = {"name": "m", "vocab_size": V, "context": T, "dim": 16, "blocks": blocks}
    model = archdsl.build(ModelSpec.model_validate(fields)).eval()
    naive.randomise(model)
    return model


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        "itt",
        "mor",
        "mod",
        "hybrid",
        "universal",
        "tiny",
        "itt, kv last",
        "itt, kv all",
    ],
)
@torch.inference_mode()
def test_the_bytes_in_the_receipt_are_those_of_the_cache(name: str) -> None:
    name, *kv = name.split(", kv ")
    overrides = [f"blocks.0.body.1.kv={one}" for one in kv]
    spec = archdsl.load(name, overrides=overrides).resized(Sizes(32, 40, 64, 8, 2))
    model = archdsl.build(spec, dtype=torch.bfloat16).eval()
    cache = model.new_cache()
    model(torch.arange(40).unsqueeze(0), cache=cache)
    assert cache.nbytes == archdsl.cost(spec).kv_bytes_per_token * 40


@torch.inference_mode()
def test_entries_of_selected_tokens_only_take_the_memory_of_these_tokens() -> None:
    model, cache = built(LOOP), Cache(T)
    model(tokens(1), cache=cache)
    kept = {
        (path, name): entries.limit
        for (_, path), memory in cache.memories
        for name, entries in memory.kept.items()
    }
    assert kept == {
        ((0,), "k"): 16,
        ((0,), "v"): 16,
        ((1,), "scores"): 16,
        ((1,), "k"): 6,
        ((1,), "v"): 6,
        ((2,), "scores"): 16,
        ((2,), "k"): 6,
        ((2,), "v"): 6,
    }


def test_a_copy_of_a_stream_computes_anew() -> None:
    stream = Stream()
    assert stream.once("key", lambda: 1) == stream.once("key", lambda: 2) == 1
    assert replace(stream, past=3).once("key", lambda: 2) == 2


@torch.inference_mode()
def test_shared_keys_and_values_are_stored_once() -> None:
    own, shared = built(LAYER), built(LOOP | {"router": None, "kv": "shared"})
    caches = [Cache(T), Cache(T)]
    for model, cache in zip((own, shared), caches, strict=True):
        model(tokens(), cache=cache)
    assert caches[0].nbytes == caches[1].nbytes


@pytest.mark.parametrize("kv", ["shared", "all"])
@torch.inference_mode()
def test_further_passes_attend_to_keys_of_passes_before_in_earlier_chunks(kv: str) -> None:
    model, tokens_BT = built(LOOP | {"router": None, "kv": kv}), tokens()
    mask_BT = torch.ones(3, T, dtype=torch.bool)
    mask_BT[0, 2:5] = False  # this row is behind the others then
    cache, sizes = Cache(T), [6, 1, 1, 8]
    chunks = zip(tokens_BT.split(sizes, 1), mask_BT.split(sizes, 1), strict=True)
    found = torch.cat([model(part, mask, cache) for part, mask in chunks], 1)
    torch.testing.assert_close(found[mask_BT], model(tokens_BT, mask_BT)[mask_BT])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("capacity", [0.2, 0.9])
@pytest.mark.parametrize("kv", ["shared", "last", "all"])
@torch.inference_mode()
def test_a_row_may_have_no_token_while_other_rows_have_one(
    kv: str, capacity: float, window: int | None
) -> None:
    router = {"kind": "prefix", "capacity": capacity}
    body = LAYER | {"attention": {"head_size": 8, "window": window}}
    model, tokens_BT = built(LOOP | {"kv": kv, "router": router, "body": body}), tokens()
    mask_BT = torch.ones(3, T, dtype=torch.bool)
    mask_BT[1:, 2:5] = False
    mask_BT[0, 8:10] = False
    cache, sizes = Cache(T), [8, *[1] * 8]
    chunks = zip(tokens_BT.split(sizes, 1), mask_BT.split(sizes, 1), strict=True)
    found = torch.cat([model(part, mask, cache) for part, mask in chunks], 1)
    torch.testing.assert_close(found[mask_BT], model(tokens_BT, mask_BT)[mask_BT])


@torch.inference_mode()
def test_each_token_keeps_the_keys_of_each_pass_and_no_pass_reads_those_of_a_later_one() -> None:
    """With `kv: last` every pass has a cache of its own, so that decoding is exact. A pass that
    reads what the last pass of each token left gives something else."""
    model, tokens_BT = built(LOOP | {"kv": "last"}), tokens()
    caches = model.new_cache(), model.new_cache()
    for cache in caches:
        model(tokens_BT[:, :12], cache=cache)
    final = {name: kept.data for name, kept in kept_of(caches[1], 2).items() if name != "scores"}
    for step in (0, 1):
        for name, data in final.items():
            kept_of(caches[1], step)[name].data = data.clone()
    exact, other = (model(tokens_BT[:, 12:], cache=cache) for cache in caches)
    whole = model(tokens_BT)[:, 12:]
    torch.testing.assert_close(exact, whole)
    assert (other - whole).abs().max() > 0.01


def kept_of(cache: Cache, step: int) -> dict[str, Kept]:
    found: dict[str, Kept] = {}
    for (_, path), memory in cache.memories:
        found |= memory.kept if path == (step,) else {}
    return found


@torch.inference_mode()
def test_rows_can_be_repeated_removed_and_reordered() -> None:
    model, tokens_BT = built(LOOP, LAYER), tokens()
    cache = model.new_cache()
    model(tokens_BT[:, :9], torch.rand(3, 9) < 0.7, cache)
    whole = model.new_cache()
    mask_BT = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    cache = model.new_cache()
    model(tokens_BT[:, :9], mask_BT, cache)
    rows = torch.tensor([2, 0, 2, 2])
    model(tokens_BT[rows, :9], mask_BT[rows], whole)
    cache.reorder(rows)
    for t in range(9, T):
        step = tokens_BT[rows, t : t + 1]
        torch.testing.assert_close(model(step, cache=cache), model(step, cache=whole))


@torch.inference_mode()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_branches_from_a_common_prompt(copied: Callable[[Cache], Cache]) -> None:
    model, tokens_BT = built(LOOP, LAYER), tokens()
    cache = model.new_cache()
    model(tokens_BT[:, :9], cache=cache)
    branches = [copied(cache), copied(cache), cache]
    ends = [tokens_BT[:, 9:], tokens_BT[:, 9:].flip(1), tokens_BT[:, 9:]]
    for branch, end_BT in zip(branches, ends, strict=True):
        whole_BTV = model(torch.cat((tokens_BT[:, :9], end_BT), 1), cache=model.new_cache())
        torch.testing.assert_close(model(end_BT, cache=branch), whole_BTV[:, 9:])


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 3, 8, 12])
def test_a_cache_that_grows_keeps_what_it_has(window: int | None) -> None:
    """The routers rank all tokens so far, and a ring of a window has wrapped, or has not."""
    windowed = LAYER | {"attention": {"head_size": 8, "window": window}}
    model, tokens_BT = built(windowed, LOOP | {"body": windowed}), tokens()
    mask_BT = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.7
    small, whole = model.new_cache(9), model.new_cache()
    for start, end in ((0, 5), (5, 9), (9, 13), (13, T)):
        if end > small.max_length:
            with pytest.raises(ContextFullError, match=r"or call its grow\(\)"):
                model(tokens_BT[:, start:end], cache=small)
            small.grow(end)
        chunk = tokens_BT[:, start:end], mask_BT[:, start:end]
        found_BTV, wanted_BTV = model(*chunk, small), model(*chunk, whole)
        torch.testing.assert_close(found_BTV[chunk[1]], wanted_BTV[chunk[1]])


@torch.inference_mode()
def test_a_copy_of_the_model_goes_on_with_a_cache() -> None:
    model, tokens_BT = built(LOOP, LAYER), tokens()
    cache = model.new_cache()
    model(tokens_BT[:, :9], cache=cache)
    whole_BTV = model(tokens_BT, cache=model.new_cache())
    found_BTV = copy.deepcopy(model)(tokens_BT[:, 9:], cache=cache)
    torch.testing.assert_close(found_BTV, whole_BTV[:, 9:])


@torch.inference_mode()
def test_a_batch_of_another_size_is_an_error_that_leaves_the_cache_unchanged() -> None:
    model, tokens_BT = built(LOOP), tokens()
    cache = model.new_cache()
    whole_BTV = model(tokens_BT, cache=model.new_cache())
    model(tokens_BT[:1, :9], cache=cache)
    with pytest.raises(RowsError, match="begun with a batch of 1 rows, and this one has 3"):
        model(tokens_BT[:, 9:], cache=cache)
    cache.reorder(torch.zeros(3, dtype=torch.long))
    found_BTV = model(tokens_BT[:1, 9:].expand(3, -1), cache=cache)
    torch.testing.assert_close(found_BTV, whole_BTV[:1, 9:].expand(3, -1, -1))


@torch.inference_mode()
def test_a_full_cache_is_an_error_that_leaves_it_unchanged() -> None:
    model, tokens_BT = built(LOOP), tokens()
    cache = model.new_cache(10)
    model(tokens_BT[:, :9], cache=cache)
    before = cache.nbytes
    with pytest.raises(ContextFullError, match=r"12 tokens exceed the 10"):
        model(tokens_BT[:, 9:12], cache=cache)
    assert (cache.length, cache.nbytes) == (9, before)
    model(tokens_BT[:, 9:10], cache=cache)
    assert cache.length == 10
    with pytest.raises(ContextFullError, match="17 tokens exceed the context of 16"):
        model.new_cache(17)


@torch.inference_mode()
def test_changing_the_dial_while_a_cache_is_in_use_is_an_error() -> None:
    model, tokens_BT = built(LOOP), tokens()
    cache = model.new_cache()
    model(tokens_BT[:, :4], cache=cache)
    model.dial(capacity=0.9)
    with pytest.raises(DialError, match="begin with a new one"):
        model(tokens_BT[:, 4:], cache=cache)
    model.dial()
    assert model(tokens_BT[:, 4:], cache=cache).isfinite().all()


def test_new_entries_replace_the_oldest_when_the_window_is_full() -> None:
    kept = Kept(torch.zeros(2, 1, 1), limit=4)
    new = torch.arange(1.0, 7.0).view(1, 6, 1).expand(2, 6, 1)
    kept.write(new, Stream(0, torch.tensor([6, 3]), 4))
    past = torch.tensor([6, 3])
    order_BS = kept.order(past)
    assert order_BS.tolist() == [[4, 5, 2, 3], [0, 1, 2, -1]]
    for row, order_S in zip(kept.data[..., 0].tolist(), order_BS.tolist(), strict=True):
        assert [v for v, o in zip(row, order_S, strict=True) if o >= 0] == [
            o + 1 for o in order_S if o >= 0
        ]


def state_after(length_B: Tensor | None, chunk: int = 2) -> Tensor:
    """What a state holds after chunks of a stream in which the state after token t is t + 1."""
    memory, past = Memory(), torch.zeros(3, dtype=torch.long)
    for start in range(0, 6, chunk):
        after_BT = torch.arange(start, start + chunk).expand(3, -1).unsqueeze(-1) + 1.0
        state = memory.state("sum", after_BT, 1)
        length = None if length_B is None else (length_B - start).clamp(0, chunk)
        state.write(after_BT, Stream(past, length))
    return state.data[:, 0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_a_state_is_that_after_the_last_real_token_of_each_row(chunk: int) -> None:
    assert state_after(None, chunk).tolist() == [6, 6, 6]
    assert state_after(torch.tensor([0, 1, 5]), chunk).tolist() == [0, 1, 5]


def test_a_state_moves_with_its_row_and_is_counted() -> None:
    cache = Cache(8)
    x_BTD = torch.arange(3.0).view(3, 1, 1)
    state = cache.of_layer("block").memory(("", ())).state("last", x_BTD, 1)
    state.write(x_BTD, Stream())
    assert cache.nbytes == 3 * 4
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    assert state.data[:, 0].tolist() == [2, 0, 0, 1]
    assert cache.nbytes == 4 * 4
