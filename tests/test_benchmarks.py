"""Benchmarks: their common functions, and that each of them runs with --small."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import NotEqual, Ratio, Timing, bar, check_equal, interleaved, ratio

SMALL = {
    "cost": [],
    "decode": ["--prompt", "16"],
    "growth": [],
    "inductor": ["--router", "top_k"],
    "launches": ["--router", "top_k", "--top", "5"],
    "memory": [],
    "prefill": [],
    "ranks": [],
    "routed_step": [],
    "search_overhead": [],
    "startup": [],
    "threads": [],
    "train_step": [],
}


def test_every_benchmark_is_in_the_list_of_this_test() -> None:
    scripts = {
        path.stem
        for path in (measure.ROOT / "benchmarks").glob("*.py")
        if "__main__" in path.read_text()
    }
    assert scripts == set(SMALL) | {"gpu"}  # which has its own tests


# a third of a minute each: run by hand, with ARCHDSL_BENCHMARKS=1
LONG = {"growth", "inductor", "memory", "ranks", "startup", "threads"}
by_hand = pytest.mark.skipif("ARCHDSL_BENCHMARKS" not in os.environ, reason="run by hand")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # other libraries may warn
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=by_hand) if name in LONG else name for name in SMALL]
)
def test_a_benchmark_runs_with_the_option_small(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path)] if name == "growth" else []
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", "--small", *SMALL[name], *out])
    import_module(f"benchmarks.{name}").main()
    if name == "growth":
        assert {path.name for path in tmp_path.iterdir()} == {"growth.json", "growth.png"}
    else:
        assert capfd.readouterr().out.count("\n") >= 2  # one result per line


def test_contenders_take_turns_and_are_called_equally_often() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleaved(contenders, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # once to warm up
    assert {name: len(timing.rounds) for name, timing in timings.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_computed_for_each_round() -> None:
    found = ratio(Timing("a", [1.0, 4.0, 9.0]), Timing("b", [1.0, 2.0, 1.0]))
    assert (found.median, found.low, found.high) == (2.0, 1.5, 5.5)


@pytest.mark.parametrize(
    ("found", "tolerance"), [([1.0, 2.1], 1e-2), ([1.0, float("nan")], 1.0), ([1.0], 1.0)]
)
def test_different_results_are_an_error(found: list[float], tolerance: float) -> None:
    with pytest.raises(NotEqual, match="not equal: logits"):
        check_equal("logits", torch.tensor(found), torch.tensor([1.0, 2.0]), tolerance)


def test_a_target_is_beaten_reached_or_missed() -> None:
    assert [bar(value, 1.0, 0.9) for value in (0.9, 0.95, 1.0, 1.1)] == [
        "beat",
        "reach",
        "reach",
        "short",
    ]
    assert [bar(value, 0.8, 0.9, lower_is_better=False) for value in (0.9, 0.8, 0.7)] == [
        "beat",
        "reach",
        "short",
    ]


def test_results_are_one_line_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "RECORD", tmp_path / "bench.jsonl")
    args = argparse.Namespace(small=False, threads=1, device="cpu", json=True)
    figures = {"time": Ratio([1.0, 2.0, 3.0]), "part": {"of": 0.5, "": "reach"}}
    for _ in range(2):
        measure.record("nothing", {"tokens": 8}, figures, args)
    assert "time  2.000 (1.500-2.500)" in capsys.readouterr().out
    lines = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[0])
    assert found["figures"]["time"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert found["settings"] == {"small": False, "threads": 1, "tokens": 8}
    assert torch.__version__.startswith(found["versions"]["torch"])  # which may add +cu130
    assert found["commit"]
