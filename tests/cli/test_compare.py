"""compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import SKILL, Cli
from tests.cli.test_ablate import Pool

LAYER = "{kind: layer, attention: {head_size: 4}, ffn: {ratio: 2}}"
SPEC = "name: NAME\nvocab_size: 300\ncontext: 16\ndim: 8\nblocks:\n"
MODELS = {
    "plain": f"  - {LAYER}\n",
    "deep": f"  - {LAYER}\n  - {LAYER}\n",
    "loop": f"  - {{kind: loop, steps: 2, body: {LAYER}}}\n",
}
OPTIONS = ["--data", SKILL, "--proxy", "none", "--tokens", "3072", "--batch-size", "32"]


@pytest.fixture
def specs(cli: Cli) -> list[str]:
    for name, blocks in MODELS.items():
        Path(f"{name}.yaml").write_text(SPEC.replace("NAME", name) + blocks)
    return [f"{name}.yaml" for name in MODELS]


def train_at_most(monkeypatch: pytest.MonkeyPatch, trainings: int) -> None:
    @contextmanager
    def pool(workers: int, memory: int | None = None) -> Iterator[Pool]:
        yield Pool(trainings)

    monkeypatch.setattr("archdsl.search.analysis.comparison.process_pool", pool)
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)


def test_goes_on_and_adds_seeds(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, specs: list[str]
) -> None:
    options = [*OPTIONS, "--context", "8", "--out", "there"]
    train_at_most(monkeypatch, 4)
    part = cli("compare", *specs, *options, "--seeds", "2")
    assert part.status == 130
    said = " ".join(part.out.split())
    assert "missing 2 trainings; run the same command again" in said
    assert "for all models, which can favour one of them" in said
    assert "With one seed there is no interval" in said
    train_at_most(monkeypatch, 2)
    whole = cli("compare", *specs, *options, "--seeds", "2", "--json")
    assert whole.status == 0, whole.err
    assert whole.json == json.loads(Path("there/result.json").read_text())
    found = whole.json["tasks"]["data"]
    assert list(found) == list(MODELS)
    assert found["deep"]["difference"]["seeds"] == 2
    assert len(found["plain"]["scores"][0]["held_out"]) == 12
    page = Path("there/report.html").read_text()
    assert all(sentence in page for sentence in whole.json["sentences"].values())
    train_at_most(monkeypatch, 3)
    assert cli("compare", *specs, *options, "--seeds", "3").status == 0


def test_machines_share_the_trainings_by_a_database(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, specs: list[str]
) -> None:
    common = ["compare", *specs[:2], *OPTIONS, "--context", "8", "--seeds", "2", "--json"]
    storage = ["--storage", "sqlite:///shared.db"]
    monkeypatch.setattr("archdsl.search.compare.write_report", lambda report: None)  # it is slow
    train_at_most(monkeypatch, 1)
    assert cli(*common, "--out", "a").json["missing"] == 3  # without the database
    train_at_most(monkeypatch, 1)
    assert cli(*common, *storage, "--out", "a").json["missing"] == 2  # it claimed the third, too
    train_at_most(monkeypatch, 2)
    whole = cli(*common, *storage, "--out", "b")
    assert whole.status == 0, whole.err
    train_at_most(monkeypatch, 0)
    assert cli(*common, *storage, "--out", "a").json["tasks"] == whole.json["tasks"]
    train_at_most(monkeypatch, 6)
    plan = cli(*common, *storage, "--plan", "--out", "a").json
    train_at_most(monkeypatch, 0)
    assert cli(*common, *storage, "--plan", "--out", "b").json == plan
    refused = cli(*common, "--storage", "nosuch", "--out", "c")
    assert (refused.status, refused.out) == (2, "")
    assert "storage: must be the URL of a database" in " ".join(refused.err.split())


def reversed_pairs(words: list[str]) -> list[str]:
    return [word for i in range(len(words) - 2, -1, -2) for word in words[i : i + 2]]


def test_models_are_compared_at_the_learning_rates_that_are_best_for_each(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, specs: list[str]
) -> None:
    rates = ["--lr", "0.01", "--lr", "0.001", "--lr", "1e-9"]
    common = ["compare", *specs[:2], *OPTIONS, "--context", "8", "--seeds", "1", *rates]
    train_at_most(monkeypatch, 4)
    part = cli(*common, "--json")
    assert (part.status, part.json["missing"], part.json["tasks"]) == (130, 2 + 2, {})
    train_at_most(monkeypatch, 2 + 2)
    whole = cli(*common, "--json")
    assert (whole.status, whole.json["missing"]) == (0, 0), whole.err
    for found in whole.json["lr"]["data"].values():
        losses = {float(lr): loss for lr, loss in found["losses"].items()}
        assert list(losses) == [1e-9, 0.001, 0.01]
        assert losses[found["chosen"]] == min(losses.values()) < losses[1e-9]
    train_at_most(monkeypatch, 0)
    said = " ".join(cli(*common[:-6], *reversed_pairs(rates)).out.split())
    assert "of 1e-09, 0.001, 0.01 the one with the model's lowest held-out loss" in said
    assert "plain, deep: at the end of the range, so give a wider one" in said
    ended = lambda jobs, *_: ({k: j.stored_score() for k, j in jobs.items()}, True)  # noqa: E731
    with monkeypatch.context() as patch:  # Ctrl-C when all rates are known
        patch.setattr("archdsl.search.compare.run_trainings", ended)
        again = cli(*common, "--json")
        assert (again.status, again.json["missing"], again.json["interrupted"]) == (130, 0, True)
    train_at_most(monkeypatch, 6)
    assert cli(*common, "--plan", "--json").json["trainings"] == 2 * (3 + 1)


def test_a_plan_is_a_part_of_the_comparison(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, specs: list[str]
) -> None:
    options = [*OPTIONS, "--context", "8", "--out", "there", "--json"]
    train_at_most(monkeypatch, 9)
    plan = cli("compare", *specs, *options, "--plan", "--seeds", "4").json
    assert (plan["trainings"], plan["share"]) == (12, 0.25)
    assert set(plan["tasks"]["data"]["needed"]) == {"0.1", "0.05", "0.02", "0.01"}
    train_at_most(monkeypatch, 9)
    after = cli("compare", *specs, *options, "--seeds", "3").json
    alone = cli("compare", *specs, *options, "--seeds", "3", "--out", "alone").json
    for name in MODELS:
        assert after["tasks"]["data"][name]["loss"] == alone["tasks"]["data"][name]["loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plain.yaml"], "at least two specs"),
        (["plain.yaml", "plain.yaml"], "two specs have the name 'plain'"),
        (["plain.yaml", "loop.yaml", "--reference", "deep"], "must be one of plain, loop"),
        (["plain.yaml", "loop.yaml", "--set", "dim=7"], "plain.yaml"),
        (["plain.yaml", "loop.yaml", "--proxy", "none", "--context", "64"], "takes at most 16"),
        (["itt", "loop.yaml", "--match", "flops", "--proxy", "none"], "more than 64 times"),
        (["plain.yaml", "loop.yaml", "--context", "1"], "context: must be at least 2 tokens"),
    ],
)
def test_a_mistake_is_said_before_training(
    cli: Cli, specs: list[str], arguments: list[str], said: str
) -> None:
    found = cli("compare", *arguments, "--data", SKILL)
    assert (found.status, found.out) == (1 if "64" in arguments else 2, "")
    assert said in found.err
    assert not Path("runs").exists()
