"""search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from archdsl.lang.spec import Budget
from archdsl.search.config import SearchConfig
from tests.cli.command import SKILL, Cli
from tests.search.test_search import SPACE


def asked(cli: Cli, monkeypatch: pytest.MonkeyPatch, *options: str) -> SearchConfig:
    """The config that the command runs a search with."""
    seen: list[SearchConfig] = []

    def note(config: SearchConfig, **_: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.search.run.run_search", note)
    # nothing is trained
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)
    assert cli("search", *options).status == 130
    return seen[0]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("null", None)]
)
def test_a_time_has_a_unit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, text: str, seconds: int | None
) -> None:
    assert asked(cli, monkeypatch, "--time", text).time == seconds


@pytest.mark.parametrize("text", ["0", "-1", "3x", "m", "1e999", "ten minutes"])
def test_a_time_without_sense_is_refused(cli: Cli, text: str) -> None:
    found = cli("search", "--time", text)
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith("--time: ")


def test_a_search_without_options_has_the_defaults(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(cli, monkeypatch) == SearchConfig()


def test_a_search_passes_on_what_was_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text("extends: search.yaml\n")
    options = ["--budget", "20M", "--budget-of", "non_embedding", "--flops", "0.1G"]
    options += ["--proxy", "dim=48", "--data", SKILL, "--trials", "3", "--out", "there"]
    seen = asked(cli, monkeypatch, "mine.yaml", *options)
    limits = Budget(params=None, non_embedding=20_000_000, flops=100_000_000)
    assert (seen.space, seen.limits) == ("mine.yaml", limits)
    assert (seen.trials, seen.out) == (3, Path("there"))
    assert (seen.proxy, seen.data) == ("dim=48", SKILL)


def test_options_replace_the_settings_of_a_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text("extends: search.yaml\n")
    Path("settings.yaml").write_text(
        "space: mine.yaml\nbudget: 20M\ntime: 30m\nobjective: [loss, kv]\nseeds: 2\n"
    )
    seen = asked(cli, monkeypatch, "--config", "settings.yaml", "--seeds", "5")
    assert (seen.space, seen.budget, seen.time) == ("mine.yaml", 20_000_000, 1800)
    assert (seen.objective, seen.seeds) == ("loss,kv", 5)


def test_a_wrong_file_is_told_its_lines_together_with_wrong_options(cli: Cli) -> None:
    Path("search.yaml").write_text("budget: 20Q\nseed: 0\ntimes: 9m\n")
    found = cli("search", "--config", "search.yaml", "--layouts", "0")
    assert (found.status, found.out) == (2, "")
    places = [line.partition(" ")[0] for line in found.err.splitlines()]
    assert places == ["--layouts:", "search.yaml:1:9:", "search.yaml:3:8:"]
    assert "budget: must be a whole number, also written as 162M" in found.err
    assert "(did you mean 'time'?)" in found.err
    Path("search.yaml").write_text("[1]\n")
    assert "a config is a mapping" in cli("search", "--config", "search.yaml").err
    assert "no such file" in cli("search", "--config", "none.yaml").err


def test_what_a_budget_counts_needs_a_budget(cli: Cli) -> None:
    found = cli("search", "--budget-of", "params")
    assert (found.status, found.out) == (2, "")
    assert "no budget is given" in found.err


TWO = """
name: two
vocab_size: 300
context: 64
dim: {search: {choices: [16, 256], default: 16}}
blocks: [{kind: layer, attention: {head_size: 16}}]
"""


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    ("space", "options", "why"),
    [
        ("tiny", [], "it leaves no value open, so it is one model."),
        ("two.yaml", ["--budget", "60k"], "of its 2 points only one model keeps to the budget: "),
    ],
)
def test_a_space_with_nothing_to_search_says_so(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[str],
    space: str,
    options: list[str],
    why: str,
) -> None:
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)
    Path("two.yaml").write_text(TWO)
    found = cli("search", space, *options, "--data", SKILL, "--trials", "2", *plan)
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith(f"SPACE: there is nothing to search in this space: {why}")
    assert "`archdsl ablate` compares one model with its baselines" in found.err
    assert "`archdsl train` trains it" in found.err
    assert not Path("runs").exists()


def test_a_forecast_is_of_separate_training(cli: Cli) -> None:
    found = cli("search", "--plan", "--strategy", "shared")
    assert (found.status, found.out) == (1, "")
    assert "--plan can forecast the strategy separate only" in found.err


@pytest.mark.slow
def test_a_search_that_is_told_to_end_loses_and_spoils_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "archdsl", "search", "small.yaml", "--budget", "60k"]
    command += ["--data", SKILL, "--proxy", "dim=16,steps=40", "--trials", "6", "--seeds", "2"]
    command += ["--workers", "2", "--out", "run"]
    pipe, closed = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=closed, stderr=pipe, text=True, start_new_session=True
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "; best" in line:
                os.killpg(child.pid, signal.SIGTERM)  # as SLURM does it: to children, too
                break
        child.stderr.read()
    assert child.returncode == 130
    assert "failed" not in (tmp_path / "run" / "trials.jsonl").read_text()
    assert (tmp_path / "run" / "winner.yaml").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "5 complete" in done.stdout  # all that the space has
    assert "failed" not in done.stdout


def test_a_search_begins_with_what_it_trains_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.txt").write_text("It was. " * 400)
    Path("mine.yaml").write_text(SPACE)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.search.run.run_search", stop)
    monkeypatch.setattr("archdsl.search.analysis.ablation.ablate", stop)
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)
    for command in ("search", "ablate"):
        found = cli(command, "mine.yaml", "--data", "mine.txt")
        assert found.status == 130
        assert "mine.txt\n  train: 1 file, 1 document, 2,882 tokens\n" in found.err
