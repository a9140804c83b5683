"""Are two routers that no later token reaches better on state-tracking? Tested with new seeds.

    python results/paper/confirm.py 1M [--lr 1e-3 2e-3 4e-3] [--workers N] [--store runs/paper]

In 1M.json and 3M.json, ITT x4 with the routers `threshold` and `prefix` answers most questions of
state-tracking. Somebody of thirteen models is always ahead, if only by luck. So these two, the
plain model that they are made of and both plain models of equal FLOPs are trained again, exactly as
run.py trains them, with the seeds 6 to 13, which had no part in the choice. The six differences
hold together with 95% (Bonferroni). With --lr, each model is tried with these rates and seed 0, and
trained with its best. Trainings in --store are not done again; the result is written to
confirm-SIZE.json here, or to confirm-SIZE-lr.json. 1M: about twenty minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from run import HERE, SIZES, setup, tell

from archdsl.files import make_folder, write_text
from archdsl.search.analysis.comparison import JobResult, K, run_trainings
from archdsl.search.compare import STORE
from archdsl.search.report.report import versions
from archdsl.search.stats.paired import paired
from archdsl.search.trials.proxy import Job, ProxyScore

TASK = "state-tracking"
ROUTED = ("itt-x4-threshold", "itt-x4-prefix")
PLAIN = ("dense", "dense-wide", "dense-deep")
SEEDS = range(6, 14)


def _trained(jobs: Mapping[K, Job], workers: int) -> dict[K, JobResult]:
    results, interrupted = run_trainings(jobs, None, workers, None, tell)
    if interrupted:
        raise KeyboardInterrupt
    return results


def _percent(score: object) -> float:
    if not isinstance(score, ProxyScore) or score.accuracy is None:
        raise SystemExit(f"a training has no accuracy: {score}")
    return 100 * score.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--lr", type=float, nargs="+", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--store", type=Path, default=Path("runs/paper"))
    given = parser.parse_args()
    store = given.store / given.size / TASK / STORE
    make_folder(store)
    what = setup(given.size, TASK, 1.0, ROUTED + PLAIN, given.lr)
    if given.lr:
        what = what.with_lr_results(_trained(what.lr_jobs(store), given.workers))
    jobs = what.jobs(SEEDS[-1], store)
    own = {(name, seed): job for (name, _, seed), job in jobs.items() if seed in SEEDS}
    results = _trained(own, given.workers)
    accuracy = {name: [_percent(results[name, seed]) for seed in SEEDS] for name in ROUTED + PLAIN}
    gaps = {
        f"{a} minus {b}": str(paired(accuracy[a], accuracy[b], len(ROUTED) * len(PLAIN)))
        for a in ROUTED
        for b in PLAIN
    }
    for pair, gap in gaps.items():
        print(f"{pair}: {gap} points")
    settings = what.proxy.tasks[TASK]
    rates = {name: what.lr(name, TASK) for name in ROUTED + PLAIN}
    content = {
        "lr": rates,
        "accuracy": accuracy,
        "points": gaps,
        "seeds": list(SEEDS),
        "specs": {name: what.small[TASK][name].to_yaml() for name in ROUTED + PLAIN},
        "settings": settings.model_dump(mode="json"),
        "data": settings.load().fingerprint,
        "versions": versions(),
    }
    name = f"confirm-{given.size}{'-lr' if given.lr else ''}.json"
    write_text(HERE / name, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
