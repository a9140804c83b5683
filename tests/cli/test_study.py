"""study: what searches have found, listed, shown and taken along."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from archdsl.lang.load import load
from archdsl.search.study.storage import exclusive
from tests.cli.command import Cli
from tests.search.test_search import SPACE, go


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "small.yaml").write_text(SPACE)
    go(folder / "small.yaml", folder / "runs" / "small", trials=3)
    return folder


@pytest.fixture
def there(searched: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(searched)
    return Path("runs/small")


def test_studies_are_listed(cli: Cli, there: Path) -> None:
    (found,) = json.loads(cli("study", "ls", "--json").out)
    assert found["folder"] == str(there)
    assert found["outcomes"] == {"complete": 3}
    assert found["spent"]["train_flops"] > 0
    assert found["name"] in cli("study", "ls").out
    assert cli("study", "ls", "elsewhere").out == "no studies in elsewhere\n"


def test_a_study_goes_by_its_folder_and_by_how_its_name_begins(cli: Cli, there: Path) -> None:
    by_folder, by_name = cli("study", "show", str(there)), cli("study", "show", "small-")
    assert by_folder.status == by_name.status == 0
    assert by_folder.out == by_name.out
    assert "Pareto front" in by_folder.out
    found = cli("study", "show", "nope")
    assert (found.status, found.out) == (2, "")
    assert "nope" in found.err


def test_the_best_keeps_to_the_limits(cli: Cli, there: Path, tmp_path: Path) -> None:
    result = json.loads((there / "result.json").read_text())
    rows = {row["trial"]: row for row in result["trials"]}
    cheapest = min(rows.values(), key=lambda row: row["flops_per_token"])
    limit = int(cheapest["flops_per_token"]) + 1
    (tmp_path / "best.yaml").write_text(cli("study", "best", "small", "--flops", str(limit)).out)
    (tmp_path / "top.yaml").write_text(cli("study", "best", "small").out)
    assert load(tmp_path / "best.yaml").fingerprint() == cheapest["fingerprint"]
    assert load(tmp_path / "top.yaml").fingerprint() == rows[result["winner"]]["fingerprint"]
    found = cli("study", "best", "small", "--flops", "1")
    assert (found.status, found.out) == (2, "")


def test_draws_are_exported(cli: Cli, there: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("study", "export", "small").out)))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["value.loss"]) == pytest.approx(float(rows[0]["skill.loss"]))
    out = tmp_path / "draws.jsonl"
    assert cli("study", "export", "small", "--as", "jsonl", "--out", str(out)).status == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["spec"] for line in lines] == [row["spec"] for row in rows]


def test_a_study_is_deleted_unless_somebody_searches(
    cli: Cli, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(searched / "small.yaml", tmp_path / "runs" / "gone", trials=1)
    monkeypatch.chdir(tmp_path)
    with exclusive(Path("runs/gone")):
        assert cli("study", "rm", "runs/gone", "--yes").status == 2
    assert Path("runs/gone/winner.yaml").exists()
    assert cli("study", "rm", "runs/gone", "--yes").status == 0
    assert not Path("runs/gone").exists()
