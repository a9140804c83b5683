"""``--config``: what is wrong in the file is told with its line and column."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import archdsl
from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.config import check_config
from archdsl.lang.source import parse
from archdsl.lang.strict import Strict
from archdsl.search.config import SearchConfig
from archdsl.training.config import TrainConfig
from archdsl.training.train_file import TrainFile
from tests.cli.command import SKILL, Cli

PYDANTIC = ("Input should", "Value error", "Assertion failed", "instance of", "valid")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archdsl.search.workers.pool.start_server", lambda: None)


WRONG_IN_SEARCH = [
    ("objective: flops", "1:12: objective: flops: write loss for one figure"),
    ("objective: [loss, 3]", "1:12: objective: loss,3: write loss for one figure"),
    ("proxy: dim", "1:8: proxy: dim: 'dim' is not understood"),
    ("proxy: steps=0", "1:8: proxy: steps=0: 'steps=0' is not understood"),
    ("proxy: head_size=1", "1:8: proxy: head_size=1: head_size: must be at least 2, got 1"),
    ("storage: nosuch", "1:10: storage: must be the URL of a database, such as postgresql+"),
    ("storage: mysql+nosuch://host/name", "1:10: storage: "),
    ("space: tinny", "1:8: space: tinny: no such file (did you mean 'tiny'?)"),
    ("space: .", "1:8: space: .: is a directory"),
    ("data: nosuch.txt", "1:7: data: no file or folder 'nosuch.txt'"),
    ("data: skill:hop", "1:7: data: unknown skill 'hop'"),
    ("data: ''", "1:7: data: "),
    ("out: search.yaml", "1:6: out: search.yaml cannot be used as a folder: File exists"),
    ("store: search.yaml", "1:8: store: search.yaml cannot be used as a folder: File exists"),
    ("budget_of: params", "1:12: budget_of: says what the budget counts, but no budget is given"),
    ("out: 3", "1:6: out: must be the path of a folder, got 3"),
]


@pytest.mark.parametrize(("line", "message"), WRONG_IN_SEARCH)
def test_a_value_that_is_found_wrong_when_it_is_used_has_its_place(
    cli: Cli, line: str, message: str
) -> None:
    rest = f"\ntrials: 1\n{'' if line.startswith('data') else f'data: {SKILL}'}\n"
    Path("search.yaml").write_text(line + rest)
    found = cli("search", "--config", "search.yaml")
    assert found.status in (1, 2)
    assert found.out == ""
    assert found.err.startswith(f"search.yaml:{message}")
    assert found.err.count("\n") == 1

    with pytest.raises(ArchdslError) as error:
        archdsl.search(config="search.yaml")
    assert f"{error.value}\n" == found.err


def test_a_forecast_tells_the_same(cli: Cli) -> None:
    for line, message in WRONG_IN_SEARCH[:3]:
        Path("search.yaml").write_text(line)
        found = cli("search", "--plan", "--config", "search.yaml")
        assert found.err.startswith(f"search.yaml:{message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "flops"], "--objective: flops: write loss"),
        (["--proxy", "dim"], "--proxy: dim: 'dim' is not"),
        (["--data", "nosuch.txt"], "--data: no file or folder 'nosuch.txt'"),
        (["--storage", "nosuch"], "--storage: "),
        (["tinny"], "SPACE: tinny: no such file (did you mean 'tiny'?)"),
    ],
)
def test_an_option_that_replaces_it_is_named_instead(
    cli: Cli, options: list[str], message: str
) -> None:
    Path("search.yaml").write_text(f"data: {SKILL}\nobjective: loss\n")
    assert cli("search", "--config", "search.yaml", *options).err.startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("device: cuda:7", "1:9: device: cuda:7: is not available; use cpu"),
        ("context: 9999", "1:10: context: a context of 9,999 tokens was requested"),
        ("context: 2", "1:10: context: skill:p-hop,length=8,hops=1,alphabet=3 needs a context"),
        ("only: new", "1:7: only: new trains the parameters"),
        ("accumulate: 3", "1:13: accumulate: "),
    ],
)
def test_so_it_is_for_a_training(cli: Cli, line: str, message: str) -> None:
    Path("train.yaml").write_text(f"{line}\nsteps: 1\n")
    found = cli("train", "tiny", "--data", SKILL, "--config", "train.yaml")
    assert found.status != 0
    assert found.err.splitlines()[-1].startswith(f"train.yaml:{message}")


def complaint(kind: type[Strict], text: str) -> str:
    """What is said of a config; empty if it is right."""
    try:
        check_config(kind, parse(text, "c.yaml"))
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [SearchConfig, TrainFile])
def test_every_wrong_value_is_told_in_plain_words(kind: type[Strict]) -> None:
    values = ("null", "3", "-1", "1.5", "word", "''", "[]", "[1]", "{a: 1}", "yes", "true")
    for name in kind.model_fields:
        found = [complaint(kind, f"{name}: {value}") for value in values]
        told = [text for text in found if text]
        assert len(told) > 4, name
        assert all(text.startswith(f"c.yaml:1:{len(name) + 3}: {name}") for text in told), told
        said = [text.replace(name, "") for text in told]
        assert not [text for text in said if any(words in text for words in PYDANTIC)]


def test_a_spec_that_is_given_as_a_config_is_recognised(cli: Cli) -> None:
    Path("own.yaml").write_text("# mine\nextends: tiny\ndim: 32\n")
    for command in (["search"], ["train", "tiny"]):
        found = cli(*command, "--config", "own.yaml")
        assert found.status == 2
        assert found.err.startswith(
            "own.yaml:2:10: this looks like a model spec, for it has the key 'extends'. "
        )
        assert "A spec is the argument of the command and does not go with --config" in found.err
        assert found.err.count("\n") == 1
    with pytest.raises(SpecError, match=r"^own\.yaml:2:10: this looks like a model spec"):
        archdsl.search(config="own.yaml")


def test_a_config_that_is_given_as_a_spec_is_recognised(cli: Cli) -> None:
    Path("train.yaml").write_text("# mine\nsteps: 1\ncontext: 64\n")
    for command in ("build", "train", "search", "ablate", "check"):
        found = cli(command, "train.yaml")
        assert found.status == 2
        assert found.err.startswith("train.yaml:2:1: this does not look like a model spec, which")
        assert "got steps, context. A file of settings goes with --config" in found.err
        assert found.err.count("\n") == 1


def test_a_config_sets_nothing_in_the_space(cli: Cli) -> None:
    Path("search.yaml").write_text("set: {dim: 64}\nseed: x\n")
    found = cli("search", "--config", "search.yaml").err.splitlines()
    assert found == [
        "search.yaml:1:6: set: is no setting: write it into the spec, or give --set PATH=VALUE",
        "search.yaml:2:7: seed: must be a whole number, got 'x'",
    ]


@pytest.mark.parametrize(("command", "kind"), [("search", SearchConfig), ("train", TrainConfig)])
def test_the_options_below_it_are_the_keys(cli: Cli, command: str, kind: type[Strict]) -> None:
    below = cli(command, "--help").out.partition("  --config ")[2]
    options = re.findall(r"^  --([a-z-]+)", below, re.MULTILINE)
    argument = {"space"} & set(kind.model_fields)
    named = {option.replace("-", "_") for option in options} | argument
    assert named - {"plugin", "help"} == set(kind.model_fields)
