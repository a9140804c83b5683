"""What a routed step launches and moves on a GPU, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import archdsl
from archdsl.lang.spec import Sizes
from archdsl.model.cuda_graph_step import TokenStep
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block
from benchmarks.inductor import KernelCount, as_on_a_gpu
from benchmarks.launches import (
    GPU,
    META,
    Counter,
    OnGpu,
    autocast,
    of_step,
    selected_as_counted,
    total,
)
from tests.shipped import STRUCTURES
from tests.test_benchmarks import by_hand

SIZES = {"batch": 8, "tokens": 1024, "dim": 1024, "head": 64, "hidden": 2560}
MB = 2**20

# a routed step at .5 over a full pass of its loop: launches and bytes, no higher than they were;
# the goals are 1.5 and .6
LIMITS = {
    "own": {
        "top_k": (1.37, 0.63),
        "threshold": (1.5, 0.63),
        "predictor": (1.73, 0.64),
        "prefix": (1.54, 0.64),
        "random": (1.58, 0.61),
    },
    "shared": {"top_k": (1.57, 0.67), "prefix": (1.79, 0.68)},
}


@pytest.mark.parametrize("kv", LIMITS)
def test_a_routed_step_launches_and_moves_no_more_than_before(kv: str) -> None:
    full = total(of_step(SIZES, kv, None))
    for router, (launches, bytes) in LIMITS[kv].items():
        step = total(of_step(SIZES, kv, router))
        assert step.launches / full.launches <= launches, router
        assert step.bytes / full.bytes <= bytes, router


def test_launches_bytes_and_flops_are_those_of_a_gpu_under_autocast() -> None:
    x = torch.empty(512, 1024, device=META, requires_grad=True)  # 2 MB
    linear = nn.Linear(1024, 1024, bias=False, device=META)  # 4 MB
    counter = Counter()
    with autocast(), counter, OnGpu(counter):
        assert x.device == GPU
        linear(linear(x).view(512, 1024).t().t())
        F.rms_norm(x, (1024,), torch.ones(1024, device="cuda"))
    found = {name: one for (name, _), one in counter.counts.items()}
    assert set(found) == {"_to_copy", "mm", "rms_norm", "ones"}
    assert found["_to_copy"].launches == 2  # the tokens and, once, the weight
    assert found["_to_copy"].bytes == 3 * MB + 6 * MB
    assert found["mm"].launches == 2
    assert found["mm"].bytes == 2 * (1 + 2 + 1) * MB
    assert found["mm"].flops == 2 * 2 * 512 * 1024**2
    assert found["mm"].floor == pytest.approx(2 * max(4 * MB / 3e12, 2 * 512 * 1024**2 / 780e12))
    assert found["rms_norm"].launches == 1
    assert 4 * MB < found["rms_norm"].bytes < 4.01 * MB


def test_reading_or_writing_some_rows_does_not_count_the_others() -> None:
    x, rows = torch.empty(1024, 1024, device=META), torch.empty(8, dtype=torch.long, device=META)
    counter = Counter()
    with counter, OnGpu(counter):
        taken = x.index_select(0, rows)
        x.index_put_((rows,), taken)
    row = 8 * 1024 * 4
    assert {name: one.bytes for (name, _), one in counter.counts.items()} == {
        "index_select": 2 * row + 64,
        "index_put_": 2 * row + 64,
    }


@pytest.mark.parametrize("name", STRUCTURES)
def test_under_autocast_on_a_gpu_every_block_hands_on_bfloat16(name: str) -> None:
    spec = archdsl.load(name).resized(Sizes(64, 64, 257, 32, 1))
    with META:
        model = LanguageModel(spec).train()
    found = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda *given: found.append(given[-1].dtype))
    x_BTD = torch.empty(2, 64, 64, device=META, requires_grad=True)
    counter = Counter()
    with selected_as_counted(counter), autocast(), OnGpu(counter):
        assert model.hidden(x_BTD).dtype == torch.bfloat16
    assert set(found) == {torch.bfloat16}


@by_hand
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler may warn
def test_kernels_that_inductor_would_make_are_counted_forward_and_backward() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(self.linear(x)) * 2

    module, x, count = Fused(), torch.randn(4, 8, requires_grad=True), KernelCount()
    wanted = module(x)
    module.compile(fullgraph=True, dynamic=False, backend=count)
    found = module(x)
    torch.testing.assert_close(found, wanted)
    assert (count.fused, count.library) == (1, 1)
    found.sum().backward()
    assert (count.fused, count.library) == (2, 3)  # and the gradients of both factors


@by_hand
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", STRUCTURES)
def test_triton_compiles_every_kernel_of_training_and_decoding_for_a_gpu(name: str) -> None:
    """By hand: pip install triton, and a quarter of an hour."""
    pytest.importorskip("triton")
    spec = archdsl.load(name).resized(Sizes(64, 64, 257, 32, 1))
    training, decoding = KernelCount(triton=True), KernelCount(triton=True)
    model = archdsl.build(spec)
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=training)
    x_BTD = torch.randn(2, 64, 64, requires_grad=True)
    with as_on_a_gpu(), torch.autocast("cpu", torch.bfloat16):
        model.hidden(x_BTD).sum().backward()
    assert training.fused > 0
    with as_on_a_gpu(), torch.no_grad():
        model = archdsl.build(spec).eval().to(torch.bfloat16)
        step = TokenStep(model, model.new_cache(), 2, compiled=True, backend=decoding)
        step([1, 2])
    assert decoding.fused > 0
