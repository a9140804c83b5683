"""Comparison of given models with one of them: train all alike, say which is better."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from archdsl.files import make_folder
from archdsl.lang.load import Source
from archdsl.search.analysis.compare_plan import SEEDS, ComparePlan, compare_plan
from archdsl.search.analysis.compare_setup import (
    CompareSetup,
    Match,
    compare_setup,
    trained_as,
)
from archdsl.search.analysis.comparison import (
    JobResult,
    Key,
    entries_of,
    run_trainings,
    stored_scores,
)
from archdsl.search.report.compare_report import CompareReport, write_report
from archdsl.search.workers.pool import default_workers

STORE = "trainings"  # the folder of the result store


def compare(
    specs: Sequence[Source],
    *,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    match: Match = "none",
    data: str | None = None,
    tasks: Sequence[str] = (),
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    lr: float | Sequence[float] | None = None,
    proxy: str | None = None,
    seeds: int = 5,
    seconds: float | None = None,
    workers: int | None = None,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> CompareReport:
    """Trains models alike and says how much better or worse each is than the reference.

    All of them see the same data in the same order, and parts that they share start from the same
    weights; differences are paired by seed. A script must call this below
    ``if __name__ == "__main__":``, because each worker process imports the script. The same call
    continues after a crash; nothing is trained twice. Ctrl-C ends the trainings and returns what is
    known so far.

    Args:
        specs: At least two specs: paths, shipped names, YAML texts, dicts or specs.
        reference: The name of the model that the others are compared with; None: the first.
        overrides: Values set in every spec, such as ``"context=256"``.
        match: Change the number of layers of each model until its ``"params"``, or the ``"flops"``
            of a forward pass, come closest to those of the reference, at the size that is trained.
        data: The text or skill to train on; None: the embedded corpus and a skill.
        tasks: Further texts or skills; each model is trained on each of them separately.
        tokens: Training tokens on each task; None: those of a proxy of a search.
        context: Tokens of a sequence; None: those of a proxy of a search.
        batch_size: Sequences of a training step; None: those of a proxy of a search.
        lr: The constant learning rate. Of several, each model is compared with the one that gives
            it the lowest held-out loss in a training with another seed.
        proxy: Sizes of the small model trained in place of each, such as ``"dim=64,repeat=2"``;
            ``"none"``: the models themselves.
        seeds: Number of seeds.
        seconds: Start no new training after so long; None: no limit.
        workers: Number of worker processes of one thread each; None: one a core, at most 8.
        memory: Most bytes that a worker may allocate.
        out: Folder of scores, result.json and report.html; None: a folder below ``runs/``.
        storage: URL of a database by which many machines share the trainings.
        tell: Called about twice a second with a sentence on the progress.
        command: Is noted in the result.

    Raises:
        SpecError: A spec or a name given here is wrong.
        ProxyError: The text of ``proxy`` is not understood.
        DataError: Data cannot be loaded.
        StorageError: The database cannot be used.
    """
    lrs = [lr] if isinstance(lr, int | float) else list(lr or ())
    first = min(lrs, default=None)
    how = trained_as(
        proxy, data, tasks, tokens=tokens, context=context, batch_size=batch_size, lr=first
    )
    setup = compare_setup(
        specs, how, reference=reference, overrides=overrides, match=match, lrs=lrs
    )
    return run_compare(
        setup,
        seeds=seeds,
        seconds=seconds,
        workers=workers,
        memory=memory,
        out=out,
        storage=storage,
        tell=tell,
        command=command,
    )


def run_compare(
    setup: CompareSetup,
    *,
    seeds: int,
    seconds: float | None = None,
    workers: int | None = None,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> CompareReport:
    """Run the trainings that have no stored score, and write the result. Arguments: `compare`."""
    folder, name = folder_of(setup, out), _study_name(setup)
    started = time.monotonic()
    choosing = setup.lr_jobs(folder / STORE)
    tried, interrupted = run_trainings(
        choosing, seconds, workers, memory, lambda said: tell(f"lr: {said}"), storage, name
    )
    missing = len(choosing) - len(tried)
    setup = setup if missing else setup.with_lr_results(tried)
    jobs = setup.jobs(seeds, folder / STORE)
    results: dict[Key, JobResult] = {} if missing else dict(stored_scores(jobs))
    if not missing and not interrupted:
        left = None if seconds is None else seconds - (time.monotonic() - started)
        results, interrupted = run_trainings(jobs, left, workers, memory, tell, storage, name)
    report = CompareReport(
        folder,
        setup,
        entries_of(setup.main_specs, setup.role, jobs, results),
        seeds,
        missing + len(jobs) - len(results),
        interrupted,
        command,
    )
    write_report(report)
    return report


def _study_name(setup: CompareSetup) -> str:
    """Return the name of the study that a comparison has in a database."""
    return f"compare-{setup.digest}"


def folder_of(setup: CompareSetup, out: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the results, which is created."""
    folder = Path(out) if out else Path("runs") / _study_name(setup)
    make_folder(folder)
    return folder


def plan_compare(
    setup: CompareSetup,
    *,
    seeds: int,
    workers: int | None = None,
    memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ComparePlan:
    """Forecast a comparison from the first part of its trainings with three seeds.

    The comparison goes on from these trainings, where it has one learning rate. Arguments:
    `compare`. Raises KeyboardInterrupt.
    """
    jobs = setup.jobs(SEEDS, folder_of(setup, out) / STORE, first_part=True)
    results, interrupted = run_trainings(
        jobs, None, workers, memory, tell, storage, _study_name(setup)
    )
    if interrupted:
        raise KeyboardInterrupt
    return compare_plan(setup, jobs, results, seeds, workers or default_workers())
