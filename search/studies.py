"""The studies that there are: those of folders, and those of a database."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archdsl.errors import ArchdslError
from archdsl.files import read_json
from archdsl.lang.budget import LIMITS
from archdsl.search.report.report import best, on_front, row
from archdsl.search.study.record import StudyRecord, Trial
from archdsl.search.study.spending import SpendingSummary, spending_summary
from archdsl.search.study.storage import database, exclusive, journal

RUNS = Path("runs")


class StudyError(ArchdslError):
    """A study that there is not, or that does not hold what was asked for."""

    exit_status = 2


@dataclass(frozen=True)
class ListedStudy:
    """A study and where it is: a folder, or a database if ``folder`` is None."""

    record: StudyRecord
    folder: Path | None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def spending(self) -> SpendingSummary:
        return spending_summary(self.record.storage, self.record.id)

    def as_json(self) -> dict[str, Any]:
        finished = self.record.finished()
        top = best(finished)
        return {
            "name": self.name,
            "folder": str(self.folder) if self.folder else None,
            "objective": list(self.record.axes),
            "outcomes": self.record.outcomes(),
            "under_way": self.record.unfinished,
            "best": {"trial": top[0].number, "loss": top[0].value} if top else None,
            "front": [trial.number for trial in on_front(finished)],
            "spent": self.spending.as_json(),
        }

    def result(self) -> dict[str, Any] | None:
        """The last report, if it has one."""
        if self.folder is None or not (self.folder / "result.json").exists():
            return None
        return read_json(self.folder / "result.json", StudyError)


def studies(runs: Path = RUNS, storage: str | None = None) -> Iterator[ListedStudy]:
    """All of a database, or of the folders in ``runs``, which may be one itself."""
    if storage is not None:
        backend = database(storage)
        for found in sorted(backend.get_all_studies(), key=lambda study: study.study_name):
            settings = found.user_attrs.get("settings", {})
            if axes := settings.get("objective"):
                yield ListedStudy(StudyRecord(backend, found.study_name, tuple(axes)), None)
        return
    for file in sorted({*runs.glob("settings.json"), *runs.glob("*/settings.json")}):
        settings = read_json(file, StudyError)
        if "objective" in settings and (file.parent / "study.journal").exists():
            axes = tuple(settings["objective"])
            yield ListedStudy(
                StudyRecord(journal(file.parent), settings["name"], axes), file.parent
            )


def study(name: str, storage: str | None = None) -> ListedStudy:
    """By name, or by folder; what a name begins with is enough where only one does."""
    folder = Path(name)
    if storage is None and (folder / "settings.json").exists():
        return next(studies(folder))
    every = list(studies(storage=storage))
    found = [one for one in every if one.name == name] or [
        one for one in every if one.name.startswith(name)
    ]
    if len(found) == 1:
        return found[0]
    where = "the database" if storage else f"{RUNS}/"
    said = "is no folder of a study, and " if storage is None else ""
    known = ", ".join(one.name for one in found or every) or "no study"
    raise StudyError(f"{name} {said}names {len(found)} studies of {where}, which has {known}")


def best_within(trials: Sequence[Trial], limits: Mapping[str, int | None]) -> Trial:
    """The lowest loss within limits on the cost of the model; raises StudyError."""
    from archdsl.costs.receipt import cost

    given = {name: limit for name, limit in limits.items() if limit is not None}
    for trial in best(trials):
        receipt = cost(trial.spec)
        if all(LIMITS[name].spent(receipt) <= limit for name, limit in given.items()):
            return trial
    if not best(trials):
        raise StudyError("no draw of this study has reached the last rung yet")
    raise StudyError("no draw that reached the last rung keeps to these limits")


def export(listed: ListedStudy, form: str) -> str:
    """Every draw, as CSV (a column for each choice) or as a JSON object per line."""
    rows = [row(trial) for trial in listed.record.finished()]
    if form == "jsonl":
        return "".join(f"{json.dumps(found, sort_keys=True)}\n" for found in rows)
    flat = [_flat(found) for found in rows]
    columns = list(dict.fromkeys(name for found in flat for name in found))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    values = {f"value.{axis}": value for axis, value in (found["values"] or {}).items()}
    last = {
        f"{task}.{name}": score[name]
        for task, score in (found["rungs"][-1] if found["rungs"] else {}).items()
        for name in ("steps", "loss", "accuracy")
    }
    return plain | values | last | {f"choice.{k}": v for k, v in found["choices"].items()}


def remove(listed: ListedStudy) -> None:
    """With all that it trained inside its folder. Raises StorageError if it is being searched."""
    if listed.folder is None:
        listed.record.storage.delete_study(listed.record.id)
        return
    with exclusive(listed.folder):
        shutil.rmtree(listed.folder)
