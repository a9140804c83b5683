"""What training on several devices needs: shards, whole units, and the bytes that are sent."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import archdsl
from archdsl.costs.devices import DevicesError, Traffic, Unit, Units, devices, traffic
from archdsl.costs.receipt import block_cost
from archdsl.lang.spec import ModelSpec
from archdsl.reports.training_memory import training_memory
from archdsl.reports.units import units
from tests.shipped import STRUCTURES
from tests.strategies import specs

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), max_size=4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_unit_is_as_large_as_its_layer_costs(name: str) -> None:
    spec = archdsl.load(name)
    found = units(spec)
    layers = [layer for block in spec.blocks for layer in block.unrolled()]
    closed = [4 * block_cost(layer, spec.dim, spec.context).params for layer in layers]
    assert [unit.whole for unit in found.layers] == closed
    assert found.root.whole == 4 * archdsl.cost(spec).params - sum(closed)


@given(SHAPES, st.integers(1, 12))
def test_shards_hold_all_rows_and_are_equally_large(shapes: list[tuple[int, ...]], n: int) -> None:
    unit = Unit(shapes)
    rows = [math.ceil(shape[0] / n) for shape in shapes]
    assert unit.shard(n) == 4 * sum(
        kept * math.prod(shape[1:]) for kept, shape in zip(rows, shapes, strict=True)
    )
    assert unit.whole <= n * unit.shard(n)
    assert unit.shard(1) == unit.whole


def test_a_model_of_two_layers_by_hand() -> None:
    """Rows of 5 and 3 numbers on 2 devices: shards of 3 rows of a layer's 5, of 2 of the root's 3.

    Both layers are gathered twice and the root once: each device sends its shard to the other.
    """
    model = Units([Unit([(5, 10)]), Unit([(5, 10)])], Unit([(3, 100)]))
    layer, root = 4 * 3 * 10, 4 * 2 * 100
    assert model.shard(2) == 2 * layer + root
    assert traffic(model, devices(2)) == Traffic(4 * layer + root, 2 * layer + root, 0)
    assert traffic(model, devices(2), passes=3).all_gather == 3 * (4 * layer + root)
    muon = traffic(model._replace(matrices=Unit([(5, 10)])), devices(2), muon=True)
    assert muon == Traffic(5 * layer + root, 2 * layer + root, 0)
    whole = 4 * (2 * 50 + 300)
    assert traffic(model, devices(4, "ddp")) == Traffic(0, 0, 2 * 3 * whole // 4)
    both = traffic(model, devices(4, "hsdp", 2))
    assert both == Traffic(4 * layer + root, 2 * layer + root, 2 * layer + root)


@given(specs())
def test_one_device_needs_what_the_receipt_says(spec: ModelSpec) -> None:
    assert training_memory(spec, devices=devices(1)) == training_memory(spec)
    assert training_memory(spec, devices=devices(8, "ddp")) == training_memory(spec)
    assert traffic(units(spec), devices(1)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["itt", "universal", "mor-lora-tiny"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_more_devices_need_less_memory_each(name: str, checkpointed: bool) -> None:
    spec = archdsl.load(name)
    counts = (1, 2, 4, 8, 16)
    needs = [training_memory(spec, devices=devices(n), checkpointed=checkpointed) for n in counts]
    peaks = [need.peak for need in needs]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    for n, need in zip(counts, needs, strict=True):
        assert needs[0].weights <= n * need.weights < 1.1 * needs[0].weights
        assert need.optimizer == 2 * need.weights


def test_parts_of_a_batch_add_up_whole_gradients() -> None:
    spec = archdsl.load("itt")
    need = training_memory(spec, 2, accumulate=2, devices=devices(8))
    assert need.gradients_at_peak > 4 * archdsl.cost(spec).params
    assert need.weights < archdsl.cost(spec).params


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, "fsdp"), "at least 1, got 0"),
        ((8, "fsdp", 4), "fsdp has no shard group"),
        ((8, "hsdp"), "hsdp needs the size of a shard group"),
        ((8, "hsdp", 3), "must divide the number of devices, 8; got 3"),
    ],
)
def test_devices_that_cannot_be_are_refused(given: tuple[object, ...], said: str) -> None:
    with pytest.raises(DevicesError, match=said):
        devices(*given)  # type: ignore[arg-type]
