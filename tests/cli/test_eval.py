"""eval: the dial, sweeps and tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from archdsl.evaluation import lm_eval_tasks
from tests.cli.command import SKILL, Cli
from tests.examples import SHIPPED, write_examples

TEXT = ["--data", SKILL, "--context", "8", "--tokens", "64"]


@pytest.fixture
def made(cli: Cli) -> str:
    """A checkpoint with a leaking router."""
    cli("build", "tiny", "--set", "dim=16", "--set", "blocks.1.router.kind=top_k", "--out", "made")
    return "made"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folders = [SHIPPED / name for name in ("arc", "piqa")]
    few = TaskManager(include_defaults=False, include_path=folders)
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda names: few)
    return write_examples(tmp_path / "data")


def test_a_dial_setting_is_evaluated_with_the_flops_it_took(cli: Cli, made: str) -> None:
    trained = cli("eval", made, *TEXT, "--json").json
    skipped = cli("eval", made, *TEXT, "--capacity", "0", "--json").json
    assert trained["setting"] == {"capacity": None, "steps": None, "exit": None}
    assert skipped["setting"] == {"capacity": 0.0, "steps": None, "exit": None}
    assert skipped["flops_per_token"] < trained["flops_per_token"]
    shown = cli("eval", made, *TEXT, "--capacity", "0.9,0", "--steps", "3").out
    assert "dial      90/0@3\n" in shown


def test_a_sweep_compares_the_papers_settings_both_ways_and_draws_them(cli: Cli, made: str) -> None:
    pytest.importorskip("matplotlib")
    found = cli("eval", made, *TEXT, "--sweep", "--plot", "dial.png", "--json")
    assert found.status == 0, found.err
    points = found.json["points"]
    assert len(points) == 2 * 9
    assert [p["routing"] for p in points] == ["causal"] * 9 + ["leaking"] * 9
    assert Path("dial.png").is_file()
    shown = cli("eval", made, *TEXT, "--sweep").out
    for text in ("causal routing", "no decoder can do this", "trained", "90/0", "100"):
        assert text in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "…" not in shown


def test_repeated_options_are_compared_with_the_trained_setting(cli: Cli, made: str) -> None:
    dial = ["--capacity", "0.3", "--capacity", "1", "--steps", "2", "--steps", "5"]
    points = cli("eval", made, *TEXT, *dial, "--json").json["points"][:5]
    assert [(p["setting"]["capacity"], p["setting"]["steps"]) for p in points] == [
        (None, None),
        (0.3, 2),
        (0.3, 5),
        (1.0, 2),
        (1.0, 5),
    ]


def test_tasks_are_scored_at_each_setting(cli: Cli, made: str, folder: Path) -> None:
    asked = ["--tasks", "arc_easy, piqa", "--data-dir", str(folder), "--limit", "4"]
    dial = ["--capacity", "0", "--capacity", "1"]
    found = cli("eval", made, *asked, *dial, "--out", "whole.json", "--json")
    assert found.status == 0, found.err
    settings = found.json["settings"]
    assert found.json["routing"] == "causal"
    assert [at["setting"]["capacity"] for at in settings] == [None, 0.0, 1.0]
    flops = [at["flops_per_token"] for at in settings]
    assert flops[1] < flops[0] < flops[2]
    names = {(score["task"], score["metric"], score["examples"]) for score in settings[0]["scores"]}
    assert ("piqa", "acc", 4) in names
    whole = json.loads(Path("whole.json").read_text())
    assert [len(at["samples"]["arc_easy"]) for at in whole] == [4, 4, 4]
    shown = cli("eval", made, *asked)
    assert "scored causally" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--capacity", "1.5"], 2, "blocks.1: a capacity is between 0 and 1, got 1.5"),
        (["--capacity", "0.1,0.2,0.3", "--sweep"], 2, "blocks.1: 2 passes are routed"),
        (["--limit", "3"], 1, "--limit needs --tasks"),
        (["--plot", "a.png"], 1, "--plot needs --sweep"),
        (["--sweep", "--plot", "no/a.png"], 1, "no/a.png cannot be written"),
        (["--tasks", "arc_easy", "--tokens", "1k"], 1, "--tokens cannot be used with --tasks"),
        (["--tasks", ",", "--data-dir", "."], 1, "no task was given"),
        (
            ["--tasks", "arc_easy", "--data-dir", "."],
            1,
            "the examples of task arc_easy are missing; expected arc_",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(
    cli: Cli, made: str, folder: Path, options: list[str], status: int, message: str
) -> None:
    found = cli("eval", made, *options)
    assert found.status == status
    assert message in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""


def test_data_without_text_has_no_tokenizer_for_tasks(cli: Cli, folder: Path) -> None:
    data = ["--data", SKILL, "--context", "8", "--steps", "1", "--batch-size", "2"]
    cli("train", "tiny", *data, "--out", "run")
    found = cli("eval", "run/final", "--tasks", "piqa", "--data-dir", folder)
    assert "run/final has no tokenizer" in found.err


def test_without_the_harness_its_extra_is_named(
    cli: Cli, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("archdsl.evaluation.lm_eval_model", "archdsl.evaluation.lm_eval_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = cli("eval", made, "--tasks", "piqa")
    assert found.status == 1
    assert "pip install 'archdsl[lm-eval]'" in found.err
