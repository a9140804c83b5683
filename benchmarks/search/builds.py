"""Hypervolume of the Pareto front over the time of a search, of this build and of another one.

python -m benchmarks.search.builds OTHER [--seeds 3] [--time 540] [--budget 162M]
    [--store runs/builds] [--json]

OTHER is the folder of another checkout, for example made by `git worktree add OTHER COMMIT`. Both
builds search with the same seeds, by turns, each with two workers. A search is ended when its
trials are over, because what follows does not change the front. The objectives are held-out loss
and FLOPs per token, of trials that reached the last rung. The reference point does not depend on
the results: its loss is that of the best guess that ignores the input, its FLOPs are 1.1 times
those of the costliest of 1,000 random models. "Busy" is the share of the workers' time, up to the
end of the last trial, in which they train and score. Searches in --store are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archdsl.costs.receipt import cost
from archdsl.lang.load import budget_of, read
from archdsl.lang.spec import Budget
from archdsl.search.space.feasibility import survey
from archdsl.search.stats.paired import paired
from archdsl.search.stats.pareto import Point, hypervolume
from archdsl.search.study.spending import SEARCH
from archdsl.search.study.storage import JOURNAL, journal
from archdsl.search.trials.proxy import default_tasks
from archdsl.sizes import parse_size
from benchmarks.measure import progress
from benchmarks.search.hypervolume import entropy

HERE = Path(__file__).parents[2]
WORKERS = 2
TIMES = 9  # at which the table has the hypervolume
DRAWN = 1000  # random models, of which the costliest sets the reference point

Finished = list[tuple[float, Point]]  # seconds since the start, and objectives, of each trial


def run(build: Path, folder: Path, seed: int, seconds: float, budget: int) -> None:
    """Run a search of a build until its trials are over, unless that was done before."""
    done = folder / "trials-are-over"
    if done.exists():
        return
    options = f"--budget {budget} --time {seconds} --seed {seed} --workers {WORKERS}".split()
    command = [sys.executable, "-m", "archdsl", "search", *options, "--out", str(folder)]
    process = subprocess.Popen(
        command,
        cwd=build,
        env=os.environ | {"PYTHONPATH": str(build)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not _trials_are_over(folder):
            time.sleep(5)
    finally:  # after Ctrl-C, too
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    done.touch()


def _trials_are_over(folder: Path) -> bool:
    """Whether a training of a later phase was recorded."""
    if not (folder / JOURNAL).exists():
        return False
    storage = journal(folder)
    return any(
        phase != SEARCH
        for study in storage.get_all_studies()
        for name, record in storage.get_study_user_attrs(study._study_id).items()
        if name.startswith("worker/")
        for phase in record["phases"]
    )


def finished(folder: Path) -> tuple[Finished, dict[str, Any]]:
    """Return the complete trials of a search in the order of time; counts of outcomes, and more."""
    storage = journal(folder)
    (study,) = storage.get_all_studies()
    attrs = storage.get_study_user_attrs(study._study_id)
    started = min(record["from"] for name, record in attrs.items() if name.startswith("worker/"))
    found: Finished = []
    outcomes: dict[str, int] = {}
    last = started
    for trial in storage.get_all_trials(study._study_id):
        outcome = trial.user_attrs.get("outcome", "unfinished")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == "complete" and trial.values and trial.datetime_complete:
            loss, flops = trial.values
            found.append((trial.datetime_complete.timestamp() - started, (loss, flops)))
        if trial.datetime_complete:
            last = max(last, trial.datetime_complete.timestamp())
    phases = [record["phases"] for name, record in attrs.items() if name.startswith("worker/")]
    busy = sum(spent[SEARCH]["seconds"] for spent in phases) / WORKERS
    return sorted(found), {
        "outcomes": outcomes,
        "seconds": round(last - started, 1),
        "busy": round(busy / (last - started), 3),
    }


def reference(budget: int) -> Point:
    """Return the reference point: weighted entropy of the targets, and FLOPs per token."""
    loss = sum(task.weight * entropy(task, seed=0) for task in default_tasks().values())
    tree = read("search")
    drawn = survey(tree, budget_of(tree, Budget(params=budget)), DRAWN, seed=0).models
    return loss, 1.1 * max(cost(spec).expected for spec in drawn)


def volume(trials: Finished, seconds: float, corner: Point) -> float:
    """Return the hypervolume after so many seconds, as a share of the box."""
    points = [point for at, point in trials if at <= seconds]
    return hypervolume(points, corner) / (corner[0] * corner[1])


def first_time(trials: Finished, wanted: float, corner: Point) -> float | None:
    """Return the seconds after which a hypervolume is reached; None if it never is."""
    return next((at for at, _ in trials if volume(trials, at, corner) >= wanted), None)


def summary(found: dict[str, list[Finished]], seconds: float, corner: Point) -> dict[str, Any]:
    ends = {name: [volume(t, seconds, corner) for t in runs] for name, runs in found.items()}
    times = [seconds * (i + 1) / TIMES for i in range(TIMES)]
    return {
        "reference": corner,
        "times": times,
        "volumes": {
            name: [[volume(t, at, corner) for at in times] for t in runs]
            for name, runs in found.items()
        },
        "end": ends,
        "difference": str(paired(ends["this"], ends["other"])) if len(ends["this"]) > 1 else None,
        "seconds to the other's end": [
            first_time(trials, wanted, corner)
            for trials, wanted in zip(found["this"], ends["other"], strict=True)
        ],
    }


def table(result: dict[str, Any]) -> str:
    lines = ["build  seed  outcomes; hypervolume at " + _row(result["times"], "{:.0f} s")]
    for name, runs in result["volumes"].items():
        for seed, row in enumerate(runs):
            run = result["runs"][name][seed]
            outcomes = ", ".join(f"{n} {what}" for what, n in run["outcomes"].items())
            said = f"{outcomes} in {run['seconds']:.0f} s, {run['busy']:.1%} busy"
            lines.append(f"{name:6} {seed:4}  {_row(row, '{:.4f}')}  {said}")
    reached = ["never" if s is None else f"{s:.0f} s" for s in result["seconds to the other's end"]]
    lines.append(f"this build has the other's last hypervolume after: {', '.join(reached)}")
    lines.append(f"difference at the end (95%): {result['difference']}")
    return "\n".join(lines)


def _row(values: Sequence[float], form: str) -> str:
    return "  ".join(form.format(value) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", type=float, default=540.0, help="seconds of each search")
    parser.add_argument("--budget", type=parse_size, default=parse_size("162M"))
    parser.add_argument("--store", type=Path, default=Path("runs/builds"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    builds = {"other": given.other.resolve(), "this": HERE}
    folders = {
        (name, seed): (given.store / f"{name}-{seed}").resolve()
        for seed in range(given.seeds)
        for name in builds
    }
    for (name, seed), folder in folders.items():
        progress(f"{name} build, seed {seed}")
        run(builds[name], folder, seed, given.time, given.budget)
    every = {key: finished(folder) for key, folder in folders.items()}
    found = {name: [every[name, s][0] for s in range(given.seeds)] for name in builds}
    result = summary(found, given.time, reference(given.budget))
    result["runs"] = {name: [every[name, s][1] for s in range(given.seeds)] for name in builds}
    print(json.dumps(result) if given.json else table(result))


if __name__ == "__main__":
    main()
