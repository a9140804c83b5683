"""Comparison of one given model with its baselines and ablations, without a search."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import archdsl
from archdsl.files import make_folder, write_text
from archdsl.lang.load import Source, load
from archdsl.search.analysis.comparison import (
    ComparisonEntry,
    as_json,
    comparison_jobs,
    entries,
    run_trainings,
)
from archdsl.search.analysis.conclusions import ablation_conclusion, conclusion
from archdsl.search.trials.proxy import Proxy, default_tasks

MODEL = "model"  # name of the compared model, which no search has chosen


@dataclass(frozen=True)
class ModelComparison:
    """One model beside its baselines and, from ``ablate``, its ablations.

    ``missing`` is the number of trainings that were not done. ``file``: the file in ``folder`` that
    has the result.
    """

    folder: Path
    entries: list[ComparisonEntry]
    proxy: Proxy
    missing: int
    interrupted: bool
    file: str = "result.json"

    def write(self) -> None:
        """Write the result to its file."""
        write_text(self.folder / self.file, json.dumps(self.as_json(), indent=1))

    def as_json(self) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            "verdict": conclusion(self.entries, self.proxy),
            "what_matters": ablation_conclusion(self.entries, self.proxy),
            "entries": as_json(self.entries, self.proxy),
            "proxy": self.proxy.model_dump(mode="json"),
            "missing": self.missing,
            "interrupted": self.interrupted,
            "version": archdsl.__version__,
        }


def ablate(
    spec: Source,
    *,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    seeds: int = 3,
    seconds: float | None = None,
    workers: int | None = None,
    out: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ModelComparison:
    """Train proxies of a model, of its baselines and of its ablations, and compare their losses.

    An ablation is the model without one of its parts. ``seconds`` is the time after which no
    further training starts (None: no limit). ``workers`` is the number of processes of one thread
    each (default: the number of cores, at most 8). ``out`` (default: a folder below runs/) receives
    the scores and result.json; a call with the same ``out`` continues where the last one stopped.
    ``storage`` is the URL of a database by which many machines share the trainings. ``tell`` is
    called about twice a second with a sentence on the progress. Ctrl-C ends the trainings and
    returns what is known so far. Raises SpecError if the spec is wrong, and StorageError if the
    database cannot be used.
    """
    model, proxy = load(spec, overrides=overrides), proxy or Proxy(tasks=default_tasks())
    folder = Path(out) if out else Path("runs") / f"{model.name}-ablation"
    make_folder(folder)
    jobs = comparison_jobs(model, proxy, range(1, 1 + seeds), folder / "proxies", ablate=True)
    study = f"ablate-{model.fingerprint()[:8]}"
    results, interrupted = run_trainings(jobs, seconds, workers, None, tell, storage, study)
    found = [
        replace(entry, name=MODEL) if entry.role == "winner" else entry
        for entry in entries(model, jobs, results)
    ]
    made = ModelComparison(folder, found, proxy, len(jobs) - len(results), interrupted)
    made.write()
    return made
