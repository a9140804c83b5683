"""import."""

from __future__ import annotations

from pathlib import Path

import pytest

from archdsl.data.loading import load_data
from archdsl.interop.hf_export import export
from tests.cli.command import Cli
from tests.interop.test_hf_export import saved
from tests.interop.test_import_weights import pretrained


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pretrained(tmp_path / "model", num_key_value_heads=2)
    return tmp_path / "model"


def test_imports_and_says_what_came_in_and_what_to_do_next(cli: Cli, source: Path) -> None:
    found = cli("import", source, "--out", "made", "--name", "mine", "--context", "256")
    assert found.status == 0, found.err
    assert found.out.splitlines() == [
        "mine, a pretrained llama",
        "  parameters  27,816",
        "  context     256",
        "  tokenizer   257 tokens of 300",
    ]
    assert "wrote made; next: archdsl build made/spec.yaml" in found.err
    assert "27,816" in cli("build", "made/spec.yaml").out


def test_json_has_the_same_facts(cli: Cli, source: Path) -> None:
    found = cli("import", source, "--out", "made", "--json").json
    assert found["parameters"] == 27_816
    assert (found["checkpoint"], found["name"], found["context"]) == ("made", "model", 512)
    assert len(found["files"]["model.safetensors"]) == 64


def test_what_is_there_is_replaced_only_when_told(cli: Cli, source: Path) -> None:
    assert cli("import", source, "--out", "made").status == 0
    again = cli("import", source, "--out", "made", "--context", "9")
    assert (again.status, again.err) == (
        1,
        "made is not empty; --force replaces the checkpoint in it\n",
    )
    assert cli("import", source, "--out", "made", "--context", "9", "--force").status == 0
    assert "context: 9" in Path("made/spec.yaml").read_text()


def test_a_mistake_is_one_line(cli: Cli) -> None:
    found = cli("import", "nowhere", "--out", "made")
    assert (found.status, found.out) == (1, "")
    assert found.err.startswith("nowhere does not exist: expected a folder with config.json")
    assert not Path("made").exists()


def test_the_commands_go_on_with_what_was_exported(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "words.txt"
    data.write_text("some words\n" * 200)
    export(saved(tmp_path / "own", load_data(str(data))), tmp_path / "exported")
    found = cli("import", tmp_path / "exported", "--out", "back")
    assert found.status == 0, found.err
    assert found.out.splitlines()[0] == "tiny, an exported archdsl model"
    assert cli("generate", "back", "some", "--max-tokens", "3").status == 0
    swept = cli("eval", "back", "--data", data, "--sweep", "--tokens", "256")
    assert swept.status == 0, swept.err
