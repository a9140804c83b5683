"""study: what searches have found, listed, shown and taken along."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archdsl.lang.load import load
from archdsl.search.study.storage import exclusive
from tests.cli.command import Cli
from tests.search.test_search import SPACE, go
from tests.test_files import no_file_above


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


def test_a_study_goes_by_the_name_of_its_folder_too(
    cli: Cli, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = cli("study", "ls", "--json").json
    listed = cli("study", "ls").out
    assert listed.split()[:2] == ["study", "folder"]
    assert re.search(rf"^{found['name']} +{there} ", listed, re.MULTILINE)
    for name in ("small", found["name"], f"./{there}", there.absolute(), "sma"):
        assert cli("study", "best", name).status == 0, name
    for folder in ("first", "firsts"):
        shutil.copytree(there, tmp_path / "runs" / folder)
    monkeypatch.chdir(tmp_path)
    assert cli("study", "show", "first").status == 0
    for name in (found["name"], "fir"):
        refused = cli("study", "show", name)
        assert refused.status == 2
        assert refused.err == (f"{name} means several studies in runs/: runs/first, runs/firsts\n")


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_shows_studies_whole(
    cli: Cli, there: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    (told,) = cli("study", "ls", "--json").json
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (["ls"], ["show", "small"]):
        shown = cli("study", *command).out
        assert max(map(len, shown.splitlines())) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown
        assert told["name"] in shown
        assert str(there) in shown
        assert f"{told['best']['loss']:.3f}" in shown


def test_the_best_and_all_trials_as_json(cli: Cli, there: Path, tmp_path: Path) -> None:
    result = json.loads((there / "result.json").read_text())
    best = cli("study", "best", "small", "--json").json
    assert best["trial"] == result["winner"]
    assert load(best["spec"]).fingerprint() == best["fingerprint"]
    assert cli("study", "export", "small", "--json").json == result["trials"]
    out = tmp_path / "trials.csv"
    written = cli("study", "export", "small", "--json", "--out", out).json
    assert written == {"file": str(out), "trials": len(result["trials"])}
    assert out.read_text() == cli("study", "export", "small").out
    refused = cli("study", "export", "small", "--json", "--as", "csv")
    assert (refused.status, refused.out) == (2, "")


def test_trials_are_exported(cli: Cli, there: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("study", "export", "small").out)))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["value.loss"]) == pytest.approx(float(rows[0]["skill.loss"]))
    out = tmp_path / "trials.jsonl"
    assert cli("study", "export", "small", "--as", "jsonl", "--out", str(out)).status == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["spec"] for line in lines] == [row["spec"] for row in rows]


def change_settings(folder: Path, change: dict[str, Any]) -> None:
    (folder / "settings.json").write_text(json.dumps(change))


def change_journal(folder: Path, old: bytes, new: bytes) -> None:
    file = folder / "study.journal"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: change_settings(f, {}), "settings.json: objective: is required"),
        (lambda f: change_settings(f, {"objective": ["loss"]}), "settings.json: name: is required"),
        (
            lambda f: change_settings(f, {"name": 1, "objective": ["loss"]}),
            "settings.json: name: must be text, got 1",
        ),
        (
            lambda f: change_settings(f, {"name": "a", "objective": "loss"}),
            "settings.json: objective: must be a list of names that begins with loss, got 'loss'",
        ),
        (
            lambda f: change_settings(f, {"name": "a", "objective": ["flops", "loss"]}),
            "settings.json: objective: must be a list of names that begins with loss, got a list",
        ),
        (
            lambda f: change_journal(f, b'"outcome":"', b'"outcome":"un'),
            "study.journal: trial record 0: outcome: must be ",
        ),
        (
            lambda f: change_settings(f, {"name": "a", "objective": ["loss", "flops"]}),
            "study.journal has no study named a",
        ),
        (lambda f: (f / "settings.json").write_text("["), "settings.json cannot be read: "),
        (lambda f: (f / "settings.json").unlink(), "runs/bad has no settings.json"),
        (lambda f: (f / "study.journal").write_text("garbage\n"), "study.journal: line 1: must be"),
        (
            lambda f: change_journal(f, b'"draw":1', b'"draw":"1"'),
            "study.journal: trial record 1: draw: must be a whole number, got '1'",
        ),
        (
            lambda f: change_journal(f, b'"draw":1', b'"draw":7'),
            "study.journal: trial 1 is missing",
        ),
        (
            lambda f: change_journal(f, b'"fingerprint":', b'"finger":'),
            "study.journal: trial record 0: fingerprint: is required",
        ),
        (
            lambda f: change_journal(f, b'"rungs":"[', b'"rungs":"'),
            "study.journal: trial record 0: rungs: must be the text of a JSON list",
        ),
        (
            lambda f: change_journal(f, b'"phases":{', b'"phasis":{'),
            "phases: is required",
        ),
    ],
)
def test_a_damaged_study_is_a_row_that_says_so_and_the_others_are_listed(
    cli: Cli,
    there: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    complaint: str,
) -> None:
    for name in ("bad", "good"):
        shutil.copytree(there, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    damage(Path("runs/bad"))
    bad, good = json.loads(cli("study", "ls", "--json").out)
    assert bad["folder"] == "runs/bad"
    assert re.match(r"runs/bad(/settings.json|/study.journal| has no)", bad["error"])
    assert complaint in bad["error"]
    assert good["outcomes"] == {"complete": 3}
    assert "cannot be read" in (shown := cli("study", "ls")).out
    assert shown.status == 0
    for command in ("show", "best", "export"):
        found = cli("study", command, "runs/bad")
        assert (found.status, found.out, found.err) == (2, "", bad["error"] + "\n")
        assert cli("study", command, "small-").status == 0
    assert cli("study", "rm", "runs/bad", "--yes").status == 0
    assert not Path("runs/bad").exists()


def test_only_folders_of_searches_are_deleted(
    cli: Cli, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (there / "settings.json").read_text()
    monkeypatch.chdir(tmp_path)
    for name, content in (("editor", '{"tab": 4}'), ("begun", settings)):
        Path(name).mkdir()
        Path(name, "settings.json").write_text(content)
    found = cli("study", "rm", "editor", "--yes")
    assert (found.status, found.err) == (2, "editor holds no study: it has no study.journal\n")
    assert Path("editor").exists()
    assert cli("study", "rm", "begun", "--yes").status == 0
    assert not Path("begun").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "other"}, r"name: must be 'small-\w+', got 'other'"),
        ({"verdict": None}, "verdict: must be text, got nothing"),
        ({"trust_sentence": 3}, "trust_sentence: must be text, got 3"),
        (None, "name: is required"),
    ],
)
def test_the_result_of_something_else_is_not_shown(
    cli: Cli, there: Path, tmp_path: Path, change: dict[str, Any] | None, complaint: str
) -> None:
    folder = Path(shutil.copytree(there, tmp_path / "run"))
    result = json.loads((folder / "result.json").read_text())
    changed = {} if change is None else result | change
    (folder / "result.json").write_text(json.dumps(changed))
    for options in ([], ["--json"]):
        found = cli("study", "show", str(folder), *options)
        assert (found.status, found.out) == (2, "")
        assert re.fullmatch(rf"{folder}/result.json: {complaint}\n", found.err), found.err


def test_a_full_disk_ends_an_export_with_a_line(cli: Cli, there: Path, tmp_path: Path) -> None:
    with no_file_above(100):
        found = cli("study", "export", "small", "--out", str(tmp_path / "out.csv"))
    assert found.status == 1
    assert found.err == f"{tmp_path}/out.csv could not be written: File too large\n"
    assert not list(tmp_path.iterdir())


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
