"""train, eval."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from archdsl.training.config import TrainConfig
from tests.cli.command import SKILL, Cli

ROUTER = "blocks.1.router.kind"


def test_trains_goes_on_and_evaluates(cli: Cli) -> None:
    train = ["train", "tiny", "--data", SKILL, "--context", "8", "--batch-size", "2"]
    trained = cli(*train, "--steps", "2", "--out", "run", "--json")
    assert trained.status == 0, trained.err
    assert trained.json["checkpoint"] == "run/final"
    again = cli(*train, "--steps", "2", "--out", "run", "--json")
    assert again.json["validation"] == trained.json["validation"]
    assert "the run was complete already" in again.err
    assert cli(*train, "--steps", "3", "--out", "run").status == 2

    # the data is that of the training unless said otherwise
    found = cli("eval", "run/final", "--context", "8", "--tokens", "64", "--json").json
    assert found["data"].startswith("skill:p-hop")
    assert "guessing reaches 33.3%" in cli("eval", "run/final", "--context", "8").out


def test_more_steps_go_on_or_the_error_says_how_to(cli: Cli) -> None:
    small = ["train", "tiny", "--data", SKILL, "--context", "8", "--eval-tokens", "64"]
    for schedule in ("constant", "cosine"):
        schedules = [*small, "--schedule", schedule, "--warmup-steps", "1", "--out", schedule]
        assert cli(*schedules, "--steps", "2").status == 0
        more = cli(*schedules, "--steps", "3", "--json")
        if schedule == "constant":
            assert (more.json["steps"], more.json["resumed_from"]) == (3, 2)
        else:
            assert (more.status, more.out) == (2, "")
            assert "config.steps: 2 there, 3 now" in more.err
            assert "`archdsl train cosine/final --steps N --out FOLDER`" in more.err


def test_a_leaking_model_is_scored_both_ways(cli: Cli) -> None:
    cli("build", "tiny", "--set", f"{ROUTER}=top_k", "--out", "made")
    found = cli("eval", "made", "--data", SKILL, "--context", "8")
    assert found.status == 0, found.err
    assert "routing that looks at later tokens" in found.out
    assert "causal routing by the same scores" in found.out
    both = cli("eval", "made", "--data", SKILL, "--context", "8", "--json").json
    assert both["leaks"] is True
    assert both["causal"]["leaks"] is False


def test_a_run_is_not_a_checkpoint_but_knows_where_one_is(cli: Cli) -> None:
    cli("build", "tiny", "--out", "run/final")
    found = cli("eval", "run")
    assert found.status == 1
    assert "did you mean run/final?" in found.err


def test_a_vocabulary_too_small_for_the_data_is_told_the_fix(cli: Cli) -> None:
    found = cli("train", "tiny", "--set", "vocab_size=2", "--data", SKILL)
    assert found.status == 1
    assert re.search(r"but tiny has only a vocab_size of 2. Use --set vocab_size=\d+\n", found.err)
    wanted = re.findall(r"--set (vocab_size=\d+)", found.err)[0]
    fixed = ["--set", wanted, "--data", SKILL, "--context", "8", "--steps", "1"]
    assert cli("train", "tiny", *fixed).status == 0


def test_warns_before_it_takes_more_memory_than_there_is(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [
        "train",
        "tiny",
        "--data",
        SKILL,
        "--context",
        "8",
        "--steps",
        "1",
        "--batch-size",
        "2",
    ]
    assert "warning" not in cli(*train, "--out", "first").err
    monkeypatch.setattr("archdsl.reports.training_memory.installed_memory", lambda: 2**20)
    found = cli(*train, "--out", "second")
    assert found.status == 0
    assert "warning: tiny: a step needs about" in found.err


def test_a_dry_run_says_what_each_device_needs_and_trains_nothing(cli: Cli) -> None:
    train = ["train", "tiny", "--data", SKILL, "--context", "8", "--steps", "10", "--dry-run"]
    found = cli(*train, "--devices", "8", "--out", "none", "--json").json
    assert (found["tokens"], found["sequences_per_device"]) == (10 * 16 * 8, 2)
    assert found["bytes_sent_per_step"]["reduce_scatter"] == 7 * found["training_memory"]["weights"]
    said = " ".join(cli(*train, "--devices", "8", "--out", "none").out.split())
    assert "devices 8, fsdp; 2 sequences per step each" in said
    assert not Path("none").exists()
    refused = cli(*train, "--devices", "64")
    assert refused.status == 2
    assert "batch_size: 16 sequences cannot be divided among 64 devices" in refused.err


@pytest.mark.parametrize(("vocabulary", "choice"), [(257, "bytes"), (4096, "bpe:4096")])
def test_the_tokenizer_fills_the_vocabulary(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, vocabulary: int, choice: str
) -> None:
    asked: list[str] = []

    def load_data(source: str | None, *, tokenizer: str) -> None:
        asked.append(tokenizer)
        raise KeyboardInterrupt

    monkeypatch.setattr("archdsl.evaluation.data_choice.load_data", load_data)
    cli("train", "tiny", "--set", f"vocab_size={vocabulary}")
    assert asked == [choice]


def test_a_training_says_what_it_found_and_reads_the_named_column(cli: Cli) -> None:
    folder = Path("stories")
    folder.mkdir()
    for name, story in (("train", "It was. " * 40), ("dev", "Held out. " * 9), ("test", "Out. ")):
        row = {"id": name, "story": story}
        (folder / f"{name}_0.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "notes.rst").write_text("about the stories")
    train = ["train", "tiny", "--data", "stories", "--context", "8", "--batch-size", "2"]
    sizes = ["--set", "vocab_size=257", "--steps", "1"]
    refused = cli(*train, *sizes)
    assert refused.status == 2
    assert "name the column of the text with --column; the columns are 'id', 'story'" in refused.err
    trained = cli(*train, *sizes, "--column", "story", "--out", "run")
    assert trained.status == 0, trained.err
    for line in (
        "  train: 1 file, 1 document, 322 tokens\n",
        "  validation: 1 file, 1 document, 92 tokens\n",
        "  test: 1 file, 1 document, 7 tokens\n",
        "  left out: 'notes.rst' (another format)\n",
    ):
        assert line in trained.err
    scored = cli("eval", "run/final", "--data", "stories::story", "--json")
    assert scored.json["data"] == "stories::story"


@pytest.mark.parametrize("name", ["/etc/passwd", "hf:owner/data", "its text.jsonl::body"])
@pytest.mark.parametrize("command", [["eval"], ["train"], ["eval", "--sweep"]])
def test_a_checkpoint_does_not_decide_which_data_are_read(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, command: list[str]
) -> None:
    """A checkpoint of a stranger may name any file of the reader."""
    cli("build", "tiny", "--set", "vocab_size=257", "--out", "made")
    monkeypatch.setattr("archdsl.evaluation.data_choice.load_data", None)
    about = json.loads(Path("made/provenance.json").read_text())
    Path("made/provenance.json").write_text(json.dumps(about | {"data": {"name": name}}))
    found = cli(command[0], "made", *command[1:])
    assert found.status == 1
    shown = name if " " not in name else f"'{name}'"
    wanted = f"name them, as in --data {shown}\n"
    assert found.err.endswith(wanted)
    assert f"made was trained on {name!r}." in found.err


def test_every_field_of_the_training_is_an_option(cli: Cli) -> None:
    text = cli("train", "--help").out
    for name in TrainConfig.model_fields:
        assert f"  --{name.replace('_', '-')}" in text


def test_options_are_read_as_yaml(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    seen: list[TrainConfig] = []

    def train(model: Any, data: Any, config: TrainConfig, *_: Any, **__: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    from archdsl.training import run as train_module

    monkeypatch.setattr(train_module, "train", train)
    options = ["--lr", "1e-4", "--clip", "null", "--betas", "[0.8, 0.9]", "--compile"]
    cli("train", "tiny", "--data", SKILL, *options)
    assert seen == [TrainConfig(lr=1e-4, clip=None, betas=(0.8, 0.9), compile=True)]
