"""What a search costs besides training.

python -m benchmarks.search.overhead [--draws 200] [--time 9m] [--json]

CPU seconds of drawing, fitting and telling per draw as the history grows, with scores that are made
up; seconds of a child process around its work; memory of the coordinator over as many trials of
hardly any training; and in a search of the default space, the share of the workers' time that was
not training or scoring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from optuna.storages import BaseStorage

from archdsl.load import budget_of, read
from archdsl.search.draws import Draws
from archdsl.search.pool import processes
from archdsl.search.proxy import Score
from archdsl.search.storage import journal
from archdsl.search.study import Study
from benchmarks.search.strategies import WINDOW

RUNGS = 2
WORKERS = 2
HARDLY_ANY = ["--proxy", "dim=8,head_size=4,steps=3", "--data", "skill:p-hop,hops=1,length=8"]


@dataclass(frozen=True)
class Nothing:
    """Work that is none."""

    def run(self, beat: object) -> float:
        return time.time()

    def smaller(self) -> None:
        return None


def draw_seconds(storage: BaseStorage, draws: int) -> list[float]:
    """Of each draw of the default space: everything but the training."""
    tree = read("search")
    study = Study(
        storage, "overhead", Draws(tree, budget_of(tree), 2, 0), ("loss", "flops"), WINDOW
    )
    rng = Random(0)
    taken: list[float] = []
    while len(taken) < draws:
        started = time.process_time()  # neighbours do not count
        trial = study.take(lambda number: True)
        assert trial is not None
        for rung in range(1, RUNGS + 1):
            score = _score(rung, rng.random())
            values = (3.0 - rung / 2 + score.seconds, 1e9 * rng.random())
            study.climbed(trial, {"text": score, "skill": score}, values)
            if rung == RUNGS:
                study.close(trial, "complete", values)
            elif not study.goes_on(trial, values):
                study.close(trial, "pruned")
                break
        taken.append(time.process_time() - started)
    return taken


def _score(rung: int, luck: float) -> Score:
    """As large as a real one: a curve of 50 points."""
    curve = tuple((step, 3.0 / step) for step in range(1, 51))
    return Score(
        steps=50 * rung, loss=3.0, accuracy=0.2, bits_per_byte=None, seconds=luck, curve=curve
    )


def child_seconds(children: int = 20) -> float:
    """From handing work over to having its result, the work itself being nothing."""
    with processes(1) as pool:
        pool.submit(Nothing()).result()  # starts the server that children are forked from
        started = time.perf_counter()
        for _ in range(children):
            pool.submit(Nothing()).result()
        return (time.perf_counter() - started) / children


@dataclass(frozen=True)
class Watched:
    """A search by the command line: its result, and what its coordinator held twice a second."""

    result: dict[str, Any]
    seconds: float
    bytes_held: list[int]

    def outside(self, seconds: float) -> float:
        """Share of the workers' time that went into no training or scoring."""
        return 1 - self.result["spent"]["worker_seconds"] / (WORKERS * seconds)


def watched(folder: Path, *given: str) -> Watched:
    words = [sys.executable, "-m", "archdsl", "search", "--json", "--out", str(folder / "run")]
    started, held = time.perf_counter(), []
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [*words, "--workers", str(WORKERS), *given],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            held.append(_resident(process.pid))
            time.sleep(0.5)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read())
    return Watched(json.loads((folder / "run" / "result.json").read_text()), seconds, held)


def _resident(pid: int) -> int:
    """Bytes; 0 of a process that has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="what a search costs besides training")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--time", default="9m", help="for the search of the default space")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taken = draw_seconds(journal(folder), given.draws)
        for first in range(0, given.draws, max(1, given.draws // 4)):
            part = taken[first : first + given.draws // 4]
            figures[f"draws {first} to {first + len(part)}, CPU s each"] = fmean(part)
        figures["child process around its work, s"] = child_seconds()

        (folder / "many").mkdir()
        many = watched(folder / "many", *HARDLY_ANY, "--trials", str(given.draws), "--time", "1h")
        for share in (0.1, 0.25, 0.5, 0.75, 0.95):
            held = many.bytes_held[int(share * len(many.bytes_held))]
            figures[f"coordinator at {share:.0%} of {given.draws} trials' time, MB"] = held / 1e6

        (folder / "real").mkdir()
        real = watched(folder / "real", "--time", given.time)
        figures[f"default search of {given.time}, s"] = real.seconds
        figures["its share outside training"] = real.outside(real.seconds)
        figures["without start and report"] = real.outside(real.result["spent"]["wall_seconds"])
    if given.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:48} {value:10.3f}")


if __name__ == "__main__":
    main()
