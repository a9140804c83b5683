"""search."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from archdsl.lang.spec import Budget
from archdsl.search.engine import Machine
from archdsl.search.run import search
from archdsl.search.trials.proxy import Proxy
from tests.cli.command import SKILL, Cli
from tests.search.test_search import SPACE


def asked(cli: Cli, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What the command asks of the search."""
    seen: dict[str, Any] = {}

    def note(space: str, **options: Any) -> None:
        seen.update(options, space=space)
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.search.run.search", note)
    monkeypatch.setattr(
        "archdsl.search.workers.pool.start_server", lambda: None
    )  # nothing is trained
    assert cli("search", *options).status == 130
    return seen


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)]
)
def test_a_time_has_a_unit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, text: str, seconds: int
) -> None:
    assert asked(cli, monkeypatch, "--time", text)["seconds"] == seconds


@pytest.mark.parametrize("text", ["0", "-1", "3x", "m", "1e999", "ten minutes"])
def test_a_time_without_sense_is_refused(cli: Cli, text: str) -> None:
    found = cli("search", "--time", text)
    assert (found.status, found.out) == (2, "")
    assert "--time" in found.err


def test_a_search_takes_its_own_defaults(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    seen = asked(cli, monkeypatch)
    assert seen.pop("watch") is not None
    assert seen.pop("command").startswith("archdsl")
    assert seen.pop("proxy") == Proxy.parse(None, None)
    assert seen.pop("machine") == Machine()
    assert seen == {name: defaults[name] for name in seen}


def test_a_search_passes_on_what_was_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "mine.yaml",
        "--budget",
        "20M",
        "--flops",
        "0.1G",
        "--proxy",
        "dim=48",
        "--data",
        SKILL,
    ]
    Path("mine.yaml").write_text("extends: search.yaml\n")
    seen = asked(cli, monkeypatch, *options, "--trials", "3", "--out", "there")
    assert seen["space"] == "mine.yaml"
    assert seen["budget"] == Budget(params=20_000_000, flops=100_000_000)
    assert (seen["trials"], seen["out"]) == (3, Path("there"))
    assert seen["proxy"].dim == 48
    assert seen["proxy"].tasks["data"].data == SKILL
    assert asked(cli, monkeypatch, "--proxy", "none")["proxy"].dim is None


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
