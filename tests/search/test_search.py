"""A whole search, small: what it trains, what it writes, and that it survives being killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import archdsl
from archdsl.costs.receipt import train_flops
from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.load import load
from archdsl.lang.spec import Budget
from archdsl.search.engine import Machine, SearchProgress
from archdsl.search.report.report import SearchReport
from archdsl.search.space.feasibility import NothingFitsError
from archdsl.search.study.storage import StorageError, exclusive
from archdsl.search.trials.proxy import Proxy, Task
from archdsl.search.workers.pool import InProcess
from tests.test_files import no_file_above

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


class Here(Machine):
    """Trains in this process: as a search does it otherwise, but quicker to begin."""

    @contextmanager
    def pool(self) -> Iterator[InProcess]:
        yield InProcess()


def go(space: Path, out: Path, plots: bool = False, **given: object) -> SearchReport:
    settings = {"budget": Budget(params=60_000), "proxy": PROXY, "seeds": 2, "machine": Here()}
    with pytest.MonkeyPatch.context() as patch:
        if not plots:  # they take longer than all else
            patch.setattr("archdsl.search.report.report.plot", lambda result, folder: [])
        return archdsl.search(space, out=out, **(settings | given))  # type: ignore[arg-type]


def scores(folder: Path) -> dict[Path, str]:
    return {file: file.read_text() for file in folder.rglob("step-*.json")}


def test_a_search_ends_with_a_winner_under_budget_that_builds(space: Path, tmp_path: Path) -> None:
    report = go(space, tmp_path / "run", trials=4, plots=True)
    winner = load(tmp_path / "run" / "winner.yaml")
    assert winner.fingerprint() == report.best[0].spec.fingerprint()
    wider = winner.patch("dim", winner.dim + 16)
    assert archdsl.cost(winner).params <= 60_000 < archdsl.cost(wider).params
    assert archdsl.build(winner)(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 300)
    lines = (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == list(range(len(lines)))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"] == report.conclusion
    assert result["front"] == [trial.number for trial in report.front]
    assert "Plotly" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "front.png").stat().st_size > 10_000


def test_nothing_on_the_front_is_beaten(space: Path, tmp_path: Path) -> None:
    report = go(space, tmp_path / "run", trials=5, objective="loss,flops,kv")
    assert 1 <= len(report.front) <= 5
    for trial in report.front:
        for other in report.best:
            assert other.values is not None
            assert trial.values is not None
            worse = [other.values[axis] >= trial.values[axis] for axis in ("loss", "flops", "kv")]
            assert any(worse)
    plain = next(t for t in report.best if "loop" not in t.spec.to_yaml())
    assert plain.values is not None
    assert plain.values["flops"] == archdsl.cost(plain.spec).expected
    assert plain.values["kv"] == archdsl.cost(plain.spec).kv_bytes_per_token


def test_a_model_that_the_budget_makes_narrower_has_a_narrower_proxy(
    space: Path, tmp_path: Path
) -> None:
    own_weights = ["blocks.1.search.choices.itt.parameters=per_step"]
    report = go(space, tmp_path / "run", trials=4, overrides=own_weights)
    proxy, widths = report.settings.proxy, {trial.spec.dim for trial in report.best}
    assert len(widths) > 1
    assert proxy.of_dim == report.trials[0].spec.dim  # the default model's
    for trial in report.best:
        small = proxy.shrink(trial.spec, TASK)
        assert small.dim == round(16 * trial.spec.dim / proxy.of_dim)
        trained = sum(rung["skill"].train_flops for rung in trial.rungs)
        assert trained == train_flops(small, tokens=TASK.length) * TASK.batch_size * TASK.rungs[-1]


def test_one_width_for_all_has_one_proxy_width(space: Path, tmp_path: Path) -> None:
    space.write_text(SPACE.replace("{fit: {multiple_of: 16, default: 32}}", "32"))
    assert go(space, tmp_path / "run", trials=1).settings.proxy == PROXY


def test_equal_models_are_trained_once(space: Path, tmp_path: Path) -> None:
    # the space means four models: steps 1 is plain, at capacity 1 nothing is routed
    report = go(space, tmp_path / "run")
    trained = [trial.fingerprint for trial in report.trials if trial.outcome != "reused"]
    assert len(trained) == len(set(trained)) == 5
    assert report.outcomes["reused"] <= 8  # then the space is known to be used up


def test_searches_that_share_a_store_train_nothing_twice(space: Path, tmp_path: Path) -> None:
    first = go(space, tmp_path / "one", trials=3, store=tmp_path / "store")
    before = scores(tmp_path / "store")
    again = go(
        space, tmp_path / "two", trials=3, store=tmp_path / "store", budget=Budget(params=60_100)
    )
    assert scores(tmp_path / "store") == before
    assert [t.value for t in again.trials] == [t.value for t in first.trials]
    assert first.spending.total.train_flops > 0
    assert again.spending.total.train_flops == 0


def test_the_same_command_goes_on_and_ends_the_same(space: Path, tmp_path: Path) -> None:
    whole = go(space, tmp_path / "whole", trials=4)
    go(space, tmp_path / "parts", trials=2)
    parts = go(space, tmp_path / "parts", trials=4)
    assert [t.value for t in parts.trials] == [t.value for t in whole.trials]
    assert parts.winner.fingerprint() == whole.winner.fingerprint()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """The values of the trials of a whole search."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.yaml").write_text(SPACE)
    return [trial.value for trial in go(folder / "small.yaml", folder / "run", trials=3).trials]


@pytest.mark.parametrize("size", [300, 8_000])
def test_a_full_disk_ends_a_search_at_once_that_then_goes_on(
    space: Path, tmp_path: Path, undisturbed: list[float | None], size: int
) -> None:
    run = tmp_path / "run"
    with no_file_above(size), pytest.raises(ArchdslError) as error:
        go(space, run, trials=3)
    told = str(error.value)
    assert re.match(rf"(out: )?{run}/\S+ could not be written: File too large", told), told
    assert "\n" not in told
    assert not list(run.rglob("*.tmp"))
    assert [trial.value for trial in go(space, run, trials=3).trials] == undisturbed


def test_an_unfinished_entry_of_the_journal_is_dropped(
    space: Path, tmp_path: Path, undisturbed: list[float | None]
) -> None:
    go(space, tmp_path / "run", trials=1)
    with (tmp_path / "run" / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 6, "wor')
    (tmp_path / "run" / f".result.json.{32 * 'a'}.tmp").write_text("half")
    assert [t.value for t in go(space, tmp_path / "run", trials=3).trials] == undisturbed
    for line in (tmp_path / "run" / "study.journal").read_text().splitlines():
        assert isinstance(json.loads(line), dict)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_running_it_again_trains_nothing(space: Path, tmp_path: Path) -> None:
    first = go(space, tmp_path / "run", trials=3)
    before = scores(tmp_path)
    again = go(space, tmp_path / "run", trials=3, seconds=0.001)  # nor does it need time
    assert again.conclusion == first.conclusion
    assert scores(tmp_path) == before


def test_training_stops_within_a_rung_of_its_limit(space: Path, tmp_path: Path) -> None:
    free = go(space, tmp_path / "free", trials=2).spending.total
    limit = int(free.train_flops * 0.9)
    report = go(space, tmp_path / "run", budget=Budget(params=60_000, train_flops=limit))
    rung = max(s.train_flops for t in report.trials for r in t.rungs for s in r.values())
    assert report.spending.total.train_flops <= limit + rung
    assert (tmp_path / "run" / "winner.yaml").exists()
    more = go(space, tmp_path / "run", trials=5)  # what was spent does not change what it is
    assert more.spending.total.train_flops > report.spending.total.train_flops


def test_the_proxy_is_validated_if_that_is_wanted(space: Path, tmp_path: Path) -> None:
    without = go(space, tmp_path / "run", trials=4)
    assert "--validate-proxy" in without.validations
    report = go(space, tmp_path / "run", trials=4, validate_proxy=True)  # the same search goes on
    assert report.proxy_validation is not None
    numbers = {point.number for point in report.proxy_validation.points}
    assert numbers == {trial.number for trial in report.best}
    assert "--validate-proxy" not in report.validations


def test_other_settings_do_not_touch_a_run(space: Path, tmp_path: Path) -> None:
    go(space, tmp_path / "run", trials=1)
    with pytest.raises(ArchdslError, match="other settings"):
        go(space, tmp_path / "run", trials=1, budget=Budget(params=70_000))


def test_two_processes_do_not_search_in_one_folder(space: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run"), pytest.raises(StorageError, match="another process"):
        go(space, tmp_path / "run", trials=1)


def test_a_budget_nothing_fits_is_said_before_training(space: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingFitsError, match="exceed the budget of 1,000"):
        go(space, tmp_path / "run", budget=Budget(params=1000))
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_space_leaves_nothing_behind(space: Path, tmp_path: Path) -> None:
    space.write_text(SPACE.replace("kind: thinking", "kind: thinkin"))
    with pytest.raises(SpecError, match=r"small.yaml:16:\d+: .*did you mean 'thinking'"):
        go(space, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_choices_that_do_not_go_together_are_passed_over(space: Path, tmp_path: Path) -> None:
    choice = "kv: {search: {choices: [own, shared], default: own}}"
    rest = "full_steps: {search: {choices: [0, 1], default: 1}}"
    router = "residual: {kind: thinking}"
    space.write_text(SPACE.replace(router, f"{router}\n          {choice}\n          {rest}"))
    report = go(space, tmp_path / "run", trials=6, seed=1)
    assert report.trained_share == 1  # shared keys need a first full step


def test_ctrl_c_ends_with_the_result_so_far(space: Path, tmp_path: Path) -> None:
    def interrupt(progress: SearchProgress) -> None:
        if progress.best:
            raise KeyboardInterrupt

    report = go(space, tmp_path / "run", trials=4, watch=interrupt)
    assert report.interrupted
    assert (tmp_path / "run" / "winner.yaml").exists()
    assert not go(space, tmp_path / "run", trials=4).interrupted


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from archdsl.search.engine import Machine
from tests.search.test_search import go
if __name__ == "__main__":
    go(Path(sys.argv[1]), Path(sys.argv[2]), trials=6, machine=Machine(2))
"""


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_scored(space: Path, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(Path(__file__).parents[2])))
    command = [sys.executable, str(script), str(space), str(tmp_path / "run")]
    child = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("step-000004.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)  # its children end with it
    child.wait()
    scored = scores(tmp_path)
    assert scored
    whole = go(space, tmp_path / "whole", trials=6)
    report = go(space, tmp_path / "run", trials=6)
    assert {file: file.read_text() for file in scored} == scored
    assert [t.values for t in report.trials] == [t.values for t in whole.trials]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices_per_trial": 0}, "devices_per_trial: must be at least 1, got 0"),
        ({"devices_per_trial": 9}, r"devices_per_trial: .*at most 8, as .* has 8 cores; got 9"),
        ({"devices_per_trial": 3}, "devices_per_trial: must divide the 16 sequences of a batch"),
        ({"devices_per_trial": 2, "strategy": "shared"}, "the strategy shared trains on one"),
        ({"device": "cuda"}, "device: cuda: is not available"),
    ],
)
def test_devices_on_which_no_trial_can_be_trained_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(ArchdslError, match=told):
        archdsl.search("search", budget="1M", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
