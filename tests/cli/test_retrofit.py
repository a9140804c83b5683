"""retrofit, and train from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import SKILL, Cli

PLAIN = """
name: plain
vocab_size: 257
context: 16
dim: 16
blocks:
  - {kind: stack, repeat: 4, body: [{kind: layer, attention: {head_size: 8}, ffn: {hidden: 24}}]}
"""


@pytest.fixture
def made(cli: Cli) -> Cli:
    """A folder with a checkpoint called base."""
    Path("plain.yaml").write_text(PLAIN)
    assert cli("build", "plain.yaml", "--out", "base").status == 0
    return cli


def test_grafts_and_trains_what_is_new(made: Cli) -> None:
    found = made("retrofit", "base", "itt-overlay", "--out", "grown", "--json")
    assert found.status == 0, found.err
    facts = found.json
    assert facts["layers"] == [1, 3]
    assert facts["logits_differ_by"] == 0
    assert facts["parameters"]["new"] == 2 * (4 + 3) * 16
    assert "archdsl train grown --only new" in found.err
    assert Path("grown/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    record = json.loads(Path("grown/provenance.json").read_text())["retrofit"]
    weights = json.loads(Path("base/provenance.json").read_text())["files"]["model.safetensors"]
    assert record["base"]["files"]["model.safetensors"] == weights
    assert record["overlay"]["layers"] == {"every": 2, "first": 1}

    train = ["train", "grown", "--data", SKILL, "--context", "8", "--steps", "2", "--only", "new"]
    assert made(*train, "--out", "run").status == 0
    assert "run was complete already" in made(*train, "--out", "run").err
    assert made("eval", "run/final", "--context", "8").status == 0


def test_says_in_words_what_it_did(made: Cli) -> None:
    found = made("retrofit", "base", "itt-overlay", "--set", "layers=[2]", "--out", "grown")
    assert found.out.splitlines()[0] == "plain-itt: loops on layers 2"
    assert "112 new" in found.out
    assert "differ by at most 0.0e+00 of the largest logit" in found.out


def test_layers_become_prelude_core_and_coda(made: Cli) -> None:
    sizes = ["--set", "prelude=1", "--set", "core=1", "--set", "coda=1"]
    found = made("retrofit", "base", "retrofit-recurrence-overlay", *sizes, "--out", "deep")
    assert found.status == 0, found.err
    first, parameters = found.out.splitlines()[:2]
    assert first == "plain-recurrence: loops on layers 2; without layers 1"
    assert parameters.endswith("512 new")
    assert "archdsl train deep --only all" in found.err
    found = made("retrofit", "base", "retrofit-recurrence-overlay", "--out", "deeper")
    assert found.status == 1
    assert "prelude, core and coda take 8 layers, and there are 4" in found.err


def test_nothing_is_written_where_something_is_wrong(made: Cli) -> None:
    retrofit = ["retrofit", "base", "itt-overlay", "--out"]
    found = made(*retrofit, "grown", "--set", "loop.encoding.init=1", "--set", "layers=[x]")
    assert found.status == 2
    assert len(found.err.splitlines()) == 1  # the layers; the graft is judged once it is one
    found = made(*retrofit, "grown", "--set", "loop.encoding.init=1")
    assert found.status == 2
    assert "loop.encoding.init: must be 0: further steps are silent at first; got 1" in found.err
    assert made(*retrofit, "grown", "--set", "layers=[9]").status == 1
    assert not Path("grown").exists()

    before = Path("base/provenance.json").read_bytes()
    assert "--force replaces" in made(*retrofit, "base").err
    assert Path("base/provenance.json").read_bytes() == before


def test_an_overlay_is_no_spec(made: Cli) -> None:
    for command in (["build"], ["train"], ["search"]):
        found = made(*command, "itt-overlay")
        assert found.status == 2
        assert found.err.count("\n") == 1
        assert "archdsl retrofit CHECKPOINT itt-overlay --out FOLDER" in found.err


def test_a_checkpoint_keeps_its_spec_and_its_tokenizer(made: Cli) -> None:
    for option, value in (("--set", "dim=32"), ("--tokenizer", "bytes")):
        found = made("train", "base", option, value)
        assert found.status == 1
        assert (
            f"base is a checkpoint, which {option} cannot change: leave {option} out" in found.err
        )


def test_a_text_is_read_with_the_tokenizer_of_the_checkpoint(
    made: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, str]] = []

    def load_data(source: str | None, *, tokenizer: str) -> None:
        asked.append((source, tokenizer))
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.evaluation.data_choice.load_data", load_data)
    made("train", "base")
    made("train", "base", "--data", "other.txt")
    assert asked == [(None, "base/tokenizer.json"), ("other.txt", "base/tokenizer.json")]
