"""The overhead of a search: all that it costs besides training.

python -m benchmarks.search_overhead [--trials 200] [--time 9m] [--json] [--small]

It measures:

- the CPU seconds of proposing and recording a trial as the study grows, with invented scores;
- of the trainings of a proxy, the share of CPU time that is not training or scoring;
- the memory of the coordinator and of the server that workers are forked from, over many trials
  with very short trainings;
- in a search of the default space, the share of the workers' time that is not training or scoring.

Before that it checks that equal jobs have equal scores, and that tokens are memory-mapped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from archdsl.data.loading import TextData
from archdsl.lang.load import budget_of, load, read
from archdsl.search.trials import proxy_training
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore
from archdsl.search.workers.pool import process_pool
from archdsl.training.trainer import Trainer
from benchmarks.measure import NotEqual, arguments, bar, progress, record

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

RUNGS = 2
WORKERS = 2
BAR = 0.02
SPECS = ("transformer", "itt")  # the least and nearly the most to train
accounted = 0.0  # CPU seconds of this process, up to the end of its last job
HARDLY_ANY = ["--proxy", "dim=8,head_size=4,steps=3", "--data", "skill:p-hop,hops=1,length=8"]


@dataclass(frozen=True)
class Timed:
    """A job that also returns how its process spent the CPU time."""

    job: Job

    def run(self, heartbeat: Callable[[], None]) -> tuple[ProxyScore, dict[str, float]]:
        global accounted
        taken: dict[str, float] = defaultdict(float)
        with _timed(Trainer, "run", taken), _timed(proxy_training, "held_out", taken):
            score = self.job.run(heartbeat)
        taken["process"] = time.process_time() - accounted  # of the first also since the fork
        accounted = time.process_time()
        return score, dict(taken)

    def smaller(self) -> None:
        return None


@contextmanager
def _timed(owner: Any, name: str, taken: dict[str, float]) -> Iterator[None]:
    """Add the CPU seconds of calls of a function to ``taken`` until the block ends."""
    function = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **options)
        finally:
            taken[name] += time.process_time() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


def job_shares(folder: Path, proxy: Proxy, specs: Sequence[str]) -> dict[str, float]:
    """Return for each spec the share of CPU time that is not training or scoring.

    Each rung runs twice, in two stores. Raises NotEqual where its scores differ.
    """
    shares = {}
    with process_pool(1) as pool:
        for name in specs:
            seconds = {"run": 0.0, "held_out": 0.0, "process": 0.0}
            for task in proxy.tasks.values():
                small = proxy.shrink(load(name), task)
                for rung in task.rungs:
                    jobs = [task.job(folder / store, small, 0, rung) for store in ("one", "two")]
                    results = [pool.submit(Timed(job)).result() for job in jobs]
                    if _found(results[0][0]) != _found(results[1][0]):
                        raise NotEqual(f"not equal: scores of {name} after {rung} steps")
                    for _, taken in results:
                        seconds = {key: seconds[key] + taken[key] for key in seconds}
            progress(f"equal: the scores of {name}, trained twice")
            trained = seconds["run"] + seconds["held_out"]
            shares[name] = 1 - trained / seconds["process"]
    return shares


def _found(score: ProxyScore) -> dict[str, Any]:
    """Return the score without its measurements of the machine."""
    return score.model_dump(exclude=proxy_training.OF_THE_MACHINE)


def check_mapped(proxy: Proxy) -> None:
    """Raise NotEqual unless the tokens of the text are memory-mapped."""
    data = proxy.tasks["text"].load()
    assert isinstance(data, TextData)
    if not all(isinstance(tokens, np.memmap) for tokens in data.tokens.values()):
        raise NotEqual("not equal: tokens lie in memory, not in a mapped file")
    progress("equal: the tokens of every split lie in a mapped file")


def trial_seconds(storage: BaseStorage, trials: int) -> list[float]:
    """Return the CPU seconds of each trial of the default space, without its training."""
    # imported here, because every worker imports this module, and workers do not import optuna
    from archdsl.search.study.sampler import TrialSampler
    from archdsl.search.study.study import Study
    from benchmarks.search.strategies import WINDOW

    tree = read("search")
    study = Study(
        storage, "overhead", TrialSampler(tree, budget_of(tree), 2, 0), ("loss", "flops"), WINDOW
    )
    rng = Random(0)
    taken: list[float] = []
    while len(taken) < trials:
        started = time.process_time()  # neighbours do not count
        trial = study.take(lambda number: True)
        assert trial is not None
        for rung in range(1, RUNGS + 1):
            score = _score(rung, rng.random())
            values = (3.0 - rung / 2 + score.seconds, 1e9 * rng.random())
            trial = study.record_rung(trial, {"text": score, "skill": score}, values)
            if rung == RUNGS:
                study.finish(trial, "complete", values)
            elif not study.is_promoted(trial):
                study.finish(trial, "pruned")
                break
        taken.append(time.process_time() - started)
    return taken


def _score(rung: int, luck: float) -> ProxyScore:
    """Return a score of realistic size, with a curve of 50 points."""
    curve = tuple((step, 3.0 / step) for step in range(1, 51))
    return ProxyScore(
        steps=50 * rung, loss=3.0, accuracy=0.2, bits_per_byte=None, seconds=luck, curve=curve
    )


@dataclass(frozen=True)
class Watched:
    """A search by the command line: its result, and the memory in bytes twice a second."""

    result: dict[str, Any]
    seconds: float
    coordinator: list[int]
    server: list[int]

    def outside(self, seconds: float) -> float:
        """Return the share of the workers' time that was not training or scoring."""
        return 1 - self.result["spent"]["worker_seconds"] / (WORKERS * seconds)


def watched(folder: Path, *given: str) -> Watched:
    folder.mkdir()
    words = [sys.executable, "-m", "archdsl", "search", "--json", "--out", str(folder / "run")]
    started, coordinator, server = time.perf_counter(), [], []
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [*words, "--workers", str(WORKERS), *given],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            coordinator.append(_resident(process.pid))
            server.append(max(map(_resident, _children(process.pid)), default=0))
            time.sleep(0.5)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read())
    result = json.loads((folder / "run" / "result.json").read_text())
    return Watched(result, seconds, coordinator, server)


def _resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _children(pid: int) -> list[int]:
    """Return the child processes of a coordinator: the server and the resource tracker."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


def growth(held: list[int]) -> dict[str, float]:
    """Return the MB after a tenth and half of the time, and shortly before the end."""
    return {f"at {share:.0%}": held[int(share * len(held))] / 1e6 for share in (0.1, 0.5, 0.95)}


def main() -> None:
    from archdsl.search.study.storage import journal

    args = arguments(
        __doc__,
        trials={"type": int, "help": "of a study, and of a search with very short trainings"},
        time={"help": "of a search of the default space (default: 9m; with --small, none)"},
    )
    trials = args.trials or (10 if args.small else 200)
    proxy = Proxy.parse("dim=16,head_size=8,steps=12" if args.small else None)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_mapped(proxy)
        shares = job_shares(folder / "jobs", proxy, SPECS[:1] if args.small else SPECS)
        figures |= {f"{name}: CPU besides training": share for name, share in shares.items()}
        taken = trial_seconds(journal(folder), trials)
        quarter = max(1, trials // 4)
        figures["CPU s of a trial, first quarter"] = fmean(taken[:quarter])
        figures["CPU s of a trial, last quarter"] = fmean(taken[-quarter:])

        short = 2 if args.small else trials
        many = watched(folder / "many", *HARDLY_ANY, "--trials", str(short), "--time", "1h")
        figures[f"coordinator, MB, {short} trials"] = growth(many.coordinator)
        figures[f"server, MB, {short} trials"] = growth(many.server)

        if length := args.time or (None if args.small else "9m"):
            real = watched(folder / "real", "--time", length)
            outside = real.outside(real.seconds)
            figures[f"search of {length}, outside training"] = outside
            during = real.outside(real.result["spent"]["wall_seconds"])
            figures[f"search of {length}, without start and report"] = during
            figures["verdict"] = bar(outside, BAR)
    record("search_overhead", {"trials": trials, "workers": WORKERS}, figures, args)


if __name__ == "__main__":
    main()
