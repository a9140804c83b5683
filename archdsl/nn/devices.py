"""The devices that torch computes on: which there are, and in what they differ.

An accelerator is what `torch.accelerator` finds: cuda, xpu or mps. A machine has one kind of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from archdsl.errors import ArchdslError

HOSTS = ("cpu", "meta")  # their random numbers are those of the CPU
BFLOAT16 = ("cuda", "xpu")  # which compute faster in it
# what torch compiles for cuda and xpu with; not part of every build, for example not on Windows
TRITON = find_spec("triton") is not None


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU if torch finds none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def available_devices() -> list[str]:
    """The names of all devices, such as cpu, cuda, cuda:0 and cuda:1."""
    kind = best_device().type
    if kind == "cpu":
        return ["cpu"]
    numbered = [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    return ["cpu", kind, *numbered]


def device_named(name: str) -> torch.device:
    """The device of this name; auto is `best_device`. Raises ArchdslError if there is none."""
    if name == "auto":
        return best_device()
    if name == "cpu":
        return torch.device(name)  # without a look for others, after which no process may fork
    if name not in (there := available_devices()):
        raise ArchdslError(f"device: {name}: is not available; use {' or '.join(there)}")
    return torch.device(name)


def require_compiler(device: torch.device) -> None:
    """Raises ArchdslError if torch can compile nothing for ``device``."""
    if device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # of torch
        compiler = os.environ.get("CXX") or usual
        if shutil.which(compiler) is None:
            raise ArchdslError(
                f"compile: needs a C++ compiler, and {compiler} is not installed; install it, name "
                "another in the environment variable CXX, or do not compile"
            )
    elif device.type in BFLOAT16 and not TRITON:
        raise ArchdslError("compile: needs Triton; pip install triton, or do not compile")


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the random number generators of the CPU and of ``device``.

    torch.manual_seed takes a third of a millisecond longer, as it visits all kinds of devices.
    """
    torch.default_generator.manual_seed(seed)
    if device.type not in HOSTS:
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)  # mps has the second alone


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context that restores the random number generators of the CPU and of ``device``."""
    if device.type in HOSTS:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU if its device has no float64, which is so for mps."""
    return (x.cpu() if x.device.type == "mps" else x).double()
