"""The walk through a spec and its modules: the blocks of archdsl, and those of somebody else."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from archdsl.blocks.attention import AttentionSpec
from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.moe import Expert
from archdsl.checks.check import check
from archdsl.costs.activations import Footprint, Rows, in_a_row
from archdsl.costs.bill import Bill
from archdsl.costs.receipt import sequence_cost
from archdsl.lang import registry
from archdsl.lang.spec import Blocks, BlockSpec, ModelSpec
from archdsl.model.build import build, meta_model
from archdsl.model.executed_flops import executed
from archdsl.model.parts import running_loops, seed_names, walk
from archdsl.nn.block import Block, Context, Primitive, into_stream_
from archdsl.nn.loop import Loop, Router
from tests.strategies import specs

FFN: dict[str, Any] = {"kind": "feed_forward", "hidden": 24}
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": FFN}


class SplitSpec(BlockSpec):
    """The mean of what several blocks make of the same stream."""

    kind: Literal["split"] = "split"
    branches: Blocks

    def build(self, dim: int) -> Split:
        return Split([block.build(dim) for block in self.branches])

    def cost(self, bill: Bill) -> None:
        for i, block in enumerate(self.branches):
            block.cost(bill.part(f"branches.{i}"))

    def footprint(self, rows: Rows) -> Footprint:
        return in_a_row(rows.stream, [block.footprint(rows) for block in self.branches])


class Split(Block):
    writes_to_stream: ClassVar[bool] = False

    def __init__(self, branches: list[Block]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return torch.stack([block(x_BTD, ctx) for block in self.branches]).mean(0)


class MixerSpec(BlockSpec):
    """A token mixer that says nothing but what every block says."""

    kind: Literal["mixer"] = "mixer"

    def build(self, dim: int) -> Mixer:
        return Mixer(dim)

    def cost(self, bill: Bill) -> None:
        bill.matrices += bill.dim * bill.dim


class Filter(Primitive):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        nn.init.normal_(self.scale, generator=rng)


class Mixer(Block):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.filter = Filter(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        into_stream_(self.out.weight, self.out.in_features, rng, depth)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return self.out(self.filter.scale * x_BTD)


for kind in ("split", "mixer"):  # nobody else is to meet them
    registry._families["block"].pop(kind)


def model_spec(*blocks: Any, dim: int = 16) -> ModelSpec:
    fields = {"name": "walked", "vocab_size": 11, "context": 12, "dim": dim}
    return ModelSpec.model_validate(fields | {"blocks": list(blocks)})


def loop(capacity: float, **fields: Any) -> dict[str, Any]:
    router = {"kind": "prefix", "capacity": capacity}
    return {"kind": "loop", "steps": 3, "router": router, "body": FFN} | fields


def split(capacity: float) -> SplitSpec:
    branches = model_spec(LAYER, loop(capacity)).blocks
    return SplitSpec(branches=branches)


@settings(max_examples=40)
@given(specs())
def test_every_block_and_router_is_met_once_and_as_what_its_spec_says(spec: ModelSpec) -> None:
    model = meta_model(spec)
    met = [module for _, _, module in walk(spec, model) if isinstance(module, Block | Router)]
    modules = {module for module in model.modules() if isinstance(module, Block | Router)}
    modules = {module for module in modules if not isinstance(module, Expert)}  # parts of a Moe
    assert set(met) == modules
    assert len(met) == len(modules)
    for path, part, module in walk(spec, model):
        found: Any = spec
        for key in path:
            found = found[key] if isinstance(key, int) else getattr(found, key)
        assert found is part
        assert isinstance(module, Block) == isinstance(part, BlockSpec)


@settings(max_examples=40)
@given(specs())
def test_with_copies_written_out_every_path_is_built_once_but_for_own_steps(
    spec: ModelSpec,
) -> None:
    model = meta_model(spec)
    written = spec.with_copies()
    assert sequence_cost(written) == sequence_cost(spec)
    loops = [module for module in model.modules() if isinstance(module, Loop)]
    if all(len(one.bodies) == 1 for one in loops):
        paths = [path for path, _, _ in walk(written, model)]
        assert len(set(paths)) == len(paths)


def test_the_copies_of_a_stack_are_measured_apart() -> None:
    stack = {"kind": "stack", "repeat": 2, "body": [loop(0.5, steps=2)]}
    model = build(model_spec(stack))
    model.trace.counts = {"blocks.0.blocks.0.0": (1, 4), "blocks.0.blocks.1.0": (3, 4)}
    first, second = model_spec(loop(0.25, steps=2), loop(0.75, steps=2)).blocks
    apart = model.spec.model_copy(update={"blocks": (first, second)})
    assert sequence_cost(executed(model)).flops == sequence_cost(apart).flops


def test_bodies_of_passes_that_were_dialled_away_do_not_count() -> None:
    inner = loop(0.5, steps=2)
    outer = {"kind": "loop", "steps": 3, "parameters": "per_step", "body": inner}
    model = build(model_spec(outer))
    names = [one.label for one in running_loops(model)]
    assert names == ["blocks.0", *(f"blocks.0.bodies.{i}" for i in range(3))]
    model.loops[0].dial(steps=1)
    assert [one.label for one in running_loops(model)] == names[:2]
    model.trace.counts = {"blocks.0.bodies.0.0": (1, 4), "blocks.0.bodies.1.0": (4, 4)}
    once = sequence_cost(model_spec(loop(0.25, steps=2))).flops
    assert sequence_cost(executed(model)).flops == once


def test_a_foreign_block_with_a_list_of_blocks_costs_what_it_executed() -> None:
    model = build(model_spec(LAYER, split(0.9))).eval()
    with torch.no_grad():
        model(torch.arange(12).unsqueeze(0) % 11)
    assert model.router_shares().keys() == {"blocks.1.branches.1.0", "blocks.1.branches.1.1"}
    model.trace.counts = dict.fromkeys(model.router_counts(), (1, 4))
    nominal, few = (model_spec(LAYER, split(share)) for share in (0.9, 0.25))
    assert sequence_cost(executed(model)).flops == sequence_cost(few).flops
    assert sequence_cost(few).flops < sequence_cost(nominal).flops


def test_a_foreign_block_with_a_list_of_blocks_is_checked_place_by_place() -> None:
    report = check(model_spec(split(0.5)), seeds=1)
    assert report.passed
    assert [row.place for row in report.rows if row.place.startswith("blocks")] == [
        "blocks.0",
        "blocks.0.branches.0",
        "blocks.0.branches.0.attention",
        "blocks.0.branches.0.ffn",
        "blocks.0.branches.1",
        "blocks.0.branches.1.body",
    ]


def test_a_block_that_hides_what_it_built_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_spec(split(0.5)))
    monkeypatch.setattr(Split, "built_as", lambda block, field: [])
    with pytest.raises(TypeError, match=r"Split.built_as\('branches'\) must return .* got 0"):
        executed(model)


def test_initial_values_do_not_depend_on_the_names_of_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = model_spec(LAYER, loop(0.5, encoding="scale"))
    before = build(spec, seed=5).state_dict()
    renamed = type("Focus", (Attention,), {})
    monkeypatch.setattr("archdsl.blocks.modules.attention.Attention", renamed)
    after = build(spec, seed=5).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_initial_values_are_drawn_by_kind() -> None:
    model = build(model_spec(LAYER, MixerSpec(), loop(0.5)))
    assert [name for name, _ in seed_names(model)] == [
        *("LanguageModel", "Layer", "Attention", "FeedForward"),
        *("Mixer", "Mixer.filter"),
        *("Loop", "FeedForward", "Prefix", "Loop.encoding"),
    ]


def test_a_foreign_mixer_starts_as_small_as_attention_in_its_place() -> None:
    attention = AttentionSpec(head_size=32)
    for mixer, name in ((MixerSpec(), "attention.out"), (attention, "attention.o")):
        layers = [LayerSpec(attention=mixer) for _ in range(3)]
        for layer in build(model_spec(*layers, dim=256)).blocks:
            std = layer.get_parameter(f"{name}.weight").std().item()
            assert std == pytest.approx((2 * 3 * 256) ** -0.5, rel=0.05)
