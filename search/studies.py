"""Finds, exports and deletes studies in folders or in a database."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.storages import BaseStorage

from archdsl.errors import ArchdslError
from archdsl.files import MISSING, read_json, why_unreadable
from archdsl.lang.budget import LIMITS
from archdsl.reports.notebook import as_html
from archdsl.search.report.report import best, front_trials, trial_row
from archdsl.search.study.record import StudyRecord, trainings_of
from archdsl.search.study.settings import SETTINGS
from archdsl.search.study.spending import SpendingSummary, spending_summary
from archdsl.search.study.storage import JOURNAL, database, exclusive, journal
from archdsl.search.study.stored import FolderSettings, StoredResult, StoredSettings, checked
from archdsl.search.study.trial import Trial

if TYPE_CHECKING:
    from optuna.study._frozen import FrozenStudy

RUNS = Path("runs")


class StudyError(ArchdslError):
    """A study does not exist, or does not have what was asked for."""

    exit_status = 2


@dataclass(frozen=True)
class ListedStudy:
    """A study and its folder; ``folder`` is None if the study is in a database."""

    record: StudyRecord
    folder: Path | None

    @property
    def name(self) -> str:
        """The name of the study, as in its storage."""
        return self.record.name

    @property
    def names(self) -> list[str]:
        """The names by which the study is found: its own, and that of its folder."""
        return _names(self)

    def _repr_html_(self) -> str:
        """Return what ``archdsl study show`` prints, for notebooks."""
        from archdsl.search.report.live import standing

        return as_html(standing(self))

    @property
    def spending(self) -> SpendingSummary:
        """What all workers of the study have spent."""
        return spending_summary(self.record.storage, self.record.id)

    def as_json(self) -> dict[str, Any]:
        """Return the state of the study as JSON values."""
        finished = self.record.finished()
        top = best(finished)
        return {
            "name": self.name,
            "folder": str(self.folder) if self.folder else None,
            "objective": list(self.record.axes),
            "outcomes": self.record.outcomes(),
            "under_way": self.record.unfinished,
            "best": {"trial": top[0].number, "loss": top[0].value} if top else None,
            "front": [trial.number for trial in front_trials(finished)],
            "spent": self.spending.as_json(),
        }

    def result(self) -> dict[str, Any] | None:
        """Return the content of result.json; None if the search has not written one yet.

        Raises StudyError if the file is no JSON, StorageError if it is no result of this study.
        """
        if self.folder is None or not (file := self.folder / "result.json").exists():
            return None
        result = read_json(file, StudyError)
        if (name := checked(StoredResult, result, str(file)).name) != self.name:
            raise StudyError(f"{file}: name: must be {self.name!r}, got {name!r}")
        return result


@dataclass(frozen=True)
class DamagedStudy:
    """A study that cannot be read, and why. ``storage``: the database that it is in, if any."""

    folder: Path | None
    name: str
    error: ArchdslError
    storage: BaseStorage | None = None

    @property
    def names(self) -> list[str]:
        """The names by which the study is found: its own, and that of its folder."""
        return _names(self)

    def as_json(self) -> dict[str, Any]:
        """Return what is known of the study as JSON values."""
        folder = str(self.folder) if self.folder else None
        return {"name": self.name, "folder": folder, "error": str(self.error)}


def _names(one: ListedStudy | DamagedStudy) -> list[str]:
    folder = [one.folder.resolve().name] if one.folder else []
    return list(dict.fromkeys([one.name, *folder]))


def studies(runs: Path = RUNS, storage: str | None = None) -> Iterator[ListedStudy | DamagedStudy]:
    """Yield the studies of a database, or those of the folders in ``runs`` and of ``runs`` itself.

    ``storage`` is the URL of the database. Raises StorageError if it cannot be opened.
    """
    if storage is not None:
        backend = database(storage)
        for found in sorted(backend.get_all_studies(), key=lambda study: study.study_name):
            if "settings" in found.user_attrs:
                yield _in_database(backend, found)
        return
    for file in sorted({*runs.glob(JOURNAL), *runs.glob(f"*/{JOURNAL}")}):
        yield _in_folder(file.parent)


def _in_database(backend: BaseStorage, found: FrozenStudy) -> ListedStudy | DamagedStudy:
    name = found.study_name
    try:
        settings = found.user_attrs["settings"]
        axes = tuple(checked(StoredSettings, settings, f"the settings of {name}").objective)
        record = StudyRecord(backend, name, axes)
        record.check(name)
        return ListedStudy(record, None)
    except ArchdslError as error:
        return DamagedStudy(None, name, error, backend)


def _in_folder(folder: Path) -> ListedStudy | DamagedStudy:
    try:
        if not os.path.lexists(folder / JOURNAL):
            raise StudyError(f"{folder} holds no study: it has no {JOURNAL}")
        file = folder / SETTINGS
        settings = checked(FolderSettings, read_json(file, StudyError), str(file))
        return ListedStudy(_record(folder, settings), folder)
    except ArchdslError as error:
        return DamagedStudy(folder, folder.resolve().name, error)


def _record(folder: Path, settings: FolderSettings) -> StudyRecord:
    storage = journal(folder)
    where = str(folder / JOURNAL)
    try:
        record = StudyRecord(storage, settings.name, tuple(settings.objective))
    except KeyError:
        raise StudyError(f"{where} has no study named {settings.name}") from None
    record.check(where)
    return record


def study(name: str, storage: str | None = None) -> ListedStudy:
    """Return a study by a path, by its name or that of its folder, or by how one of these begins.

    Raises StudyError if there is no such study, or more than one, and the study's own error if it
    is damaged.
    """
    found = find(name, storage)
    if isinstance(found, DamagedStudy):
        raise found.error
    return found


def find(name: str, storage: str | None = None) -> ListedStudy | DamagedStudy:
    """Return a study as `study` does, also if it is damaged.

    Raises StudyError if there is no such study, or more than one.
    """
    folder = Path(name)
    if storage is None and any(os.path.lexists(folder / file) for file in (SETTINGS, JOURNAL)):
        return _in_folder(folder)
    every = list(studies(storage=storage))
    found = [one for one in every if name in one.names] or [
        one for one in every if any(known.startswith(name) for known in one.names)
    ]
    if len(found) == 1:
        return found[0]
    where = "the database" if storage else f"{RUNS}/"
    if found:
        several = ", ".join(str(one.folder or one.name) for one in found)
        raise StudyError(f"{name} means several studies in {where}: {several}")
    known = ", ".join(" in ".join(one.names) for one in every) or "none"
    folder_too = "" if storage else "folder or "
    raise StudyError(f"{name} is no {folder_too}name of a study in {where}; studies: {known}")


def best_within(trials: Sequence[Trial], limits: Mapping[str, int | None]) -> Trial:
    """Return the trial of lowest loss whose model costs at most ``limits`` (None: no limit).

    Raises StudyError if no trial reached the last rung, or none of them keeps the limits.
    """
    from archdsl.costs.receipt import cost

    given = {name: limit for name, limit in limits.items() if limit is not None}
    for trial in best(trials):
        receipt = cost(trial.spec)
        if all(LIMITS[name].spent(receipt) <= limit for name, limit in given.items()):
            return trial
    if not best(trials):
        raise StudyError("no trial of this study has reached the last rung yet")
    raise StudyError("no trial that reached the last rung keeps these limits")


def rows(listed: ListedStudy) -> list[dict[str, Any]]:
    """Return everything that is known of each trial, as JSON values."""
    return [trial_row(trial, listed.record.axes) for trial in listed.record.finished()]


def export(listed: ListedStudy, form: str) -> str:
    """Return all trials as CSV with a column for each choice, or as one JSON object per line.

    ``form`` is ``csv`` or ``jsonl``.
    """
    found = rows(listed)
    if form == "jsonl":
        return "".join(f"{json.dumps(row, sort_keys=True)}\n" for row in found)
    flat = [_flat(row) for row in found]
    columns = list(dict.fromkeys(name for row in flat for name in row))
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


def remove(found: ListedStudy | DamagedStudy) -> None:
    """Delete a study, also a damaged one, and its folder with everything in it.

    Raises StorageError if another process is searching in the folder, StudyError if the folder does
    not look like one of a search, or cannot be deleted.
    """
    if found.folder is None:
        storage = found.storage if isinstance(found, DamagedStudy) else found.record.storage
        assert storage is not None
        with suppress(KeyError):  # no training has been shared
            storage.delete_study(storage.get_study_id_from_name(trainings_of(found.name)))
        storage.delete_study(storage.get_study_id_from_name(found.name))
        return
    if isinstance(found, DamagedStudy) and not _is_of_a_search(found.folder):
        raise found.error
    lock = why_unreadable(found.folder / "lock")  # what is no file can be locked by nobody
    with exclusive(found.folder) if lock in (None, MISSING) else nullcontext():
        try:
            shutil.rmtree(found.folder)
        except OSError as error:
            raise StudyError(f"{error.filename} cannot be deleted: {error.strerror}") from None


def _is_of_a_search(folder: Path) -> bool:
    """Whether a folder has a journal, or at least the settings that a search writes first."""
    if os.path.lexists(folder / JOURNAL):
        return True
    try:
        checked(FolderSettings, read_json(folder / SETTINGS, StudyError), "")
    except ArchdslError:
        return False
    return True
