"""Retrofit: the same logits with thinking steps in place, or a refusal that says why."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archdsl.blocks.feed_forward import FeedForwardSpec
from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.feed_forward import FeedForward
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.blocks.stack import StackSpec
from archdsl.costs.receipt import cost
from archdsl.errors import SpecError
from archdsl.interop.overlay import Overlay, Recurrence, parse_overlay
from archdsl.interop.retrofit import RetrofitError, compact, retrofit
from archdsl.lang.load import load
from archdsl.lang.registry import families
from archdsl.lang.source import from_value, parse, read, shipped_specs
from archdsl.lang.spec import BlockSpec, ModelSpec, parse_spec
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint
from archdsl.model.language_model import LanguageModel

TOKENS = torch.arange(24).reshape(2, 12) % 11
LAYER = {"kind": "layer", "attention": {"head_size": 4}, "ffn": {"hidden": 12}}
WIDER = LAYER | {"ffn": {"hidden": 20}}
LOOP = {"steps": 3, "residual": "thinking", "encoding": {"kind": "scale", "init": 0}}


def model_spec(blocks: list[dict[str, Any]], **changes: Any) -> ModelSpec:
    sizes = {"name": "base", "vocab_size": 11, "context": 12, "dim": 8}
    return parse_spec(from_value(sizes | {"blocks": blocks} | changes, "base.yaml"))


# unrolled: 0 layer, 1 wider, 2 layer, 3 wider, 4 layer, 5 loop, 6 layer
NESTED = model_spec(
    [
        {"kind": "stack", "repeat": 2, "body": [LAYER, {"kind": "stack", "body": [WIDER]}]},
        LAYER,
        {"kind": "loop", "steps": 2, "body": LAYER},
        LAYER,
    ]
)


def checkpoint(spec: ModelSpec = NESTED) -> Checkpoint:
    return Checkpoint(Path("base"), build(spec), {"spec": spec.fingerprint()})


def overlay(layers: Any, **loop: Any) -> Overlay:
    value = {"name": "itt", "layers": layers, "loop": LOOP | loop}
    found = parse_overlay(from_value(value, "overlay.yaml"))
    assert isinstance(found, Overlay)
    return found


def recurrence(prelude: int, core: int, coda: int, **loop: Any) -> Recurrence:
    value = {"name": "core", "prelude": prelude, "core": core, "coda": coda, "loop": loop}
    found = parse_overlay(from_value(value, "overlay.yaml"))
    assert isinstance(found, Recurrence)
    return found


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def digest(tensor: Tensor) -> str:
    return sha256(tensor.detach().numpy().tobytes()).hexdigest()


def routers() -> st.SearchStrategy[Any]:
    return st.none() | st.fixed_dictionaries(
        {"kind": st.sampled_from(sorted(families()["router"].keys() - {"all"}))},
        optional={"capacity": st.sampled_from([0.3, 0.7]), "nested": st.booleans()},
    )


LOOPS = st.fixed_dictionaries(
    {"steps": st.integers(2, 4)},
    optional={
        "full_steps": st.integers(1, 3),
        "router": routers(),
        "residual": st.sampled_from(
            ["thinking", "delta", "gated", {"kind": "thinking", "unselected": "literal"}]
        ),
        "injection": st.sampled_from([None, "add", "linear", "diagonal"]),
        "parameters": st.sampled_from(["shared", "per_step", {"lora": {"rank": 2}}]),
    },
)
CHOICES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), min_size=1, max_size=6, unique=True)


@settings(max_examples=25)
@given(CHOICES, LOOPS, st.booleans())
def test_the_logits_are_the_same_bits_whatever_is_grafted_and_where(
    layers: list[int], loop: dict[str, Any], tied: bool
) -> None:
    base = checkpoint(NESTED.model_copy(update={"tie_embeddings": tied}))
    grown = retrofit(base, overlay(layers, **loop))
    assert grown.difference == 0
    assert torch.equal(grown.model.eval()(TOKENS), base.model.eval()(TOKENS))

    # what was there is there, once, and `new` is the rest
    kept = [digest(w) for name, w in weights(grown.model).items() if name not in grown.new]
    assert sorted(kept) == sorted(digest(w) for w in weights(base.model).values())
    count = sum(weights(grown.model)[name].numel() for name in grown.new)
    assert count == cost(grown.model.spec).params - cost(base.spec).params


@pytest.mark.parametrize("kv", ["own", "shared", "last"])
def test_the_steps_are_there_once_phi_is(kv: str) -> None:
    base = checkpoint()
    grown = retrofit(base, overlay([2], router={"kind": "prefix", "capacity": 0.7}, kv=kv)).model
    [phi_SD] = [w for name, w in weights(grown).items() if name.endswith("phi_SD")]
    assert grown.spec.name == "base-itt"
    with torch.no_grad():
        phi_SD[1] = 0.1
        assert not torch.allclose(grown(TOKENS), base.model(TOKENS), rtol=1e-3)


def test_passes_with_weights_of_their_own_start_as_copies_of_the_layer() -> None:
    grown = retrofit(checkpoint(), overlay([1], parameters="per_step"))
    [loop] = [m for m in grown.model.modules() if isinstance(m, BodyLoop) and len(m.bodies) > 1]
    first, *others = [list(body.parameters()) for body in loop.bodies]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert any("bodies.2" in name for name in grown.new)
    assert not any("bodies.0" in name for name in grown.new)


def test_the_seed_decides_about_the_routers_alone() -> None:
    def grown(seed: int) -> dict[str, Tensor]:
        router = {"kind": "prefix", "capacity": 0.5}
        return weights(retrofit(checkpoint(), overlay([0], router=router), seed=seed).model)

    one, other = grown(1), grown(2)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert len(differing) == 1
    assert "router" in differing[0]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ({"every": 2, "first": 1}, (1, 3, 5)),
        ({"every": 3}, (0, 3)),
        ([4, 0, 4], (0, 4)),
    ],
)
def test_layers_are_counted_from_zero_through_the_stacks(
    layers: Any, chosen: tuple[int, ...]
) -> None:
    spec = model_spec([{"kind": "stack", "repeat": 3, "body": [LAYER, WIDER]}])
    grown = retrofit(checkpoint(spec), overlay(layers))
    unrolled = [leaf for block in grown.model.spec.blocks for leaf in block.unrolled()]
    assert grown.layers == chosen
    assert tuple(i for i, block in enumerate(unrolled) if isinstance(block, LoopSpec)) == chosen


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([2, 7], r"itt: layers of base: there is no 7; they are 0 to 6"),
        ({"every": 2, "first": 7}, r"there is none that far; they are 0 to 6"),
        ([4, 5], r"layers of base: 5 loop already; choose others"),
    ],
)
def test_layers_that_cannot_think_are_named(layers: Any, complaint: str) -> None:
    with pytest.raises(RetrofitError, match=complaint):
        retrofit(checkpoint(), overlay(layers))


# What would change the logits


@pytest.mark.parametrize(
    ("loop", "complaint"),
    [
        ({"steps": 1}, "loop.steps: must be at least 2: one pass adds nothing; got 1"),
        ({"start": "noise", "injection": "add"}, "loop.start: must be left out: .*; got noise"),
        ({"norm": "rms"}, "loop.norm: must be left out: .*; got rms"),
        ({"full_steps": 0}, "loop.full_steps: must be at least 1: the first pass is the layer"),
        (
            {"residual": "overwrite"},
            "loop.residual: must be thinking, delta or gated, .*got overwrite",
        ),
        ({"encoding": None}, "loop.encoding: must be {kind: scale, init: 0}: .*got none"),
        ({"encoding": "add"}, "loop.encoding: must be {kind: scale, init: 0}: .*got add"),
        ({"encoding": {"kind": "scale"}}, "loop.encoding.init: must be 0: .*got the default"),
        ({"encoding": {"kind": "scale", "init": 0.1}}, "loop.encoding.init: .*got 0.1"),
        ({"encoding": {"kind": "scale", "init": 0, "first": 2}}, "encoding.first: .*1.*got 2"),
        ({"body": LAYER}, "loop.body: must be left out: layers of the model become it"),
        (
            {"router": {"kind": "prefix", "capacity": [0.5, 0.5, 0.5]}, "steps": 5},
            "loop.router.capacity: needs one value, or one for each of the 4 passes",
        ),
    ],
)
def test_an_overlay_that_is_no_identity_is_refused_by_the_field(
    loop: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SpecError, match=f"^overlay.yaml: .*{complaint}"):
        overlay([0], **loop)


@pytest.mark.parametrize("phi", [{"first": 1.001, "init": 0.0}, {"init": 0.001}])
def test_what_the_rule_overlooks_is_measured(phi: dict[str, float]) -> None:
    loop = LOOP | {"encoding": {"kind": "scale"} | phi}
    unruled = Overlay.model_validate({"name": "itt", "layers": [0], "loop": loop})
    with pytest.raises(RetrofitError, match=r"logits of base would change by \d.*e-0\d of the"):
        retrofit(checkpoint(), unruled)


def test_every_mistake_is_named_with_its_place() -> None:
    text = "name: a b\nlayers: [1, -2, x]\nloop:\n  step: 3\n  residual: thinkin\n  encoding: {}\n"
    with pytest.raises(SpecError) as found:
        parse_overlay(parse(text, "bad.yaml"))
    places = [str(problem).split(": ")[:2] for problem in found.value.problems]
    assert places == [
        ["bad.yaml:1:7", "name"],
        ["bad.yaml:2:13", "layers.1"],
        ["bad.yaml:2:17", "layers.2"],
        ["bad.yaml:4:9", "loop.step"],
        ["bad.yaml:5:13", "loop.residual.kind"],
        ["bad.yaml:6:13", "loop.encoding"],
    ]
    assert "(did you mean 'steps'?)" in str(found.value)
    for text, complaint in {
        "- 1": "bad.yaml:1:1: an overlay is a mapping of name, layers and loop, or of name",
        "name: x\nlayers: {evry: 2}\nloop: {}": "bad.yaml:2:16: layers.evry: unknown key (did you",
        "name: x\nlayers: []\nloop: {}": "bad.yaml:2:9: layers: needs at least 1 entries",
        "name: x\nlayers: [0]\nlop: {}": "bad.yaml:3:6: lop: unknown key (did you mean 'loop'?)",
    }.items():
        with pytest.raises(SpecError) as found:
            parse_overlay(parse(text, "bad.yaml"))
        assert complaint in str(found.value)


def test_the_shipped_overlay_is_an_overlay_and_no_spec() -> None:
    shipped = parse_overlay(read("itt-overlay"))
    assert parse_overlay(from_value(shipped.to_tree(), "again")) == shipped
    plain = model_spec([{"kind": "stack", "repeat": 4, "body": [LAYER]}])
    assert retrofit(checkpoint(plain), shipped).layers == (1, 3)
    assert "itt-overlay" not in shipped_specs()
    with pytest.raises(SpecError, match=r"archdsl retrofit CHECKPOINT itt-overlay --out FOLDER"):
        load("itt-overlay")


# A prelude, a core that loops, and a coda

UNLIKE = [LAYER | {"ffn": {"hidden": 4 * n}} for n in (1, 2, 2, 3, 3, 4)]


@pytest.mark.parametrize("parameters", ["shared", "per_step"])
def test_one_pass_from_zeros_over_all_other_layers_is_the_model_that_was(parameters: str) -> None:
    base = checkpoint(model_spec(UNLIKE, tie_embeddings=True))
    loop = {"steps": 1, "injection": "linear", "start": "zeros", "parameters": parameters}
    grown = retrofit(base, recurrence(2, 3, 1, **loop))
    assert grown.difference == 0
    assert (grown.layers, grown.removed) == ((2, 3, 4), ())
    assert grown.new == ("blocks.2.inject.weight",)


def test_a_core_has_the_weights_of_the_layers_before_the_coda() -> None:
    base = checkpoint(model_spec(UNLIKE))
    loop = {"steps": 2, "injection": "add", "start": "noise", "parameters": "per_step"}
    grown = retrofit(base, recurrence(1, 2, 1, **loop))
    assert (grown.layers, grown.removed) == ((3, 4), (1, 2))
    assert grown.provenance["retrofit"]["removed"] == [1, 2]
    assert grown.difference > 0.01
    ffns = [part for part in grown.model.modules() if isinstance(part, FeedForward)]
    assert [ffn.up.out_features for ffn in ffns] == [4, 12, 12, 12, 12, 16]
    core = [weight for layer in base.model.layers[3:5] for weight in layer.parameters()]
    for body in grown.model.loops[0].bodies:
        assert all(torch.equal(a, b) for a, b in zip(core, body.parameters(), strict=True))
    assert all("bodies.1" in name for name in grown.new)


def test_a_recurrence_that_cannot_be_is_refused() -> None:
    for sizes in ((3, 3, 1), (0, 7, 0)):
        with pytest.raises(
            RetrofitError, match="core: layers of base: prelude, core and coda take 7"
        ):
            retrofit(checkpoint(model_spec(UNLIKE)), recurrence(*sizes, steps=2))
    with pytest.raises(SpecError, match=r"loop.steps: must be at least 2: .*; got 1"):
        recurrence(1, 1, 1, steps=1)
    with pytest.raises(SpecError, match=r"loop.start: noise needs an injection"):
        recurrence(1, 1, 1, start="noise")
    with pytest.raises(SpecError, match=r"overlay.yaml: coda: "):
        parse_overlay(
            from_value({"name": "x", "prelude": 1, "core": 1, "loop": {}}, "overlay.yaml")
        )


def test_the_shipped_recurrence_is_the_law_of_the_new_model_too() -> None:
    shipped = parse_overlay(read("retrofit-recurrence-overlay"))
    assert parse_overlay(from_value(shipped.to_tree(), "again")) == shipped
    plain = model_spec([{"kind": "stack", "repeat": 9, "body": [LAYER]}])
    grown = retrofit(checkpoint(plain), shipped)
    assert (grown.layers, grown.removed) == ((3, 4, 5, 6), (2,))
    assert grown.model.spec.training is not None
    assert parse_spec(parse(grown.model.spec.to_yaml())) == grown.model.spec


# Writing repetitions as stacks

BLOCKS = st.lists(st.sampled_from([LayerSpec(), LayerSpec(norm="layer")]), min_size=1, max_size=40)


@given(BLOCKS)
def test_compact_blocks_are_the_same_blocks(blocks: list[LayerSpec]) -> None:
    stacked = compact(blocks)
    assert [leaf for block in stacked for leaf in block.unrolled()] == blocks
    assert len(stacked) <= len(blocks)


def test_a_repetition_becomes_one_stack() -> None:
    one: BlockSpec = LayerSpec()
    other: BlockSpec = LayerSpec(norm="layer")
    assert compact([one] * 30) == (StackSpec(repeat=30, body=(one,)),)
    assert compact([one, other] * 15) == (StackSpec(repeat=15, body=(one, other)),)
    assert compact([one, one, one, other]) == (StackSpec(repeat=3, body=(one,)), other)
    unlike = tuple(LayerSpec(ffn=FeedForwardSpec(hidden=n)) for n in range(1, 7))
    assert compact([one, one, *unlike]) == (StackSpec(repeat=2, body=(one,)), *unlike)
