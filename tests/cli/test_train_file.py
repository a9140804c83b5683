"""``archdsl train run.yaml``: everything that a training takes, in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archdsl.errors import ArchdslError
from archdsl.lang.source import dump, parse
from archdsl.model.checkpoint import Checkpoint, load_checkpoint
from archdsl.training.train_file import train_plan
from tests.cli.command import SKILL, Cli

FILE = f"""\
model:
  extends: small.yaml
  set: {{blocks.1.steps: 2}}
data: {SKILL}
out: runs/mine
steps: 4
batch_size: 2
eval_tokens: 64
lr: 2e-3
betas: [0.8, 0.9]
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("{extends: tiny, name: small, dim: 16, context: 16}\n")
    Path("run.yaml").write_text(FILE)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder)).model.state_dict()


def test_a_train_file_gives_the_run_of_the_command_and_leaves_a_file_that_does_so_too(
    cli: Cli,
) -> None:
    found = cli("train", "run.yaml", "--set", "model.dim=32", "--set", "steps=3", "--lr", "1e-3")
    assert found.status == 0, found.err
    options = ["--steps", "3", "--batch-size", "2", "--eval-tokens", "64", "--lr", "1e-3"]
    options += ["--betas", "[0.8, 0.9]", "--set", "blocks.1.steps=2", "--set", "dim=32"]
    found = cli("train", "small.yaml", "--data", SKILL, "--out", "command", *options)
    assert found.status == 0, found.err

    left = Path("runs/mine/run.yaml")
    assert "was complete already" in cli("train", left).err
    elsewhere = parse(left.read_text()).value | {"out": "again"}
    Path("again.yaml").write_text(dump(elsewhere))
    assert train_plan("again.yaml").run().steps == 3
    for folder in ("command", "again"):
        for name, tensor in weights("runs/mine/final").items():
            assert tensor.equal(weights(f"{folder}/final")[name]), (folder, name)


def test_a_train_file_may_train_a_checkpoint_further(cli: Cli) -> None:
    assert cli("train", "run.yaml").status == 0
    assert "did you mean runs/mine/final?" in cli("train", "runs/mine").err
    Path("more.yaml").write_text(f"model: runs/mine/final\nsteps: 1\nout: more\ndata: {SKILL}\n")
    plan = train_plan("more.yaml")
    assert isinstance(plan.model, Checkpoint)
    assert plan.model.path == Path("runs/mine/final")
    assert plan.run().steps == 1
    again = train_plan("more/run.yaml")
    assert isinstance(again.model, Checkpoint)
    assert again.model.weights_digest == plan.model.weights_digest
    with pytest.raises(ArchdslError, match="checkpoint, whose tokenizer cannot be changed"):
        train_plan("more.yaml", ["tokenizer=bytes"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("steps: 4", "stepps: 4"), [], "run.yaml:6:9: stepps: unknown key (did you mean 'steps'"),
        (("lr: 2e-3", "lr: fast"), [], "run.yaml:9:5: lr: must be a number, got 'fast'"),
        (("small.yaml", "tinny"), [], "run.yaml:2:12: extends: tinny: no such file"),
        (("blocks.1.steps: 2", "dim: 0"), [], "run.yaml:3:14: dim: must be at least 1, got 0"),
        ((SKILL, "nosuch.txt"), [], "run.yaml:4:7: data: no file or folder 'nosuch.txt'"),
        ((SKILL, "{a: 1}"), [], "run.yaml:4:7: data: must be SOURCE, or a list of SOURCE:WEIGHT"),
        (("", ""), ["--data", "nosuch.txt"], "--data: no file or folder 'nosuch.txt'"),
        (("", ""), ["--lr", "fast"], "--lr: must be a number, got 'fast'"),
        (("", ""), ["--set", "model.dim=x"], "--set model.dim=x: dim: must be a whole number"),
        (("", ""), ["--set", "dim=8"], "--set dim=8: dim: is a value of the spec, which is below"),
        (("", ""), ["--config", "run.yaml"], "run.yaml is a train file, so its settings do not"),
    ],
)
def test_what_is_wrong_has_its_place(
    cli: Cli, change: tuple[str, str], options: list[str], message: str
) -> None:
    Path("run.yaml").write_text(FILE.replace(*change))
    found = cli("train", "run.yaml", *options)
    assert found.status in (1, 2)
    assert found.err.startswith(message)
    assert found.err.count("\n") == 1


def test_the_model_may_be_a_name_beside_the_file_or_a_shipped_one(cli: Cli) -> None:
    Path("folder").mkdir()
    Path("folder/own.yaml").write_text("{extends: tiny, name: own, dim: 16}\n")
    for name, expected in (("own.yaml", "own"), ("small.yaml", "small"), ("tiny", "tiny")):
        Path("folder/run.yaml").write_text(f"model: {name}\ndata: {SKILL}\n")
        assert train_plan("folder/run.yaml").spec.name == expected
    Path("folder/run.yaml").write_text("steps: 4\nmodel: tinny\n")
    found = cli("train", "folder/run.yaml")
    assert found.err.startswith("folder/run.yaml:2:8: model: tinny: no such file (did you mean")


def test_the_file_of_another_run_is_not_replaced(cli: Cli) -> None:
    assert cli("train", "run.yaml").status == 0
    left = Path("runs/mine/run.yaml").read_text()
    assert "belongs to another run" in cli("train", "run.yaml", "--seed", "1").err
    assert Path("runs/mine/run.yaml").read_text() == left
