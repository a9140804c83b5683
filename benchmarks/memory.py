"""The memory of a training step: the closed form compared with what the allocator counts.

Also the memory that a forward pass saves for the backward pass (routed compared with looped, and
recomputed compared with plain), and the time that recomputing takes.

python -m benchmarks.memory [--json] [--small] [--device cuda]
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import archdsl
from archdsl.data.types import Batch, HeldOut, Split
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.language_model import LanguageModel
from archdsl.reports.training_memory import training_memory
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer
from benchmarks.measure import arguments, bar, interleaved, progress, ratio, record

SPECS = {
    "transformer": [],
    "loop": [],
    "itt": [],
    "itt, prefix router": ["blocks.0.body.1.router.kind=prefix"],
    "mod": [],
    "mor": [],
    "hybrid": [],
    "universal": [],
    "search": [],
    "tiny": [],
}
SIZES = [  # width, context, vocabulary, head size, largest number of copies
    Sizes(128, 256, 1024, 32, 2),
    Sizes(256, 512, 4096, 64, 4),
    Sizes(512, 1024, 8192, 64, 8),
]
REACH = 0.10  # the largest relative error of an estimate
BENCH = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Allocated:
    """The bytes at the peak of a call, and those that are still allocated after it."""

    peak: int
    left: int


def allocated(call: Callable[[], object], device: str = "cpu") -> Allocated:
    """Measures the memory of tensors in a call. What it returns counts as still allocated."""
    return (_on_cpu if device == "cpu" else _on_accelerator)(call)


def _on_accelerator(call: Callable[[], object]) -> Allocated:
    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    made = call()
    torch.accelerator.synchronize()
    peak, left = torch.accelerator.max_memory_allocated(), torch.accelerator.memory_allocated()
    del made
    return Allocated(peak - before, left - before)


def _on_cpu(call: Callable[[], object]) -> Allocated:
    """Adds up every allocation and release that the profiler records, in order of time."""
    gc.collect()
    # without acc_events torch 2.11 warns
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        made = call()
    del made
    assert profiled.profiler is not None
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    events = [event for event in _walk(tree) if str(event.tag).endswith("Allocation")]
    sizes: dict[int, int] = {}
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        what = event.extra_fields
        if what.alloc_size > 0:
            sizes[what.ptr] = what.alloc_size
            alive += what.alloc_size
        else:  # memory that was allocated before the call does not count
            alive -= sizes.pop(what.ptr, 0)
        peak = max(peak, alive)
    return Allocated(peak, alive)


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


@dataclass(frozen=True)
class Noise:
    """A data source of random tokens; see `archdsl.data.types.Data`."""

    vocab_size: int
    name: str = "noise"
    fingerprint: str = "0" * 64
    chance: float | None = None

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        rng = torch.Generator().manual_seed(index)
        drawn = torch.randint(self.vocab_size, (batch_size, context + 1), generator=rng)
        return Batch(drawn[:, :-1], drawn[:, 1:])

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        yield self.batch(0, batch_size, context, 0)

    def bytes_per_token(self, split: Split) -> float | None:
        return None

    def save_tokenizer(self, path: Path) -> None:
        pass


def training(spec: ModelSpec, batch_size: int, device: str = "cpu", **config: Any) -> Trainer:
    """``config``: other fields of TrainConfig."""
    fields = TrainConfig(steps=10**6, batch_size=batch_size, device=device, **config)
    return Trainer(archdsl.build(spec), Noise(spec.vocab_size), fields)


def measured(spec: ModelSpec, batch_size: int, device: str = "cpu", **config: Any) -> int:
    """Returns the peak memory in bytes of building a model and training it for two steps.

    AdamW has its moments from the second step on.
    """
    return allocated(lambda: training(spec, batch_size, device, **config).run(2), device).peak


def estimates(
    labels: Iterable[str], sizes: list[Sizes], batch_size: int, device: str
) -> dict[str, object]:
    """Returns the closed form divided by the measured peak, for each spec and size."""
    figures: dict[str, object] = {}
    for label in labels:
        for size in sizes:
            name = label.partition(",")[0]
            spec = archdsl.load(name, overrides=SPECS[label]).resized(size)
            for recomputed in (False, True):
                found = measured(spec, batch_size, device, activation_checkpointing=recomputed)
                closed = training_memory(spec, batch_size, checkpointed=recomputed)
                name = f"{label}, {closed.weights / 4e6:.1f}M{', recomputed' * recomputed}"
                off = closed.peak / found
                figures[name] = {
                    "closed/measured": off,
                    "MiB": found / 2**20,
                    "bar": bar(abs(off - 1), REACH),
                }
                progress(f"{name}: {figures[name]}")
    return figures


def pass_keeps(model: LanguageModel, batch: Batch, device: str) -> int:
    """Returns the bytes that a pass from tokens to loss saves for the backward pass."""
    return allocated(lambda: model.loss(batch.tokens_BT, batch.targets_BT), device).left


def kept(batch_size: int, context: int, device: str) -> dict[str, object]:
    """Returns the saved bytes of the 10M models, relative to the plain one.

    They are the plain model, the routed one, and the loop that every token runs.
    """
    plain, routed = (archdsl.load(BENCH / f"{name}.yaml") for name in ("llama-10m", "itt-10m"))
    looped = archdsl.load(BENCH / "itt-10m.yaml", overrides=["blocks.0.body.1.router=null"])
    bytes_: dict[str, int] = {}
    for name, spec in (("plain", plain), ("routed", routed), ("looped", looped)):
        model = archdsl.build(spec).to(device).train()
        drawn = Noise(spec.vocab_size).batch(0, batch_size, context, 0)
        batch = Batch(drawn.tokens_BT.to(device), drawn.targets_BT.to(device))
        bytes_[name] = pass_keeps(model, batch, device)
        model.checkpoint_activations = True
        bytes_[f"{name}, recomputed"] = pass_keeps(model, batch, device)
    figures: dict[str, object] = {
        f"kept: {name} / plain": found / bytes_["plain"] for name, found in bytes_.items()
    }
    thinking = bytes_["routed"] / bytes_["looped"]
    recomputed = bytes_["plain, recomputed"] / bytes_["plain"]
    return figures | {
        "kept: routed .5 / looped": {"ratio": thinking, "bar": bar(thinking, 0.80)},
        "kept: all recomputed / plain": {"ratio": recomputed, "bar": bar(recomputed, 0.25)},
    }


def recomputing_takes(batch_size: int, context: int, rounds: int, device: str) -> dict[str, object]:
    """Returns the time of a training step with recomputed layers relative to one without."""
    spec = archdsl.load(BENCH / "llama-10m.yaml").model_copy(update={"context": context})
    contenders = {}
    for name, recomputed in (("stored", False), ("recomputed", True)):
        trainer = training(spec, batch_size, device, activation_checkpointing=recomputed)
        contenders[name] = lambda trainer=trainer: trainer.run(trainer.step + 1)
    timed = interleaved(contenders, rounds=rounds, device=device)
    return {"time: recomputed / stored": ratio(timed["recomputed"], timed["stored"])}


def main() -> None:
    """Runs the benchmark."""
    args = arguments(__doc__)
    sizes = SIZES[:1] if args.small else SIZES
    context = 64 if args.small else 512
    figures = estimates(["itt"] if args.small else SPECS, sizes, 2, args.device)
    figures |= kept(1 if args.small else 4, context, args.device)
    rounds = args.rounds or (1 if args.small else 7)
    figures |= recomputing_takes(1 if args.small else 2, context, rounds, args.device)
    record("memory", {"sizes": sizes, "batch_size": 2}, figures, args)


if __name__ == "__main__":
    main()
