"""The table of a GPU: every row in small on the CPU, and what it says of rows it has not."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import GOALS, GROUPS, Group, Report
from benchmarks.gpu_rows import Row, Sizes, Skipped
from benchmarks.measure import NotEqual


def row(name: str, value: float = 1.0) -> Row:
    return Row(name, value, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # other libraries may warn
def test_every_row_is_measured_and_in_the_table_and_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--small", "--device", "cpu", "--json", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
    gpu.main()
    table = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert set(found["rows"]) == set(GOALS) == {row for one in GROUPS.values() for row in one.rows}
    for name, one in found["rows"].items():
        assert "measured" in one, one
        assert GOALS[name].what in table
    assert {"torch", "transformers"} <= set(found["versions"])
    assert found["device"]
    assert found["commit"]


def test_rows_that_cannot_be_measured_say_why_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(at: Sizes) -> Iterator[Row]:
        yield row("plain", 0.9)
        raise NotEqual("not equal: logits")

    def skipped(at: Sizes) -> Iterator[Row]:
        raise Skipped("litgpt is not installed")
        yield row("shared")

    def slow(at: Sizes) -> Iterator[Row]:
        yield row("loss")
        assert json.loads(path.read_text())["rows"]["loss"]["bar"] == "beat"  # at once
        time.sleep(60)
        yield row("loss_memory")

    monkeypatch.setattr(gpu, "_free", lambda at: None)
    path = tmp_path / "a" / "gpu.json"
    report = Report({}, path)
    groups = {
        "half": Group(half, ("plain", "mfu"), 0),
        "skipped": Group(skipped, ("shared",), 0),
        "slow": Group(slow, ("loss", "loss_memory"), 0),
        "late": Group(slow, ("compile",), 0),
        "long": Group(slow, ("launches",), 1000),
    }
    gpu.run(groups, Sizes("cpu", compiled=False, small=False), report, 0.5)
    words = {name: str(one["bar"]) for name, one in report.rows.items()}
    assert words == {
        "plain": "beat",
        "mfu": "failed: NotEqual: not equal: logits",
        "shared": "skipped: litgpt is not installed",
        "loss": "beat",
        "loss_memory": "not run: the time was over",
        "compile": "not run: takes 0 s, 0 left",
        "launches": "not run: takes 1000 s, 0 left",
    }
    assert json.loads(path.read_text())["rows"] == report.rows
    table = "\n".join(report.table())
    assert all(word in table for word in words.values())
