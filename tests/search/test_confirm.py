"""The winner of a search is compared again, with more seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from archdsl.search.analysis.comparison import winner_of
from archdsl.search.confirm import confirm
from archdsl.search.report.report import best
from archdsl.search.studies import StudyError, remove, studies, study
from archdsl.search.study.shared_jobs import shared_jobs
from archdsl.search.study.storage import database
from tests.cli.test_ablate import Pool
from tests.search.test_search import go, scores, space

__all__ = ["space"]


def train_at_most(monkeypatch: pytest.MonkeyPatch, trainings: int) -> None:
    @contextmanager
    def pool(workers: int, memory: int | None = None) -> Iterator[Pool]:
        yield Pool(trainings)

    monkeypatch.setattr("archdsl.search.analysis.comparison.process_pool", pool)


def test_seeds_are_added_to_those_of_the_search(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    report = go(space, out, trials=3)
    before = scores(out)
    rivals = [entry.name for entry in report.entries if entry.role != "ablation"]
    train_at_most(monkeypatch, len(rivals))
    found = confirm(str(out), seeds=3)
    assert [entry.name for entry in found.entries] == rivals
    own, known = winner_of(found.entries), winner_of(report.entries)
    assert own is not None
    assert known is not None
    assert own.spec == report.top.spec
    assert own.losses("skill")[:2] == known.losses("skill")
    assert len(own.losses("skill")) == 3
    assert before.items() <= scores(out).items()
    written = json.loads((out / "confirmed.json").read_text())
    assert (written, found.missing) == (found.as_json(), 0)


def test_machines_share_what_follows_the_trials_by_the_database(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'db'}"
    first = go(space, tmp_path / "a", trials=3, seconds=None, storage=url)
    again = go(space, tmp_path / "b", trials=3, seconds=None, storage=url)
    assert scores(tmp_path / "a")
    assert not scores(tmp_path / "b")
    assert [entry.scores for entry in again.entries] == [entry.scores for entry in first.entries]
    rivals = [entry for entry in first.entries if entry.role != "ablation"]
    monkeypatch.chdir(tmp_path)  # where runs/ is
    heartbeats = []

    def opened(url: str | None, study: str, jobs: Any, heartbeat: int) -> Any:
        heartbeats.append(heartbeat)
        return shared_jobs(url, study, jobs, heartbeat)

    monkeypatch.setattr("archdsl.search.analysis.comparison.shared_jobs", opened)
    (name,) = (found.name for found in studies(storage=url))
    train_at_most(monkeypatch, len(rivals))  # one seed more
    found = confirm(name, seeds=3, storage=url, store=tmp_path / "c", heartbeat=7)
    assert (len(found.entries), found.missing, heartbeats) == (len(rivals), 0, [7])
    remove(study(name, url))
    assert not database(url).get_all_studies()


def test_the_winner_is_the_reported_one_also_without_a_folder(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With supernets that need not be the trial with the lowest loss."""
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path / 'db'}"
    second = lambda trials, validation: best(trials)[1]  # noqa: E731
    monkeypatch.setattr("archdsl.search.engine.winning_trial", second)
    report = go(space, tmp_path / "a", trials=3, seconds=None, storage=url)
    (name,) = (found.name for found in studies(storage=url))
    train_at_most(monkeypatch, 0)
    found = winner_of(confirm(name, seeds=2, storage=url).entries)
    assert found is not None
    assert found.spec == best(report.trials)[1].spec


def test_other_data_confirm_nothing(space: Path, tmp_path: Path) -> None:
    go(space, tmp_path / "run", trials=3, seconds=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archdsl.data.loading.SkillData.fingerprint", "other")
        with pytest.raises(StudyError, match="the data of skill are not those of the search"):
            confirm(str(tmp_path / "run"), seeds=2)
