"""Language models: definition, initial values, tied embeddings, limits and memory."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

import archdsl
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.build import TooLargeError, meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from archdsl.nn.cache import ContextFullError
from tests import naive
from tests.shipped import STRUCTURES
from tests.strategies import specs

LAYER = {"kind": "layer", "attention": {"head_size": 4}, "ffn": {"hidden": 20}}
LOOP = {
    "kind": "loop",
    "steps": 3,
    "router": {"kind": "prefix", "capacity": [0.6, 0.3]},
    "residual": "thinking",
    "encoding": "scale",
    "body": LAYER,
}
TOKENS = torch.randint(11, (2, 10), generator=torch.Generator().manual_seed(0))


def spec(*blocks: dict[str, Any], **fields: Any) -> ModelSpec:
    sizes = {"name": "test", "vocab_size": 11, "context": 10, "dim": 12}
    return ModelSpec.model_validate(sizes | {"blocks": list(blocks)} | fields)


@settings(max_examples=10)
@given(specs())
def test_any_model_equals_its_definition(random: ModelSpec) -> None:
    is_its_definition(random)


@pytest.mark.slow
@settings(max_examples=30)
@given(specs())
def test_30_models_equal_their_definition(random: ModelSpec) -> None:
    is_its_definition(random)


def is_its_definition(random: ModelSpec) -> None:
    model = archdsl.build(random).eval()
    naive.randomise(model)
    tokens_BT = torch.arange(2 * random.context).view(2, -1) % random.vocab_size
    # a feed-forward without a norm squares its size in each pass of a loop; above 1e102 the cube of
    # 1 / size underflows in the backward pass of torch's RMSNorm
    assume(bool(model.hidden(model.embedding(tokens_BT)).abs().max() < 1e90))
    weights = list(model.parameters())  # whose gradients are large where nothing is normed
    naive.agree(model(tokens_BT), naive.model(model, tokens_BT), weights, tolerance=1e-6)


def test_a_plain_model_is_llama() -> None:
    """Touvron et al. 2302.13971, written again without archdsl."""
    model = archdsl.build(archdsl.load("transformer", overrides=SMALL))
    torch.testing.assert_close(model(TOKENS), llama(dict(model.named_parameters()), TOKENS))
    assert sum(p.numel() for p in model.parameters()) == 2 * 11 * 64 + 64 + 8 * (
        4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    )


SMALL = ["vocab_size=11", "dim=64", "blocks.0.body.0.ffn.hidden=96"]
SMALL += ["blocks.0.body.0.attention.head_size=16"]


def llama(weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 4, 16).transpose(1, 2)

    T = tokens_BT.size(1)
    angles = torch.outer(torch.arange(T), 10_000 ** -(torch.arange(0, 16, 2) / 16))
    turn = torch.polar(torch.ones(T, 8), angles)

    def rotate(x: Tensor) -> Tensor:  # pairs of halves as complex numbers
        turned = torch.complex(x[..., :8], x[..., 8:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = weights["embedding.weight"][tokens_BT]
    for i in range(8):
        w = {k.split(f"blocks.0.blocks.{i}.")[-1]: v for k, v in weights.items() if f"s.{i}." in k}
        h = rms(x, w["attention_norm.weight"])
        q, k, v = (split(h @ w[f"attention.{n}.weight"].T) for n in "qkv")
        scores = rotate(q) @ rotate(k).transpose(2, 3) / 4
        scores = scores + torch.full((T, T), -math.inf).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w["attention.o.weight"].T
        h = rms(x, w["ffn_norm.weight"])
        gate = nn.functional.silu(h @ w["ffn.gate.weight"].T)
        x = x + (gate * (h @ w["ffn.up.weight"].T)) @ w["ffn.down.weight"].T
    return rms(x, weights["norm.weight"]) @ weights["head.weight"].T


def test_equal_parts_of_different_models_have_equal_initial_values() -> None:
    plain = archdsl.build(spec(LAYER, LAYER, LAYER), seed=3)
    loop = archdsl.build(spec(LAYER, LOOP, LAYER), seed=3)
    shared = {
        name.replace("blocks.1.bodies.0.", "blocks.1."): weight
        for name, weight in loop.named_parameters()
    }
    own = {name for name in shared if "router" in name or "encoding" in name}
    assert len(own) == 2
    assert set(shared) - own == {name for name, _ in plain.named_parameters()}
    for name, weight in plain.named_parameters():
        assert weight.equal(shared[name]), name


def test_initial_matrices_have_the_scale_of_their_input_width() -> None:
    model = archdsl.build(spec(LAYER, LAYER, vocab_size=500, dim=400), seed=1)
    layer = model.blocks[1]
    want = {"attention.q": 400, "attention.k": 400, "ffn.up": 400, "ffn.gate": 400}
    into_stream = {"attention.o": 4 * 400, "ffn.down": 4 * 20}  # twice for each of two layers
    for name, fan_in in (want | into_stream).items():
        std = layer.get_submodule(name).get_parameter("weight").std().item()
        assert std == pytest.approx(fan_in**-0.5, rel=0.05), name
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    first, second = (model.get_parameter(f"blocks.{i}.attention.q.weight") for i in (0, 1))
    assert not first.equal(second)


@pytest.mark.parametrize("block", [LAYER, LOOP], ids=["layer", "loop"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_initial_loss_is_near_that_of_a_uniform_guess(
    block: dict[str, Any], tied: bool
) -> None:
    sizes = {"vocab_size": 500, "dim": 120, "tie_embeddings": tied, "context": 64}
    model = archdsl.build(spec(*[block] * 4, **sizes))
    tokens_BT = torch.randint(500, (4, 65))
    logits = model(tokens_BT[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert loss.item() < math.log(500) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tied_embeddings_stay_tied(dtype: torch.dtype) -> None:
    tied = spec(LAYER, tie_embeddings=True)
    model = archdsl.build(tied, dtype=dtype)
    assert model.head.weight is model.embedding.weight
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert sum(p.numel() for p in model.parameters()) == archdsl.cost(tied).params
    assert model.double().head.weight is model.embedding.weight
    model(TOKENS).sum().backward()
    assert model.embedding.weight.grad is not None


def test_more_tokens_than_the_context_are_refused() -> None:
    model = archdsl.build(spec(LAYER))
    assert model(TOKENS).shape == (2, 10, 11)
    with pytest.raises(ContextFullError, match="11 tokens exceed the context of 10"):
        model(torch.zeros(1, 11, dtype=torch.long))


def test_the_stream_after_each_layer_of_a_stack_is_returned() -> None:
    inner = {"kind": "stack", "repeat": 2, "body": [LAYER]}
    model = archdsl.build(spec(LAYER, {"kind": "stack", "body": [inner, LOOP]}))
    x = model.embedding(TOKENS)
    each: list[Tensor] = []
    last = model.hidden(x, each=each)
    assert [type(layer).__name__ for layer in model.layers] == [
        "Layer",
        "Layer",
        "Layer",
        "BodyLoop",
    ]
    assert torch.equal(each[0], model.blocks[0](x, Context()))
    assert len(each) == 4
    assert torch.equal(each[-1], last)


@pytest.mark.parametrize("kv", ["own", "shared", "last"])
@pytest.mark.parametrize("router", ["prefix", "threshold", "predictor"])
def test_activation_checkpointing_changes_only_the_memory(kv: str, router: str) -> None:
    kind = {"kind": router, "capacity": [0.6, 0.3]}
    model = archdsl.build(spec(LAYER, LOOP | {"kv": kv, "router": kind}))
    naive.randomise(model)
    model(TOKENS)
    model.commit()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept: list[int] = []
    grads = []
    for model.checkpoint_activations in (False, True):
        kept.append(0)

        def keep(saved: Tensor) -> Tensor:
            kept[-1] += saved.numel()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = model(TOKENS).square().sum() + sum(model.trace.losses.values())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        model.load_state_dict(before, strict=False)
        assert model.router_shares().keys() == {"blocks.1.0", "blocks.1.1"}
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


def test_a_model_reports_the_share_of_tokens_that_each_step_selected() -> None:
    model = archdsl.build(spec(LAYER, LOOP | {"router": {"kind": "top_k", "capacity": [0.6, 0.3]}}))
    assert model.router_shares() == {}
    model(TOKENS)
    shares = {name: round(share, 6) for name, share in model.router_shares().items()}
    assert shares == {"blocks.1.0": 0.6, "blocks.1.1": 0.3}


@pytest.mark.parametrize("dim", [12, 64])
def test_equal_tokens_have_equal_scores_for_every_length(dim: int) -> None:
    """Without attention before it, a router gives equal tokens equal scores up to rounding."""
    loop = {"kind": "loop", "steps": 2, "router": "prefix", "body": {"kind": "feed_forward"}}
    for context in (8, 13, 16, 29):
        model = archdsl.build(spec(loop, dim=dim, context=context, vocab_size=2))
        naive.randomise(model, std=0.3)
        tokens_BT = torch.randint(2, (3, context), generator=torch.Generator().manual_seed(3))
        whole = model(tokens_BT)
        for length in range(1, context):
            torch.testing.assert_close(whole[:, :length], model(tokens_BT[:, :length]))


def test_random_routers_of_one_model_select_different_tokens() -> None:
    loop = LOOP | {"router": "random", "steps": 2}
    model = archdsl.build(spec(loop, {"kind": "stack", "repeat": 2, "body": [loop]}))
    salts = [module.salt for module in model.modules() if hasattr(module, "salt")]
    assert salts == [0, 1, 2]


def test_causal_routing_is_reset_after_an_error() -> None:
    model = archdsl.build(spec(LOOP | {"router": {"kind": "top_k"}}))
    assert model.leaks
    with contextlib.suppress(KeyError), model.causal_routing():
        assert not model.leaks
        raise KeyError
    assert model.leaks


def test_models_that_do_not_fit_in_memory_are_refused_before_they_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    huge = spec(*[LAYER] * 4, dim=65_536, vocab_size=2**22)
    monkeypatch.setattr("archdsl.model.build.LanguageModel", never)
    with pytest.raises(TooLargeError, match=r"weights need [\d,.]+ GiB and this machine has"):
        archdsl.build(huge)


def never(_: ModelSpec) -> LanguageModel:
    raise AssertionError("built")


def test_the_meta_model_has_no_data() -> None:
    model = meta_model(archdsl.load("itt-466m"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == archdsl.cost(model.spec).params


@settings(max_examples=15)
@given(specs())
def test_under_autocast_the_stream_of_any_model_is_as_wide_as_products(random: ModelSpec) -> None:
    model = archdsl.build(random).train()
    tokens_BT = torch.arange(2 * random.context).view(2, -1) % random.vocab_size
    each: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(model.embedding(tokens_BT), each=each)
        loss = model.loss(tokens_BT, tokens_BT)
    torch.stack([loss, *model.trace.losses.values()]).sum().backward()
    assert {x_BTD.dtype for x_BTD in each} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_loss_under_autocast_is_near_the_exact_one(name: str) -> None:
    sizes = Sizes(dim=32, context=48, vocab_size=101, head_size=16, repeat=1)
    model = archdsl.build(archdsl.load(name).resized(sizes)).eval()
    tokens_BT = torch.randint(101, (2, 48))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model.loss(tokens_BT, tokens_BT)
        half_BTV = model(tokens_BT)
    with torch.no_grad():
        exact = model.loss(tokens_BT, tokens_BT)
    assert float(half) == pytest.approx(float(exact), rel=5e-3)
    assert half_BTV.dtype == torch.bfloat16
