"""A whole search, small: what it trains, what it writes, and that it survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import archdsl
from archdsl.errors import ArchdslError, SpecError
from archdsl.load import load, read
from archdsl.search.proxy import Job, Proxy, Task, objective, run
from archdsl.search.report import Report
from archdsl.search.run import NothingFitsError, Progress
from archdsl.search.study import Study
from archdsl.spec import Budget

SPACE = """
name: small
vocab_size: 300
context: 64
dim: {fit: {multiple_of: 16, default: 32}}
blocks:
  - &layer {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
  - search:
      default: itt
      choices:
        plain: *layer
        itt:
          kind: loop
          steps: {search: {low: 1, high: 3, default: 2}}
          router: {kind: prefix, capacity: {search: {choices: [0.5, 1.0], default: 0.5}}}
          residual: {kind: thinking}
          body: *layer
"""
TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(2, 4), eval_tokens=240
)
PROXY = Proxy(dim=16, head_size=8, tasks={"skill": TASK})


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SPACE)
    return file


def go(space: Path, out: Path, **given: object) -> Report:
    settings = {"budget": Budget(params=60_000), "proxy": PROXY, "workers": 1, "seeds": 2}
    return archdsl.search(space, out=out, **(settings | given))  # type: ignore[arg-type]


def test_a_search_ends_with_a_winner_under_budget_that_builds(space: Path, tmp_path: Path) -> None:
    report = go(space, tmp_path / "run", trials=4)
    winner = load(tmp_path / "run" / "winner.yaml")
    assert winner.fingerprint() == report.best[0].spec.fingerprint()
    wider = winner.patch("dim", winner.dim + 16)
    assert archdsl.cost(winner).params <= 60_000 < archdsl.cost(wider).params
    assert archdsl.build(winner)(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 300)
    lines = (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == list(range(len(lines)))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"] == report.verdict()
    assert (tmp_path / "run" / "front.png").stat().st_size > 10_000


def test_equal_models_are_trained_once(space: Path, tmp_path: Path) -> None:
    # the space means four models: steps 1 is plain, at capacity 1 nothing is routed
    report = go(space, tmp_path / "run")
    trained = [trial.fingerprint for trial in report.trials if trial.outcome != "reused"]
    assert len(trained) == len(set(trained)) <= 5
    assert report.outcomes["reused"] >= 40


def test_the_same_command_goes_on_and_ends_the_same(space: Path, tmp_path: Path) -> None:
    whole = go(space, tmp_path / "whole", trials=4)
    go(space, tmp_path / "parts", trials=2)
    parts = go(space, tmp_path / "parts", trials=4)
    assert [t.value for t in parts.trials] == [t.value for t in whole.trials]
    assert parts.winner.fingerprint() == whole.winner.fingerprint()


def test_running_it_again_trains_nothing(space: Path, tmp_path: Path) -> None:
    first = go(space, tmp_path / "run", trials=3)
    started = time.monotonic()
    files = sorted(tmp_path.rglob("step-*.json"))
    again = go(space, tmp_path / "run", trials=3, seconds=0.001)  # nor does it need time
    assert again.verdict() == first.verdict()
    assert sorted(tmp_path.rglob("step-*.json")) == files
    assert all(f.stat().st_mtime < time.time() - (time.monotonic() - started) for f in files)


def test_a_trial_killed_while_it_was_told_is_drawn_again(space: Path, tmp_path: Path) -> None:
    tree, budget = read(space), Budget(params=60_000)
    trial = Study(tmp_path, tree, budget, seed=0).draw()
    assert trial is not None
    trial.ask.set_user_attr("outcome", "complete")  # and here the process ends
    again = Study(tmp_path, tree, budget, seed=0)
    assert again.finished() == []
    drawn = [again.draw() for _ in range(3)]
    assert trial.fingerprint in [other.fingerprint for other in drawn if other]


def test_other_settings_do_not_touch_a_run(space: Path, tmp_path: Path) -> None:
    go(space, tmp_path / "run", trials=1)
    with pytest.raises(ArchdslError, match="other settings"):
        go(space, tmp_path / "run", trials=1, budget=Budget(params=70_000))


def test_a_budget_nothing_fits_is_said_before_training(space: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingFitsError, match="exceed the budget of 1,000"):
        go(space, tmp_path / "run", budget=Budget(params=1000))


def test_a_mistake_in_the_space_leaves_nothing_behind(space: Path, tmp_path: Path) -> None:
    space.write_text(SPACE.replace("kind: thinking", "kind: thinkin"))
    with pytest.raises(SpecError, match=r"small.yaml:16:\d+: .*did you mean 'thinking'"):
        go(space, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_choices_that_do_not_go_together_are_drawn_past(space: Path, tmp_path: Path) -> None:
    choice = "kv: {search: {choices: [own, shared], default: own}}"
    rest = "full_steps: {search: {choices: [0, 1], default: 1}}"
    router = "residual: {kind: thinking}"
    space.write_text(SPACE.replace(router, f"{router}\n          {choice}\n          {rest}"))
    report = go(space, tmp_path / "run", trials=6, seed=1)
    assert report.outcomes["invalid"] >= 1  # shared keys need a first full step


def test_ctrl_c_ends_with_the_result_so_far(space: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.best:
            raise KeyboardInterrupt

    report = go(space, tmp_path / "run", trials=4, watch=interrupt)
    assert report.interrupted
    assert (tmp_path / "run" / "winner.yaml").exists()
    assert not go(space, tmp_path / "run", trials=4).interrupted


def test_a_rung_is_climbed_from_the_one_below(tmp_path: Path) -> None:
    spec = PROXY.shrink(load("tiny"), TASK)
    once = run(Job(tmp_path / "once", spec, TASK, 0, 4))
    run(Job(tmp_path / "twice", spec, TASK, 0, 2))
    twice = run(Job(tmp_path / "twice", spec, TASK, 0, 4))
    assert (once.loss, once.accuracy) == (twice.loss, twice.accuracy)


def test_the_objective_is_the_weighted_sum_of_the_losses(tmp_path: Path) -> None:
    spec = PROXY.shrink(load("tiny"), TASK)
    score = run(Job(tmp_path, spec, TASK, 0, 2))
    half = TASK.model_copy(update={"weight": 0.5})
    both = Proxy(tasks={"a": TASK, "b": half})
    assert score.loss is not None
    assert objective({"a": score, "b": score}, both) == pytest.approx(1.5 * score.loss)
    diverged = score.model_copy(update={"loss": None})
    assert objective({"a": score, "b": diverged}, both) is None


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.search.test_search import go
if __name__ == "__main__":
    go(Path(sys.argv[1]), Path(sys.argv[2]), trials=6, workers=2)
"""


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_told(space: Path, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(Path(__file__).parents[2])))
    command = [sys.executable, str(script), str(space), str(tmp_path / "run")]
    child = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("step-000004.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    scored = {f: f.read_text() for f in tmp_path.rglob("step-*.json")}
    assert scored
    report = go(space, tmp_path / "run", trials=6)
    assert {f: f.read_text() for f in scored} == scored
    told = [trial.fingerprint for trial in report.trials if trial.outcome in ("complete", "pruned")]
    assert len(told) == len(set(told))


@pytest.mark.slow
def test_two_workers_wait_for_a_model_rather_than_draw_it_again(
    space: Path, tmp_path: Path
) -> None:
    space.write_text(SPACE.replace("steps: {search: {low: 1, high: 3, default: 2}}", "steps: 2"))
    report = go(space, tmp_path / "run", workers=2)
    assert report.outcomes.get("in training", 0) < 20
    assert len({trial.fingerprint for trial in report.best}) == 3 - report.outcomes.get("pruned", 0)
