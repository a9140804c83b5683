"""Decoding with fixed shapes is correct, and no shape depends on the values of tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import archdsl
from archdsl.checks.invariants import gap
from archdsl.errors import ArchdslError
from archdsl.lang.registry import families
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.checkpoint import load_checkpoint, save_checkpoint
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import DialError, LanguageModel
from archdsl.nn.cache import Cache, ContextFullError, Kept
from archdsl.testing import models, small_model
from benchmarks.launches import Counter, total
from tests import naive
from tests.strategies import specs

ROWS = 3
LAYER = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
NARROW = {"kind": "layer", "attention": {"head_size": 8, "window": 3}, "ffn": {"hidden": 24}}
LOOP = {"kind": "loop", "steps": 3, "router": {"kind": "prefix", "capacity": [0.7, 0.4]}}
CASES = {
    f"{family}-{kind}-{place}": model
    for family, kinds in families().items()
    for kind, spec in kinds.items()
    for place, model in models(spec).items()
} | {
    "shared": small_model(LOOP | {"body": LAYER, "kv": "shared"}),
    "shared, all": small_model(LOOP | {"body": LAYER, "kv": "shared", "router": None}),
    "last": small_model(LOOP | {"body": LAYER, "kv": "last"}),
    "all": small_model(LOOP | {"body": LAYER, "kv": "all"}),
    "narrow, all": small_model(LOOP | {"body": NARROW, "kv": "all"}),
    "narrow, last": small_model(LOOP | {"body": NARROW, "kv": "last", "parameters": "per_step"}),
    "narrow": small_model(LOOP | {"body": NARROW}),
    "narrow, shared": small_model(LOOP | {"body": NARROW, "kv": "shared"}),
    "loop in loop": small_model(LOOP | {"body": LOOP | {"body": NARROW}}),
}


def built(spec: ModelSpec) -> LanguageModel:
    model = archdsl.build(spec).eval()
    naive.randomise(model)
    for name, quantiles in model.named_buffers():  # or nothing routed by threshold would be chosen
        if name.endswith("quantiles_RQ"):
            quantiles.copy_(quantiles / 4)
    return model


def shipped(name: str, *overrides: str) -> ModelSpec:
    return archdsl.load(name, overrides=overrides).resized(Sizes(32, 40, 64, 8, 2))


def agrees_with_growing_decode_and_with_one_pass(spec: ModelSpec) -> None:
    """Decodes rows of different lengths; some skip a step, and one ends early."""
    model, T = built(spec), spec.context
    rng = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(spec.vocab_size, (ROWS, T), generator=rng)
    mask_BT = torch.rand(ROWS, T, generator=rng) < 0.8
    mask_BT[0, 1:] = True
    mask_BT[2, T // 2 + 1 :] = False
    start = int(torch.randint(T + 1, (), generator=rng))
    with torch.no_grad(), model.causal_routing():
        whole_BTV = model(tokens_BT, mask_BT)
        if not whole_BTV.isfinite().all():
            return  # sizes that overflow are no question of decoding
        grown, fixed = model.new_cache(T), model.new_cache(T)
        if start:
            for cache in (grown, fixed):
                model(tokens_BT[:, :start], mask_BT[:, :start], cache)
        step = TokenStep(model, fixed, ROWS)
        for t in range(start, T):
            real_B = mask_BT[:, t]
            logits_BV = step(torch.where(real_B, tokens_BT[:, t], -1).tolist())
            counts, steps_BT = model.router_counts(), model.trace.steps_BT
            assert logits_BV.isfinite().all()
            assert gap(logits_BV[real_B], whole_BTV[real_B, t]).share < 1e-11
            now_BV = model(tokens_BT[:, t : t + 1], mask_BT[:, t : t + 1], grown)[:, -1]
            assert gap(logits_BV[real_B], now_BV[real_B]).share < 1e-11
            torch.testing.assert_close(steps_BT, model.trace.steps_BT, rtol=0, atol=0)
            for name, count in model.router_counts().items():
                assert count == counts[name]
        torch.testing.assert_close(fixed.length, mask_BT.sum(1))


@pytest.mark.parametrize("name", CASES)
def test_decoding_with_fixed_shapes_equals_normal_decoding_for_every_kind(name: str) -> None:
    agrees_with_growing_decode_and_with_one_pass(CASES[name])


@settings(max_examples=15)
@given(specs())
def test_decoding_with_fixed_shapes_equals_normal_decoding_for_any_spec(spec: ModelSpec) -> None:
    agrees_with_growing_decode_and_with_one_pass(spec)


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_decoding_with_fixed_shapes_equals_normal_decoding_for_120_specs(spec: ModelSpec) -> None:
    agrees_with_growing_decode_and_with_one_pass(spec)


class Recorder(TorchDispatchMode):
    """Records the operations and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
        self.ops.append((str(func), [x.shape for x in tensors]))
        return func(*args, **(kwargs or {}))


ASKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero")


@pytest.mark.parametrize("name", CASES)
def test_no_shape_depends_on_values_and_nothing_is_copied_to_the_host(name: str) -> None:
    model = built(CASES[name])
    step = TokenStep(model, model.new_cache(), ROWS)
    recorded, taken = [], set()
    for turn in range(8):
        step([turn % 5, -1 if turn % 3 else 2, 4])
        taken.add(str({**model.router_shares()}))
        with Recorder() as recorder:
            step._compute_all()
        recorded.append(recorder.ops)
    assert all(ops == recorded[0] for ops in recorded)
    assert not [op for op, _ in recorded[0] if op.startswith(ASKS)]
    assert len(taken) > 1 or not model.routers, "the router always said the same"


@pytest.mark.parametrize(
    ("name", "skips"),
    {
        "shared": True,
        "narrow, shared": True,
        "narrow": True,
        "last": False,
        "narrow, all": False,
        "loop in loop": False,
        "shared, all": False,
    }.items(),
)
def test_passes_that_no_row_takes_are_left_out(
    name: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pieces = built(CASES[name]), []
    model.dial(1.0 if model.routers else None)
    step = TokenStep(model, model.new_cache(), 2)
    compute = step._compute

    def noting(n: int, at: int | None) -> None:
        pieces.append((n, at))
        compute(n, at)

    monkeypatch.setattr(step, "_compute", noting)
    for tokens, at in (([1, 2], [0, 1]), ([-1, 2], [0, 1]), ([-1, -1], [])):
        pieces.clear()
        step(tokens)
        assert [at for _, at in pieces if at is not None] == (at if skips else [])
        assert set(model.router_shares().values()) <= {float(bool(at))}


def test_a_row_without_a_token_changes_no_entry_of_the_cache() -> None:
    model = built(CASES["narrow, shared"])
    cache = model.new_cache(6)
    step = TokenStep(model, cache, 2)
    for turn in range(6):
        step([turn, 2])
    before = [kept.read(kept.limit).clone() for kept in entries(cache)]
    step([-1, -1])
    for kept, data in zip(entries(cache), before, strict=True):
        torch.testing.assert_close(kept.read(kept.limit), data, rtol=0, atol=0)


def test_joined_products_are_equal_and_can_be_saved_and_moved(tmp_path: Path) -> None:
    model = built(shipped("itt"))
    plain = TokenStep(model, model.new_cache(), 1)([3]).clone()
    model._side_by_side()
    with Counter() as counter:
        torch.testing.assert_close(TokenStep(model, model.new_cache(), 1)([3]), plain)
    assert "Context.linears" in {caller for _, caller in counter.counts}
    save_checkpoint(tmp_path / "saved", model, tokenizer_from=None, provenance={})
    loaded = load_checkpoint(tmp_path / "saved").model
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), check_dtype=False)
    model.embedding.weight.data.zero_()
    model.float()
    assert TokenStep(model, model.new_cache(), 1)([3]).dtype == torch.float32


def entries(cache: Cache) -> list[Kept]:
    return [kept for _, memory in cache.memories for kept in memory.kept.values()]


ROUTER = "blocks.0.body.1.router.kind"


def launches(spec: ModelSpec) -> float:
    """The operations of a token that takes no routed pass; see `benchmarks.launches`."""
    model = archdsl.build(spec).eval()
    for name, quantiles in model.named_buffers():
        if name.endswith("quantiles_RQ"):
            quantiles.fill_(math.inf)
    model._side_by_side()
    step = TokenStep(model, model.new_cache(), 1)
    step([1])
    with Counter() as counter, torch.inference_mode():
        step([2])
    return total(counter.counts).launches


def test_a_layer_and_a_pass_that_no_row_takes_launch_few_operations() -> None:
    plain = archdsl.load("transformer")
    two, three = (launches(plain.resized(Sizes(32, 40, 64, 8, n))) for n in (2, 3))
    assert three - two <= 32  # of these 14 for the two norms, each of which is one on a GPU
    passes = [f"blocks.0.body.1.steps={n}" for n in (3, 4)]
    three, four = (launches(shipped("itt", f"{ROUTER}=threshold", one)) for one in passes)
    assert (four - three) / 2 <= 12  # of one pass of each of two loops


def test_a_compiled_step_compiles_before_the_first_token() -> None:
    torch._dynamo.reset()
    model, counter = built(shipped("itt", f"{ROUTER}=prefix")), CompileCounter()
    plain = TokenStep(model, model.new_cache(), ROWS)
    step = TokenStep(model, model.new_cache(), ROWS, compiled=True, backend=counter)
    compilations = counter.frame_count
    # a layer, a loop, either's first, and the routed passes of a loop
    assert 0 < compilations <= 4 + 3
    for turn in range(10):
        tokens = [turn % 5, -1 if turn % 3 else 2, 4]
        torch.testing.assert_close(step(tokens), plain(tokens), rtol=1e-11, atol=1e-11)
    assert counter.frame_count == compilations


def test_an_unsupported_model_or_cache_is_an_error_that_changes_nothing() -> None:
    model = built(shipped("itt"))
    cache, one = model.new_cache(4), 1
    step = TokenStep(model, cache, 2)
    for _ in range(3):
        step([one, -1])
    step([one, one])
    with pytest.raises(ContextFullError, match="room for 4 tokens of a row"):
        step([one, one])
    step([-1, one])  # this row has room left
    torch.testing.assert_close(cache.length, torch.tensor([4, 2]))
    model.dial(capacity=0.5)
    with pytest.raises(DialError, match="begin with a new one"):
        step([-1, one])
    model.dial()
    cache.reorder(torch.tensor([1]))
    with pytest.raises(ArchdslError, match="make another TokenStep"):
        step([-1, one])
    assert cache.length == 2
    again = TokenStep(model, cache, 1)
    assert again([one]).shape == (1, model.spec.vocab_size)
    torch.testing.assert_close(cache.length, torch.tensor([3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_equals_the_steps_without_a_graph(name: str) -> None:
    model = built(CASES[name]).cuda()
    tokens_BT = torch.randint(model.spec.vocab_size, (ROWS, 5), device="cuda")
    mask_BT = torch.rand(ROWS, 5, device="cuda") < 0.8
    caches = [model.new_cache() for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(tokens_BT, mask_BT, cache)
        step = TokenStep(model, caches[0], ROWS)
        assert step.graphs
        for turn in range(8):
            row = [turn % 5, -1 if turn % 3 else 2, 4]
            now_B1 = torch.tensor(row, device="cuda").unsqueeze(1)
            wanted_BV = model(now_B1.clamp(min=0), now_B1 >= 0, caches[1])[:, -1]
            steps_BT = model.trace.steps_BT
            real_B = now_B1[:, 0] >= 0
            found_BV = step(row)
            assert gap(found_BV[real_B], wanted_BV[real_B]).share < 1e-9
            torch.testing.assert_close(model.trace.steps_BT, steps_BT, rtol=0, atol=0)
