"""What torchrun starts in several processes for `test_ranks`. Writes what it found as JSON.

    torchrun --nproc-per-node N -m tests.training.ranks_job JOB PARALLEL FILE

Each job trains ARCHDSL_RANKS_STEPS steps, by default 3.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archdsl.data.loading import SkillData
from archdsl.data.skills import parse_skill
from archdsl.errors import ArchdslError, Problem, SpecError
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.build import build
from archdsl.nn.ranks import Parallel, Ranks, joined, local, whole
from archdsl.testing import small_model
from archdsl.training.config import TrainConfig
from archdsl.training.trainer import Trainer, TrainStep, compile_layers
from tests.shipped import STRUCTURES

SKILL = SkillData(parse_skill("p-hop,hops=1,length=16"))
SMALL = Sizes(dim=16, context=16, vocab_size=8, head_size=8, repeat=2)
STEPS = int(os.environ.get("ARCHDSL_RANKS_STEPS", "3"))
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}


def loop(router: str, **more: Any) -> dict[str, Any]:
    routed = {"kind": router, "capacity": [0.5, 0.25]}
    return {"kind": "loop", "steps": 3, "router": routed, "body": LAYER} | more


def models() -> dict[str, ModelSpec]:
    """The shipped specs, and models with what depends on the whole batch, or on its parts."""
    balanced = LAYER | {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "balance": "loss"}}
    deep = {"depth": {"law": "uniform", "min": 1, "max": 4, "per": "sequence"}}
    made = {
        "threshold": small_model(loop("threshold"), context=16),
        "predictor": small_model(loop("predictor"), context=16, tie_embeddings=True),
        "balance": small_model(
            balanced, {"kind": "loop", "steps": 2, "body": balanced}, context=16
        ),
        "depths": small_model(LAYER, loop("threshold"), context=16, training=deep),
    }
    return {name: load(name).resized(SMALL) for name in STRUCTURES} | made


class Collectives(TorchDispatchMode):
    """Counts the collective operations inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self.count[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def trainer(spec: ModelSpec, ranks: Ranks | None, **changes: Any) -> Trainer:
    settings = {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "device": "cpu", "seed": 3} | changes
    config = TrainConfig.model_validate(settings)
    # in float32, rounding may decide which of two nearly equal scores a router selects
    return Trainer(build(spec, dtype=torch.float64), SKILL, config, ranks=ranks)


def gradients(ranks: Ranks) -> dict[str, Any]:
    """How far the gradients are from those of one process, and how much was gathered for them."""
    found = {}
    for name, spec in models().items():
        alone, together = trainer(spec, None), trainer(spec, ranks)
        batch = SKILL.batch(0, 8, 16, 0)
        for run in (alone, together):
            torch.manual_seed(0)
            with Collectives() as seen:
                run.backward(batch)
        pairs = zip(alone.model.parameters(), together.model.parameters(), strict=True)
        found[name] = {
            "error": max(_difference(one.grad, other.grad) for one, other in pairs),
            "units": len(together.units),
            "collectives": dict(seen.count),
        }
    return {"models": found, "error of the second": error_of_the_second(ranks)}


def error_of_the_second(ranks: Ranks) -> list[Any]:
    """What this process is told of an error that the second one raises."""

    def work() -> None:
        if ranks.rank == 1:
            raise SpecError(Problem("blocks.0", "is wrong"))

    try:
        ranks.agree(work)
    except ArchdslError as error:
        return [str(error), error.exit_status, error.told_by_another]
    return []


def _difference(alone: torch.Tensor | None, shared: torch.Tensor | None) -> float:
    if alone is None or shared is None:
        return 0.0 if alone is shared else float("inf")
    return float((whole(shared) - alone).abs().max() / alone.abs().max().clamp(min=1e-9))


VARIANTS: dict[str, dict[str, Any]] = {"muon": {"optimizer": "muon"}, "parts": {"accumulate": 2}}
TRAINED = ("threshold", "balance", "depths", "huginn-tiny", *VARIANTS, "compiled")


def losses(ranks: Ranks) -> dict[str, Any]:
    """The losses of some steps, the last validation, the statistics, and the bytes of all states.

    The model ``compiled`` is compiled, unless there is one process alone.
    """
    found = {}
    for name in TRAINED:
        spec, seen = models().get(name, load("tiny").resized(SMALL)), list[float]()
        run = trainer(spec, ranks, **VARIANTS.get(name, {}))
        if name == "compiled" and ranks.size > 1:
            compile_layers(run.model, backend="eager")
        run.run(on_step=partial(_note, seen))
        kept = [tensor for moments in run.optimizer.state().values() for tensor in moments.values()]
        found[name] = {
            "losses": seen,
            "validation": run.evaluate().loss,
            "statistics": [x for _, b in run.model.named_buffers() for x in b.flatten().tolist()],
            "bytes": sum(local(tensor).nbytes for tensor in (*run.model.parameters(), *kept)),
        }
    return found


def _note(seen: list[float], step: TrainStep) -> None:
    seen.append(step.loss)


JOBS: dict[str, Callable[[Ranks], dict[str, Any]]] = {"gradients": gradients, "losses": losses}


def main() -> None:
    """Run a job and write its result."""
    torch.set_num_threads(1)
    job, parallel, out = sys.argv[1:]
    with joined("cpu", cast(Parallel, parallel)) as ranks:
        result = JOBS[job](ranks)
        if ranks.first:
            Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
