"""Compare the winner of a search with its baselines again, with more seeds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from archdsl.files import make_folder
from archdsl.search.analysis.ablation import ModelComparison
from archdsl.search.analysis.comparison import comparison_jobs, entries, run_trainings
from archdsl.search.report.report import best
from archdsl.search.studies import ListedStudy, StudyError, study
from archdsl.search.study.record import trainings_of
from archdsl.search.study.storage import HEARTBEAT_SECONDS
from archdsl.search.study.stored import SearchSettings, checked
from archdsl.search.study.trial import Trial

FILE = "confirmed.json"


def confirm(
    name: str,
    *,
    seeds: int,
    storage: str | None = None,
    store: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    workers: int | None = None,
    memory: int | None = None,
    heartbeat: int = HEARTBEAT_SECONDS,
    tell: Callable[[str], None] = lambda _: None,
) -> ModelComparison:
    """Train the winner of a search and its baselines with so many seeds, and compare them.

    ``name``: of the study or its folder. ``storage``: the URL of the database that has it, by which
    many machines share the trainings.
    ``store``: the folder of trained proxies; default: that of the search, so that the seeds of the
    search are not trained again. ``heartbeat``: as of the search. The rest as for
    ``archdsl.compare``.

    The result is written to confirmed.json in the folder of the search; that of a study in a
    database is ``runs/NAME``. Raises StudyError if the search has no winner yet, or its data have
    changed.
    """
    listed = study(name, storage)
    folder = listed.folder or Path("runs") / listed.name
    settings = checked(SearchSettings, listed.record.settings, f"the settings of {listed.name}")
    proxy = settings.proxy
    for task, fingerprint in settings.data.items():
        if task in proxy.tasks and proxy.tasks[task].load().fingerprint != fingerprint:
            raise StudyError(f"{listed.name}: the data of {task} are not those of the search")
    winner = _winner(listed).spec
    make_folder(folder)  # a study in a database may have been searched elsewhere
    first = settings.seed + 1
    jobs = comparison_jobs(
        winner, proxy, range(first, first + seeds), Path(store or folder / "proxies"), ablate=False
    )
    results, interrupted = run_trainings(
        jobs, seconds, workers, memory, tell, storage, trainings_of(listed.name), heartbeat
    )
    missing = len(jobs) - len(results)
    found = entries(winner, jobs, results)
    made = ModelComparison(folder, found, proxy, missing, interrupted, FILE)
    made.write()
    return made


def _winner(listed: ListedStudy) -> Trial:
    """Return the winner that the search reported; the best trial if it has not ended."""
    finished = listed.record.finished()
    if not (ranked := best(finished)):
        raise StudyError(f"{listed.name}: no trial reached the last rung, so there is no winner")
    result = listed.result()
    number = result["winner"] if result else listed.record.winner
    return next((trial for trial in ranked if trial.number == number), ranked[0])
