"""ablate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from archdsl.search.workers.pool import InProcess
from tests.cli.command import SKILL, Cli

SPEC = """
name: small
vocab_size: 300
context: 64
dim: 32
blocks:
  - kind: loop
    steps: 2
    encoding: {kind: add}
    residual: {kind: thinking}
    body: {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
"""
CONTESTANTS = [
    "model",
    "equal-parameters plain",
    "equal-FLOPs plain",
    "equal-FLOPs loop",
    "without residual",
    "without encoding",
]
OPTIONS = ["--data", SKILL, "--proxy", "dim=8,head_size=4,steps=2", "--seeds", "2"]


class Pool(InProcess):
    """Trains in this process; Ctrl-C comes before more than ``last`` trainings."""

    def __init__(self, last: int) -> None:
        self.last = last

    def submit(self, work: Any) -> Future[Any]:
        self.last -= 1
        if self.last < 0:
            raise KeyboardInterrupt
        return super().submit(work)


@pytest.fixture
def small(cli: Cli) -> str:
    Path("small.yaml").write_text(SPEC)
    return "small.yaml"


def train_at_most(monkeypatch: pytest.MonkeyPatch, trainings: int) -> None:
    @contextmanager
    def pool(workers: int, memory: int | None = None) -> Iterator[Pool]:
        assert workers >= 1
        yield Pool(trainings)

    monkeypatch.setattr("archdsl.search.analysis.comparison.process_pool", pool)
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)


def test_ends_with_what_was_found_and_goes_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, small: str
) -> None:
    train_at_most(monkeypatch, 7)
    part = cli("ablate", small, *OPTIONS, "--out", "there")
    assert part.status == 130
    said = part.out.partition("conclusion  ")[2]  # the last thing, where a screen ends
    assert said.startswith("The model is not shown to be better than any of its")
    assert "with one seed (one seed: no interval)" in " ".join(said.split())
    assert "missing     5 trainings; run the same command again" in part.out
    train_at_most(monkeypatch, 5)
    whole = cli("ablate", small, *OPTIONS, "--out", "there")
    assert whole.status == 0, whole.err
    assert whole.err.splitlines()[-1].endswith("s; 12 of 12 trainings")
    said = " ".join(whole.out.partition("conclusion  ")[2].split())
    assert re.match(r"The model is .*: over 2 seeds \(95% interval for each difference\), ", said)
    for name in CONTESTANTS:
        assert f"\n{name}" in whole.out
    train_at_most(monkeypatch, 0)
    again = cli("ablate", small, *OPTIONS, "--out", "there", "--json").json
    assert again == json.loads(Path("there/result.json").read_text())
    assert [entry["name"] for entry in again["entries"]] == CONTESTANTS
    assert {len(entry["scores"]["data"]) for entry in again["entries"]} == {2}
    assert (again["missing"], again["interrupted"]) == (0, False)


def test_machines_share_the_trainings_by_a_database(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, small: str
) -> None:
    shared = ["ablate", small, *OPTIONS, "--storage", "sqlite:///shared.db", "--json"]
    train_at_most(monkeypatch, 12)
    mine = cli(*shared, "--out", "a").json
    train_at_most(monkeypatch, 0)
    assert cli(*shared, "--out", "b").json == mine


def test_no_training_is_begun_after_the_time(cli: Cli, small: str) -> None:
    found = cli("ablate", small, *OPTIONS, "--time", "0.000001")
    assert found.status == 0
    assert "so nothing is" in found.out
    assert "missing     12 trainings" in found.out
    assert Path("runs/small-ablation/result.json").exists()


def test_a_mistake_is_said_before_training(cli: Cli) -> None:
    found = cli("ablate", "itt", "--proxy", "width=3")
    assert (found.status, found.out) == (2, "")
    assert "width=3" in found.err
    found = cli("ablate", "itt", "--set", "dim=7")
    assert (found.status, found.out) == (2, "")
    assert not Path("runs").exists()


@pytest.mark.slow
def test_trains_in_processes(cli: Cli, small: str) -> None:
    found = cli("ablate", small, *OPTIONS, "--workers", "2")
    assert found.status == 0, found.err
    assert "conclusion  The model is" in found.out
