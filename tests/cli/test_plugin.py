"""``--plugin``, before and after the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Cli
from tests.plugins import PLUGIN, SPEC, registry_of_its_own


@pytest.fixture(autouse=True)
def _mine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("mine.py").write_text(PLUGIN.format(kind="mine"))
    Path("yours.py").write_text(PLUGIN.format(kind="yours"))
    Path("m.yaml").write_text(SPEC.replace("KIND", "mine"))
    with registry_of_its_own(monkeypatch):
        yield


@pytest.mark.parametrize(
    "words",
    [
        ["--plugin", "mine", "build", "m.yaml"],
        ["build", "m.yaml", "--plugin", "mine"],
        ["build", "--plugin=yours", "m.yaml", "--plugin=mine"],
        ["--plugin", "yours", "build", "m.yaml", "--plugin", "mine"],
    ],
    ids=" ".join,
)
def test_it_may_stand_before_or_after_the_command(cli: Cli, words: list[str]) -> None:
    assert cli(*words, "--json").json["name"] == "m"


def test_without_it_the_error_says_how_to_load_a_plugin(cli: Cli) -> None:
    done = cli("build", "m.yaml")
    assert done.status == 2
    assert "unknown kind 'mine' of block" in done.err
    assert "--plugin PACKAGE.MODULE (plugins loaded: none)" in done.err


def test_a_plugin_that_is_not_there_is_an_error_in_one_line(cli: Cli) -> None:
    done = cli("build", "m.yaml", "--plugin", "nowhere")
    assert done.status == 2
    assert done.err.startswith("cannot import the plugin 'nowhere' (named by --plugin or ARCHDSL_")
    assert done.err.count("\n") == 1


def test_its_kinds_are_in_the_catalogue_and_its_commands_know_it(cli: Cli) -> None:
    assert "Does nothing." in cli("blocks", "mine", "--plugin", "mine").out
    for command in (["build"], ["train"], ["search"], ["study", "ls"], []):
        assert "--plugin MODULE" in cli(*command, "--help").out
