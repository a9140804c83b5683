"""Hypervolume of the Pareto front that a search strategy has found, by training FLOPs spent.

python -m benchmarks.search.hypervolume [--space benchmarks/search/depths.yaml] [--trainings 24]
    [--seeds 3] [--workers 2] [--json]

The objectives are held-out loss and FLOPs per token that the trained model executes. The reference
point does not depend on the results: its loss is that of the best guess that ignores the input, its
FLOPs are 1.1 times those of the costliest of 1,000 random models. A hypervolume is given as a share
of the box below the reference point. Every strategy may spend the FLOPs of --trainings trainings of
the default model. A model that several strategies try is trained once and charged to each of them.
Models in --store are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from archdsl import __version__
from archdsl.costs.receipt import cost
from archdsl.data.types import IGNORE
from archdsl.lang.load import fitted
from archdsl.lang.spec import ModelSpec
from archdsl.lang.template import Choice, Distribution, defaults, fill
from archdsl.search.stats.pareto import Point, hypervolume
from archdsl.search.trials.proxy import Proxy, Task, default_tasks
from benchmarks.search.strategies import STRATEGIES, Bench

OUT = Path(__file__).parents[2] / "results" / "search-bench"
SHARES = (0.25, 0.5, 1.0)  # of the budget, at which the table shows where strategies stand


@dataclass(frozen=True)
class Run:
    """A run of one strategy with one seed on one task; ``limit`` are its training FLOPs."""

    strategy: str
    bench: Bench
    reference: Point
    limit: float

    def curve(self) -> list[tuple[float, float]]:
        """Return after each trial the training FLOPs spent so far and the hypervolume."""
        torch.set_num_threads(1)
        points: list[Point] = []
        curve, spent = [], 0.0
        for trained in STRATEGIES[self.strategy](self.bench):
            spent += trained.train_flops
            if trained.point is not None:
                points.append(trained.point)
            curve.append((spent, hypervolume(points, self.reference) / _box(self.reference)))
            if spent >= self.limit:
                break
        return curve


def _box(reference: Point) -> float:
    return reference[0] * reference[1]


def reference(bench: Bench) -> Point:
    """Return the reference point: the entropy of the targets in nats, and FLOPs per token."""
    task = bench.proxy.tasks[bench.task]
    rng = Random(0)
    trees = [
        fill(bench.tree, lambda _, distribution: _random(rng, distribution)) for _ in range(1000)
    ]
    small = [bench.proxy.shrink(fitted(tree, bench.budget), task) for tree in trees]
    return entropy(task, bench.seed), 1.1 * max(cost(spec).expected for spec in small)


def entropy(task: Task, seed: int) -> float:
    """Return the loss in nats of the best guess that ignores the input, over 64 batches."""
    data = task.load()
    batches = [data.batch(i, task.batch_size, task.context, seed).targets_BT for i in range(64)]
    asked = torch.cat([targets_BT[targets_BT != IGNORE] for targets_BT in batches])
    share = torch.bincount(asked).double() / len(asked)
    return float(-(share[share > 0] * share[share > 0].log()).sum())


def _random(rng: Random, distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return rng.choice(list(distribution.choices))
    assert distribution.count is not None
    return distribution.grid(rng.randrange(distribution.count))


def default_training(bench: Bench) -> float:
    """Return the FLOPs of training the default model of the space up to the last rung."""
    task = bench.proxy.tasks[bench.task]
    small: ModelSpec = bench.proxy.shrink(fitted(fill(bench.tree, defaults), bench.budget), task)
    tokens = task.rungs[-1] * task.batch_size * task.context
    return 3.0 * tokens * cost(small).expected


def at(curve: Sequence[tuple[float, float]], flops: float) -> float:
    """Return the hypervolume when ``flops`` had been spent."""
    return max((volume for spent, volume in curve if spent <= flops), default=0.0)


def measure(tasks: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "archdsl": __version__,
        "torch": torch.__version__,
        "space": given.space,
        "trainings": given.trainings,
        "tasks": {},
    }
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for task in tasks:
            proxy = Proxy(tasks={task: default_tasks()[task].model_copy(update={"weight": 1.0})})
            benches = [
                Bench(task, seed, proxy, given.store, given.space) for seed in range(given.seeds)
            ]
            corner = reference(benches[0])
            limit = given.trainings * default_training(benches[0])
            futures = {
                (name, bench.seed): pool.submit(Run(name, bench, corner, limit).curve)
                for bench in benches
                for name in given.strategies
            }
            data = proxy.tasks[task].load()
            found["tasks"][task] = {
                "data": {"name": data.name, "sha256": data.fingerprint},
                "reference": corner,
                "limit": limit,
                "proxy": proxy.model_dump(mode="json"),
                "curves": {
                    name: {str(b.seed): futures[name, b.seed].result() for b in benches}
                    for name in given.strategies
                },
            }
    return found


def table(found: dict[str, Any]) -> str:
    """Return a table of mean, minimum and maximum over the seeds, at shares of the limit."""
    lines = []
    for task, of_task in found["tasks"].items():
        flops = [f"{share * of_task['limit'] / 1e12:.2f} TFLOPs" for share in SHARES]
        lines.append(f"{task:12}" + "".join(f"{text:>28}" for text in flops))
        for name, curves in of_task["curves"].items():
            cells = []
            for share in SHARES:
                volumes = [at(curve, share * of_task["limit"]) for curve in curves.values()]
                cells.append(f"{fmean(volumes):.4f} ({min(volumes):.4f}..{max(volumes):.4f})")
            lines.append(f"{name:12}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for each task with the means over the seeds and their range."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found["tasks"]), figsize=(11, 4.2), squeeze=False)
    for axis, (task, of_task) in zip(axes[0], found["tasks"].items(), strict=True):
        grid = [of_task["limit"] * i / 200 for i in range(1, 201)]
        for name, curves in of_task["curves"].items():
            volumes = [[at(curve, flops) for flops in grid] for curve in curves.values()]
            by_flops = list(zip(*volumes, strict=True))
            shown = [flops / 1e12 for flops in grid]
            (line,) = axis.plot(shown, [fmean(at_once) for at_once in by_flops], label=name)
            low, high = [min(v) for v in by_flops], [max(v) for v in by_flops]
            axis.fill_between(shown, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axis.set(title=task, xlabel="training TFLOPs", ylabel="hypervolume, share of the box")
        lowest = min(
            at(c, of_task["limit"] / 4) for cs in of_task["curves"].values() for c in cs.values()
        )
        axis.set_ylim(bottom=0.95 * lowest)
    axes[0][0].legend(frameon=False)
    figure.suptitle("Means and ranges over the seeds", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="hypervolume against training FLOPs")
    parser.add_argument("--task", choices=list(default_tasks()), help="default: all")
    parser.add_argument("--space", default="search", help="default: the shipped one")
    parser.add_argument("--trainings", type=int, default=24, help="of the default model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--store", type=Path, default=Path("runs/search-bench"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure([given.task] if given.task else list(default_tasks()), given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "hypervolume.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, given.out / "hypervolume.png")
    print(json.dumps(found) if given.json else table(found))


if __name__ == "__main__":
    main()
