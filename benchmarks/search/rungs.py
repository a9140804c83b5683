"""How far the ranking of models after a part of a proxy's training agrees with later ones.

python -m benchmarks.search.rungs [--models 16] [--times 4] [--seeds 1] [--budget 162M]
    [--store runs/rungs] [--workers 2] [--json]

Models are drawn from the whole space, not the best of a search. Their proxies are trained --times
as long as in a search, and the loss on an eighth of the held-out tokens is measured on the way. The
table has Kendall's tau between the objective after each part of a search's training, and that after
all of it, and after --times as much; in the columns of a task, that of its loss alone. Trainings in
--store are not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from archdsl.files import make_folder
from archdsl.lang.load import budget_of, read
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.search.analysis.comparison import run_trainings
from archdsl.search.space.feasibility import survey
from archdsl.search.stats.paired import kendall_tau
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, default_tasks
from archdsl.sizes import parse_size

PARTS = 8  # of a search's training, at which the ranking is looked at
DRAWN = 400  # points of the space, among which the models are

Losses = dict[str, list[float]]  # by task, of the models


def models(proxy: Proxy, budget: Budget, count: int) -> list[ModelSpec]:
    """Return models of the space that keep to the budget and whose proxies differ."""
    found: dict[tuple[str, ...], ModelSpec] = {}
    tree = read("search")
    for spec in survey(tree, budget_of(tree, budget), DRAWN, seed=1).models:
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
    proxy = longer(given.times)
    drawn = models(proxy, Budget(params=given.budget), given.models)
    jobs: dict[tuple[int, int, str], Job] = {
        (seed, i, name): task.job(given.store, proxy.shrink(spec, task), seed, task.rungs[-1])
        for seed in range(given.seeds)
        for i, spec in enumerate(drawn)
        for name, task in proxy.tasks.items()
    }
    found, _ = run_trainings(jobs, None, given.workers, None, lambda _: None)
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        every = {
            (i, name): score
            for (of, i, name), score in found.items()
            if of == seed and isinstance(score, ProxyScore) and score.loss is not None
        }
        whole = [i for i in range(len(drawn)) if all((i, name) in every for name in proxy.tasks)]
        scores = {(n, t): every[i, t] for n, i in enumerate(whole) for t in proxy.tasks}
        rows += table(scores, len(whole), proxy, seed, given.times)
    if given.json:
        print(json.dumps({"models": len(drawn), "rows": rows}))
    for row in rows if not given.json else []:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def table(
    scores: dict[tuple[int, str], ProxyScore], count: int, proxy: Proxy, seed: int, times: int
) -> list[dict[str, Any]]:
    """Return for each part of the training how its ranking agrees with later ones."""
    at = [losses_at(scores, count, point) for point in range(PARTS * times)]
    last, longest = at[PARTS - 1], at[-1]
    rows = []
    for point in [*range(PARTS), *range(2 * PARTS - 1, PARTS * times, PARTS)]:
        now = at[point]
        row = {"seed": seed, "trained": f"{(point + 1) / PARTS:.3g}"}
        pairs = {
            "end": (objectives(now, proxy), objectives(last, proxy)),
            f"x{times}": (objectives(now, proxy), objectives(longest, proxy)),
            **{f"{t} end": (now[t], last[t]) for t in now},
            **{f"{t} x{times}": (now[t], longest[t]) for t in now},
        }
        for name, (first, second) in pairs.items():
            tau = kendall_tau(list(zip(first, second, strict=True)))
            row[name] = f"{tau.tau:+.2f} ({tau.low:+.2f} to {tau.high:+.2f})"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
