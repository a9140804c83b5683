"""How far the ranking of models after a part of a proxy's training agrees with later ones.

python -m benchmarks.search.rungs [--models 16] [--times 4] [--seeds 1] [--budget 162M]
    [--store runs/rungs] [--workers 2] [--json]

Models are drawn from the whole space, not the best of a search. Their proxies are trained --times
as long as in a search, and the loss on an eighth of the held-out tokens is measured on the way. The
table has Kendall's tau between the objective after each part of a search's training, and that after
all of it, and after --times as much; in the columns of a task, that of its loss alone. With two
--seeds there are also the taus between the first two seeds after equally long trainings: no ranking
can be expected to agree better than these do. Trainings in --store are not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from archdsl.files import make_folder
from archdsl.lang.load import budget_of, read
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.search.analysis.comparison import run_trainings
from archdsl.search.space.feasibility import require_feasible, survey
from archdsl.search.stats.paired import kendall_tau
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, default_tasks
from archdsl.sizes import parse_size

PARTS = 8  # of a search's training, at which the ranking is looked at
DRAWN = 400  # points of the space, among which the models are

Losses = dict[str, list[float]]  # by task, of the models


def models(tree: Tree, proxy: Proxy, budget: Budget, count: int) -> list[ModelSpec]:
    """Return models of the space that keep to the budget and whose proxies differ."""
    found: dict[tuple[str, ...], ModelSpec] = {}
    for spec in survey(tree, budget, DRAWN, seed=1).models:
        small = tuple(proxy.shrink(spec, t).fingerprint() for t in proxy.tasks.values())
        found.setdefault(small, spec)
        if len(found) == count:
            break
    return list(found.values())


def longer(times: int) -> Proxy:
    """Return the default proxy, trained so many times as long, with losses on the way."""
    tasks = {}
    for name, task in default_tasks().items():
        every = max(1, task.rungs[-1] // PARTS)
        steps = (every * PARTS, every * PARTS * times)
        tasks[name] = task.model_copy(update={"rungs": steps, "held_out_every": every})
    return Proxy(tasks=tasks)


def losses_at(scores: dict[tuple[int, str], ProxyScore], count: int, point: int) -> Losses:
    """Return the losses of all models at a point of their curves, counted from 0."""
    tasks = {task for _, task in scores}
    return {t: [scores[i, t].held_out[point][1] for i in range(count)] for t in sorted(tasks)}


def objectives(losses: Losses, proxy: Proxy) -> list[float]:
    weighted = ([proxy.tasks[task].weight * x for x in of] for task, of in losses.items())
    return [sum(parts) for parts in zip(*weighted, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=parse_size, default=parse_size("162M"))
    parser.add_argument("--store", type=Path, default=Path("runs/rungs"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    make_folder(given.store)
    tree = read("search")
    budget = budget_of(tree, Budget(params=given.budget))
    proxy = longer(given.times).for_space(tree, require_feasible(tree, budget))
    drawn = models(tree, proxy, budget, given.models)
    jobs: dict[tuple[int, int, str], Job] = {
        (seed, i, name): task.job(given.store, proxy.shrink(spec, task), seed, task.rungs[-1])
        for seed in range(given.seeds)
        for i, spec in enumerate(drawn)
        for name, task in proxy.tasks.items()
    }
    found, _ = run_trainings(jobs, None, given.workers, None, lambda _: None)
    every = {
        key: score
        for key, score in found.items()
        if isinstance(score, ProxyScore) and score.loss is not None
    }
    asked = [(seed, name) for seed in range(given.seeds) for name in proxy.tasks]
    whole = [i for i in range(len(drawn)) if all((seed, i, name) in every for seed, name in asked)]
    rows: list[dict[str, Any]] = []
    curves: list[list[Losses]] = []
    for seed in range(given.seeds):
        scores = {(n, t): every[seed, i, t] for n, i in enumerate(whole) for t in proxy.tasks}
        curves.append([losses_at(scores, len(whole), p) for p in range(PARTS * given.times)])
        rows += table(curves[-1], proxy, seed, given.times)
    if given.seeds > 1:
        rows += between_seeds(curves[0], curves[1], proxy, given.times)
    if given.json:
        print(json.dumps({"models": len(whole), "rows": rows}))
    for row in rows if not given.json else []:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def shown(times: int) -> list[int]:
    """Return the points that the tables have: all of a search's training, then fewer."""
    return [*range(PARTS), *range(2 * PARTS - 1, PARTS * times, PARTS)]


def table(at: list[Losses], proxy: Proxy, seed: int, times: int) -> list[dict[str, Any]]:
    """Return for each part of the training how its ranking agrees with later ones."""
    last, longest = at[PARTS - 1], at[-1]
    rows = []
    for point in shown(times):
        now = at[point]
        row: dict[str, Any] = {"seed": seed, "trained": f"{(point + 1) / PARTS:.3g}"}
        pairs = {
            "end": (objectives(now, proxy), objectives(last, proxy)),
            f"x{times}": (objectives(now, proxy), objectives(longest, proxy)),
            **{f"{t} end": (now[t], last[t]) for t in now},
            **{f"{t} x{times}": (now[t], longest[t]) for t in now},
        }
        rows.append(row | taus(pairs))
    return rows


def between_seeds(
    one: list[Losses], other: list[Losses], proxy: Proxy, times: int
) -> list[dict[str, Any]]:
    """Return for each part of the training how the rankings of two seeds agree."""
    rows = []
    for point in shown(times):
        pairs = {"objective": (objectives(one[point], proxy), objectives(other[point], proxy))}
        pairs |= {t: (one[point][t], other[point][t]) for t in one[point]}
        rows.append({"seed": "0 and 1", "trained": f"{(point + 1) / PARTS:.3g}"} | taus(pairs))
    return rows


def taus(pairs: dict[str, tuple[list[float], list[float]]]) -> dict[str, str]:
    """Return Kendall's tau of each pair of rankings, with its 95% interval."""
    return {name: str(kendall_tau(list(zip(*pair, strict=True)))) for name, pair in pairs.items()}


if __name__ == "__main__":
    main()
