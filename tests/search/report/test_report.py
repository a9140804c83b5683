"""The report: which trial wins, what is on the front, and what the files say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import archdsl
from archdsl.lang.load import load
from archdsl.reports.notebook import as_text
from archdsl.reports.tables import short
from archdsl.search.analysis.comparison import differences
from archdsl.search.analysis.supernet_validation import SupernetPoint, SupernetValidation
from archdsl.search.report.live import result
from archdsl.search.report.report import (
    SearchReport,
    best,
    front_trials,
    trial_row,
    winning_trial,
    write_report,
)
from archdsl.search.stats.paired import kendall_tau
from archdsl.search.study.trial import Trial
from tests.search.results import made_up_report

TINY = archdsl.load("tiny")


def trial(number: int, loss: float | None, flops: float = 1.0) -> Trial:
    spec = TINY.patch("blocks.1.steps", number + 1)
    values = None if loss is None else {"loss": loss, "flops": flops}
    outcome = "pruned" if loss is None else "complete"
    return Trial(
        number,
        {},
        spec_yaml=spec.to_yaml(),
        fingerprint=spec.fingerprint(),
        outcome=outcome,
        values=values,
    )


def validation(*own: tuple[int, float]) -> SupernetValidation:
    """Of trials whose losses with the supernet are in the order of their numbers."""
    points = [SupernetPoint(number, float(number), loss, 1e9) for number, loss in own]
    return SupernetValidation(kendall_tau([]), points, len(points), 1e9)


def test_the_lowest_loss_of_the_last_rung_wins() -> None:
    trials = [trial(0, 3.0), trial(1, None), trial(2, 1.0), trial(3, 2.0), trial(4, 1.0)]
    assert [one.number for one in best(trials)] == [2, 4, 3, 0]
    assert winning_trial(trials, None).number == 2


def test_of_trials_that_supernets_scored_the_best_separate_training_wins() -> None:
    trials = [trial(0, 1.0), trial(1, 2.0), trial(2, 3.0)]
    assert winning_trial(trials, validation((0, 2.5), (2, 2.2))).number == 2
    assert winning_trial(trials, validation()).number == 0  # nothing was trained separately


def test_the_front_holds_what_no_other_trial_beats() -> None:
    trials = [trial(0, 1.0, 9.0), trial(1, 2.0, 5.0), trial(2, 2.5, 6.0), trial(3, None)]
    trials += [trial(4, 1.0, 9.0)]
    assert [one.number for one in front_trials(trials)] == [0, 1]


@pytest.fixture(scope="module")
def report() -> SearchReport:
    return made_up_report(12)


def test_winner_yaml_is_the_model_that_the_report_names(
    report: SearchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archdsl.search.report.report.plot", lambda result, folder: [])
    second = report.best[1]
    separately = validation((report.best[0].number, 2.0), (second.number, 1.0))
    given = replace(report, folder=tmp_path, supernet_validation=separately)
    write_report(given)
    assert given.as_json()["winner"] == second.number
    assert load(tmp_path / "winner.yaml").fingerprint() == second.fingerprint
    assert f"trial {second.number}" in load(tmp_path / "winner.yaml").description


def test_the_last_screen_says_who_won_and_what_it_costs(report: SearchReport) -> None:
    shown = as_text(result(report))
    said = " ".join(shown.split())
    assert said.endswith(" ".join(report.sentences))
    assert report.conclusion.startswith(f"The winner, trial {report.top.number}, is ")
    assert "of the 162.0M parameters allowed" in report.costs
    assert "(nominal)" in report.costs
    assert "params nominal executed proxy text skill" in said
    heads = r"trial objective text \(bits/byte\) skill \(accuracy\) params executed FLOPs"
    assert re.search(heads, said)
    assert "16 x 128 bytes of the embedded corpus" in said
    assert "proxies read text as bytes, whatever the vocabulary of the full-size model" in said


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_shows_the_result_whole(
    report: SearchReport, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = as_text(result(report))
    assert max(map(len, shown.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for entry in report.entries:
        assert short(entry.receipt.expected) in shown
        for gap in differences(report.entries, report.proxy).get(entry.name, {}).values():
            assert str(gap) in shown


def test_a_search_without_flops_as_objective_shows_nominal_ones() -> None:
    said = " ".join(as_text(result(made_up_report(12, axes=("loss",)))).split())
    assert "params nominal FLOPs" in said
    assert "executed FLOPs" not in said


def test_a_stopped_trial_keeps_the_flops_that_it_executed() -> None:
    stopped = replace(trial(0, None), others=(7.0,))
    assert trial_row(stopped, ("loss", "flops"))["executed_flops_per_token"] == 7.0
    assert trial_row(trial(0, 1.0), ("loss", "flops"))["executed_flops_per_token"] == 1.0
    assert trial_row(stopped, ("loss", "kv"))["executed_flops_per_token"] is None


def test_the_share_of_trained_trials_leaves_out_all_that_cost_no_training(
    report: SearchReport,
) -> None:
    counts = {"complete": 4, "pruned": 1, "infeasible": 2, "invalid": 2, "reused": 1}
    assert replace(report, outcomes=counts).trained_share == 0.5
