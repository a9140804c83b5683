"""Checkpoints, studies and token caches that older versions of the code wrote still load."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import archdsl
from archdsl.data.text_data import TextData
from archdsl.data.token_cache import TokenCache
from archdsl.data.types import Batch
from archdsl.lang.spec import Budget
from archdsl.search.engine import Machine
from archdsl.search.report.report import SearchReport
from archdsl.search.trials.proxy import Proxy, Task
from archdsl.search.workers.pool import InProcess
from tests.cli.command import Cli

WRITTEN = Path(__file__).parent / "written_before"
CHECKPOINT = Path("run/checkpoints/step-000294")
TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(2, 4), eval_tokens=240
)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files; the current folder and the token cache are inside it."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ARCHDSL_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture
def cli(written: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def contents(folder: Path, pattern: str) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob(pattern) if file.is_file()}


def test_a_checkpoint_is_evaluated_and_writes_text(cli: Cli) -> None:
    scored = cli("eval", CHECKPOINT, "--data", "text.txt", "--context", "16", "--json")
    assert scored.status == 0, scored.err
    assert scored.json["loss"] == pytest.approx(3.0024, abs=1e-3)  # as the old code had it
    text = cli("generate", CHECKPOINT, "It was", "--max-tokens", "5", "--temperature", "0")
    assert text.status == 0, text.err
    assert text.out.strip()


def test_training_continues_from_a_checkpoint(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TextData.batch

    def batch(data: TextData, index: int, *sizes: int) -> Batch:
        if index == 296:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C during this step
        return whole(data, index, *sizes)

    monkeypatch.setattr(TextData, "batch", batch)
    before = Path("run/metrics.jsonl").read_text()
    options = "--steps 100000 --context 16 --batch-size 2 --checkpoint-every 3 --eval-tokens 32"
    trained = cli("train", "model.yaml", "--data", "text.txt", *options.split(), "--out", "run")
    assert trained.status == 130, trained.err
    assert "stopped after step 297" in trained.err
    assert Path("run/metrics.jsonl").read_text() == before  # the next line is due at step 300
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {
        "step-000294",
        "step-000297",
    }


def test_a_token_cache_is_used_and_not_built_again(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("the text was tokenized again")

    monkeypatch.setattr(TokenCache, "build", build)
    before = contents(written / "cache", "*")
    data = archdsl.load_data("text.txt")
    assert data.vocab_size == 257
    batch = data.batch(0, 1, 16, seed=0)
    assert batch.tokens_BT.shape == (1, 16)
    assert contents(written / "cache", "*") == before


class InThisProcess(Machine):
    """Trains without worker processes, which would take seconds to start."""

    @contextmanager
    def pool(self) -> Iterator[InProcess]:
        yield InProcess()


def search(trials: int, out: str = "study", store: str | None = None) -> SearchReport:
    """The call that wrote the old study, but for the number of trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archdsl.search.report.report.plot", lambda result, folder: [])
        return archdsl.search(
            "small.yaml",
            budget=Budget(params=60_000),
            proxy=Proxy(dim=16, head_size=8, tasks={"skill": TASK}),
            seeds=2,
            trials=trials,
            out=Path(out),
            store=Path(store) if store else None,
            seconds=None,
            machine=InThisProcess(),
        )


def rungs_of(result: dict[str, object]) -> list[object]:
    trials = result["trials"]
    assert isinstance(trials, list)
    return [(trial["values"], trial["rungs"], trial["fingerprint"]) for trial in trials]


def test_a_study_continues_and_keeps_its_trials(written: Path) -> None:
    old = json.loads((written / "study/result.json").read_text())
    scores = contents(written / "study/proxies", "step-*.json")
    assert len(old["trials"]) == 3
    report = search(trials=4)
    new = json.loads((written / "study/result.json").read_text())
    assert len(report.trials) >= 4
    assert rungs_of(new)[:3] == rungs_of(old)  # with the seconds that each of them took
    now = contents(written / "study/proxies", "step-*.json")
    assert {file: now[file] for file in scores} == scores
    assert set(now) > set(scores)


def test_a_study_is_shown(cli: Cli) -> None:
    shown = cli("study", "show", "study")
    assert shown.status == 0, shown.err
    assert "Pareto front" in shown.out
    (listed,) = cli("study", "ls", ".", "--json").json
    assert (listed["name"], sum(listed["outcomes"].values())) == ("small-b3ae649a", 3)
    assert listed["spent"]["train_flops"] > 0


def test_scores_of_the_result_store_are_used_again(written: Path) -> None:
    before = contents(written / "study/proxies", "step-*.json")
    report = search(trials=3, out="another", store="study/proxies")
    assert report.spending.total.train_flops == 0
    assert contents(written / "study/proxies", "step-*.json") == before
