"""What a training run will do, before it starts: steps, tokens, memory and bytes that are sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from archdsl.costs.activations import FLOAT
from archdsl.costs.devices import Devices, DevicesError, Traffic, Units, traffic
from archdsl.costs.receipt import train_flops
from archdsl.lang.spec import ModelSpec
from archdsl.reports.layout import TwoColumns
from archdsl.reports.tables import memory_parts, parameters, quantity, sent_parts, short
from archdsl.reports.training_memory import TrainingMemory, passes_of_step, training_memory
from archdsl.reports.units import units

if TYPE_CHECKING:
    from archdsl.training.config import TrainConfig

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}


@dataclass(frozen=True)
class TrainForecast:
    """What a run will do. ``sequences``: of each device in a step; ``passes``: in which it
    computes them; ``flops``: of all devices in the whole run, in training."""

    spec: ModelSpec
    config: TrainConfig
    devices: Devices
    sequences: int
    passes: int
    tokens: int
    flops: float
    units: Units
    memory: TrainingMemory
    sent: Traffic


def forecast_training(spec: ModelSpec, config: TrainConfig, devices: Devices) -> TrainForecast:
    """Returns what a run on these devices will do.

    Raises DevicesError if a batch cannot be divided among them.
    """
    shares = devices.number * config.accumulate
    if config.batch_size % shares:
        parts = f" in {config.accumulate} parts each" if config.accumulate > 1 else ""
        raise DevicesError(
            f"batch_size: {config.batch_size} sequences cannot be divided among {devices.number} "
            f"devices{parts}; use a multiple of {shares}"
        )
    context = config.context or spec.context
    sequences = config.batch_size // devices.number
    found, passes = units(spec), passes_of_step(spec, sequences, config.accumulate)
    return TrainForecast(
        spec,
        config,
        devices,
        sequences,
        passes,
        config.steps * config.batch_size * context,
        config.steps * config.batch_size * train_flops(spec, tokens=context),
        found,
        training_memory(
            spec,
            sequences,
            context,
            accumulate=config.accumulate,
            checkpointed=config.activation_checkpointing,
            optimizer=config.optimizer,
            devices=devices,
        ),
        traffic(found, devices, passes, config.optimizer == "muon"),
    )


def forecast_data(found: TrainForecast) -> dict[str, Any]:
    """Returns a forecast as data for JSON; sizes are in bytes, memory is that of each device."""
    layers, root, _ = found.units
    return {
        "name": found.spec.name,
        "steps": found.config.steps,
        "tokens": found.tokens,
        "train_flops": found.flops,
        "devices": found.devices._asdict(),
        "sequences_per_device": found.sequences,
        "passes_per_step": found.passes,
        "units": {"layers": [layer.whole for layer in layers], "root": root.whole},
        "training_memory": asdict(found.memory) | {"peak": found.memory.peak},
        "bytes_sent_per_step": found.sent._asdict() | {"total": found.sent.total},
    }


def forecast_table(found: TrainForecast) -> RenderableType:
    """Returns a forecast as a table."""
    return TwoColumns([*_facts(found)])


def _facts(found: TrainForecast) -> Iterator[tuple[str, str]]:
    config, devices = found.config, found.devices
    context = config.context or found.spec.context
    yield (
        "steps",
        f"{config.steps:,} of {config.batch_size:,} sequences of {context:,} tokens: "
        f"{short(found.tokens)} tokens and {quantity(found.flops, 'FLOPs')} of training in all",
    )
    groups = f" in groups of {devices.shards}" if devices.parallel == "hsdp" else ""
    how = f", {devices.parallel}{groups}" if devices.number > 1 else ""
    passes = f" in {found.passes} passes" if found.passes > 1 else ""
    yield "devices", f"{devices.number}{how}; {found.sequences:,} sequences per step each{passes}"
    yield "units", _units(found.units)
    need, optimizer = found.memory, OPTIMIZERS[config.optimizer]
    yield "memory", f"{quantity(need.peak, 'B')} on each device: {memory_parts(need, optimizer)}"
    if devices.number > 1:
        yield "sent", f"by each device {sent_parts(found.sent)}"


def _units(units: Units) -> str:
    """Returns the sizes of units in parameters: equally large layers together."""
    sizes = Counter(layer.whole // FLOAT for layer in units.layers)
    layers = ", ".join(f"{n} of {parameters(size)}" for size, n in sizes.items())
    root = parameters(units.root.whole // FLOAT)
    return f"layers with parameters: {layers}; embedding, last norm and head: {root}"
