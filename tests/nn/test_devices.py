"""Devices: which one is used, and what differs between them. None of them needs to be there."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import archdsl
from archdsl.blocks.modules.router import budgets
from archdsl.cli import eval as eval_command
from archdsl.errors import ArchdslError
from archdsl.generation.sampling import probabilities
from archdsl.generation.sampling_config import Sampling
from archdsl.model import checkpoint
from archdsl.nn import devices
from archdsl.nn.devices import (
    available_devices,
    best_device,
    device_named,
    random_state_kept,
    require_compiler,
    seed_torch,
)
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer

CPU = torch.device("cpu")


def machine_with(kind: str | None, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """Makes torch say that this machine has ``count`` accelerators of a kind; None: no kind."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: found
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count if kind else 0)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_auto_is_the_accelerator_that_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(kind, monkeypatch)
    assert device_named("auto") == best_device() == torch.device(kind)
    assert available_devices() == ["cpu", kind, f"{kind}:0", f"{kind}:1"]
    assert device_named("cpu") == CPU
    assert device_named(f"{kind}:1") == torch.device(kind, 1)
    with pytest.raises(ArchdslError, match=f"{kind}:2: is not available; use cpu or {kind} or "):
        device_named(f"{kind}:2")


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(None, monkeypatch)
    assert device_named("auto") == best_device() == CPU
    with pytest.raises(ArchdslError, match=r"device: mps: is not available; use cpu$"):
        device_named("mps")


def test_a_checkpoint_is_loaded_to_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with("xpu", monkeypatch)
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path, device: device)
    assert str(eval_command._load(Path())) == "xpu"


@pytest.mark.parametrize(("kind", "half"), [("cpu", False), ("xpu", True), ("mps", False)])
def test_bfloat16_is_used_unasked_where_it_is_faster(kind: str, half: bool) -> None:
    trainer = SimpleNamespace(config=TrainConfig(steps=1), device=torch.device(kind))
    assert Trainer.in_bfloat16.fget(trainer) is half  # type: ignore[attr-defined]


@pytest.mark.parametrize("function", ["manual_seed", "manual_seed_all"])
def test_the_generator_of_the_device_is_seeded(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    module = SimpleNamespace(**{"manual_seed": lambda seed: None, function: seeds.append})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with random_state_kept(CPU):
        seed_torch(7, torch.device("mps"))
        first = torch.rand(())
        seed_torch(7, CPU)
        assert torch.rand(()) == first
    assert seeds == [7]


def test_random_state_is_restored_also_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.zeros(3, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: state[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, device: state.append(new))
    before = torch.get_rng_state()
    with random_state_kept(torch.device("mps")):
        torch.manual_seed(3)
        state.append(state[0] + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert state[-1] is state[0]


def test_compiling_asks_for_a_compiler_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nobody++")
    with pytest.raises(ArchdslError, match="nobody\\+\\+ is not installed"):
        require_compiler(CPU)
    model = archdsl.build(archdsl.load("tiny"))
    with pytest.raises(ArchdslError, match="needs a C\\+\\+ compiler"):
        archdsl.generate(model, [[1]], compiled=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    for system, compiler in (("linux", "g[+][+]"), ("darwin", "clang[+][+]"), ("win32", "cl")):
        monkeypatch.setattr(sys, "platform", system)
        with pytest.raises(ArchdslError, match=f"{compiler} is not installed"):
            require_compiler(CPU)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CXX", sys.executable)
    require_compiler(CPU)
    for triton in (False, True):
        monkeypatch.setattr(devices, "TRITON", triton)
        with nullcontext() if triton else pytest.raises(ArchdslError, match="needs Triton"):
            require_compiler(torch.device("cuda"))


def test_a_device_without_float64_computes_it_on_the_cpu() -> None:
    with FakeTensorMode(), torch.no_grad():  # tensors of a device that need not be there
        order_BT = torch.arange(6, device="mps").unsqueeze(0)
        assert budgets(0.5, order_BT).device.type == "mps"
        logits_BV = torch.zeros(2, 9, device="mps")
        for sampling in (Sampling(temperature=0), Sampling(top_k=3, top_p=0.5)):
            found = probabilities(logits_BV, sampling)
            assert (found.device, found.dtype) == (CPU, torch.float64)
