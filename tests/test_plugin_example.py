"""The example package, installed as a user would, and a module that is only named on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import SKILL

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin"
SPEC = EXAMPLE / "short-conv.yaml"
SMALL = ["--set", "dim=32", "--set", "context=32", "--set", "blocks.0.repeat=1"]

Archdsl = Callable[..., str]

WANTED = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from archdsl.model.checkpoint import load_checkpoint

model = load_checkpoint(Path("run/final")).model.eval()
tokens = torch.arange(20).view(2, 10)
with torch.no_grad():
    save_file({"tokens": tokens, "logits": model(tokens)}, "wanted.safetensors")
    cache, new = model.new_cache(), tokens
    for _ in range(5):
        new = model(new, None, cache)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, new), 1)
print(tokens.tolist())
"""

ALONE = """
import sys
from pathlib import Path

BLOCKED = {"archdsl", "archdsl_short_conv", "pydantic", "optuna"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)


sys.meta_path.insert(0, Blocker())

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

wanted = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not {name.partition(".")[0] for name in sys.modules} & BLOCKED
with torch.no_grad():
    found = model(wanted["tokens"]).logits
print((found - wanted["logits"]).abs().max().item())
print(model.generate(wanted["tokens"], max_new_tokens=5, eos_token_id=None).tolist())
"""


def python(*words: str | Path, folder: Path, path: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where Python finds the project and the example, which is installed beside nothing else."""
    target = tmp_path_factory.mktemp("installed")
    # a build leaves files in the source
    copy = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "plugin")
    how: list[str | Path] = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        target,
        copy,
    ]
    python("-m", "pip", "install", *how, folder=target, path="")
    return os.pathsep.join([str(ROOT), str(target)])


@pytest.mark.slow
def test_its_own_tests_pass(installed: str, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    assert " passed" in python(*words, folder=tmp_path, path=installed)


EACH = """
import json, sys
from archdsl.cli import main

for sys.argv in json.loads(sys.argv[1]):
    try:
        main()
    except SystemExit as end:
        assert not end.code, (sys.argv, end.code)
"""


@pytest.fixture
def archdsl(installed: str, tmp_path: Path) -> Archdsl:
    """Run commands one after the other in a new process, and return what they print."""

    def run(*commands: list[str | Path]) -> str:
        words = json.dumps([["archdsl", *map(str, command)] for command in commands])
        return python("-c", EACH, words, folder=tmp_path, path=installed)

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(f"some {split} words\n" * 50, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_every_command_knows_an_installed_block_and_its_export_needs_nothing_of_it(
    archdsl: Archdsl, installed: str, text: Path, tmp_path: Path
) -> None:
    said = archdsl(["build", SPEC], ["check", SPEC, *SMALL])
    assert "of state for each" in said
    assert "PASS" in said
    how = ["--steps", "2", "--batch-size", "2", "--data", str(text), "--tokenizer", "bytes"]
    archdsl(["train", SPEC, *SMALL, *how, "--out", "run"])
    generate = ["generate", "run/final", "some", "--max-tokens", "4"]
    said = archdsl(generate, ["export", "run/final", "exported"])
    assert "differ from the checkpoint's by at most" in said
    code = (tmp_path / "exported" / "modeling_archdsl.py").read_text()
    assert "Its blocks are also those of archdsl_short_conv" in code

    greedy = python("-c", WANTED, folder=tmp_path, path=installed)
    alone = python("-c", ALONE, "exported", "wanted.safetensors", folder=tmp_path, path="")
    difference, generated = alone.splitlines()[-2:]
    assert float(difference) <= 1e-5
    assert generated == greedy.strip()


SPACE = """
name: small
vocab_size: 300
context: 32
dim: 16
blocks:
  - kind: layer
    attention: {search: {default: conv, choices: {
      conv: {kind: short_conv}, attention: {kind: attention, head_size: 8}}}}
"""


@pytest.mark.slow
def test_a_module_named_on_the_way_reaches_the_workers_of_a_search(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "src" / "archdsl_short_conv", tmp_path / "archdsl_short_conv")
    (tmp_path / "space.yaml").write_text(SPACE)
    how = ["--proxy", "dim=16,head_size=8,repeat=1,steps=2", "--trials", "2", "--seeds", "2"]
    how += [
        "--workers",
        "1",
        "--data",
        SKILL,
        "--time",
        "5m",
        "--out",
        "found",
        "--plugin",
        "archdsl_short_conv",
    ]
    python("-m", "archdsl", "search", "space.yaml", *how, folder=tmp_path, path=str(ROOT))
    found = json.loads((tmp_path / "found" / "result.json").read_text())
    assert "short_conv" in json.dumps(found)
