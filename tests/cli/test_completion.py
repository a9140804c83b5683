"""What a shell completes where a spec, a checkpoint, a study or a kind stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import Cli
from tests.cli.test_app import HEAVY, OF_SPECS, answer


def typed(line: str) -> dict[str, str]:
    """The environment in which bash asks for completions of the last word of a line."""
    words = line.split(" ")
    return {
        "_ARCHDSL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/tiny/final", "runs/tiny/checkpoints/step-000200", "kept/one"):
        Path(folder).mkdir(parents=True)
        Path(folder, "provenance.json").write_text("{}")
    for folder, name in (("mine", '{"name": "small-1a2b"}'), ("bad", "["), ("odd", '["name"]')):
        Path("runs", folder).mkdir()
        Path("runs", folder, "settings.json").write_text(name)
        Path("runs", folder, "study.journal").touch()
    for file in ("my-spec.yaml", "other.yml", "text.txt", "kept/itt.yaml"):
        Path(file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("build it", ["itt", "itt-230m", "itt-466m"]),
        ("build my", ["my-spec.yaml"]),
        ("build kept/", ["kept/itt.yaml"]),
        ("build text", []),
        ("diff itt my", ["my-spec.yaml"]),
        ("ablate oth", ["other.yml"]),
        ("search sea", ["search"]),
        ("retrofit runs/tiny/final itt", ["itt-overlay"]),
        ("retrofit runs/tiny/final ret", ["retrofit-recurrence-overlay"]),
        ("eval ru", ["runs/tiny/checkpoints/step-000200", "runs/tiny/final"]),
        ("eval kept/o", ["kept/one"]),
        ("train runs/tiny/f", ["runs/tiny/final"]),
        ("check ti", ["tiny"]),
        ("generate --temperature 0 runs/tiny/f", ["runs/tiny/final"]),
        ("study show sm", ["small-1a2b"]),
        ("study best m", ["mine"]),
        ("study rm runs/m", ["runs/mine"]),
        ("study export ", ["bad", "mine", "odd", "small-1a2b"]),
        ("study export mine --as ", ["csv", "jsonl"]),
        ("blocks pre", ["predictor", "prefix"]),
        ("blocks ro", ["rope_scaling", "router"]),
        ("blocks voc", ["vocab_size"]),
        ("train --schedule co", ["constant", "cosine"]),
        ("search --strategy ", ["separate", "shared"]),
        ("build itt --budg", ["--budget", "--budget-of"]),
    ],
)
@pytest.mark.usefixtures("there")
def test_a_shell_completes_what_stands_there(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, there: Path, line: str, completions: list[str]
) -> None:
    monkeypatch.chdir(there)
    for name, value in typed(f"archdsl {line}").items():
        monkeypatch.setenv(name, value)
    found = cli()
    assert (found.status, found.err) == (0, "")
    assert found.out.split() == completions


@pytest.mark.parametrize("line", ["study show m", "eval runs/", "build it"])
@pytest.mark.usefixtures("there")
def test_completion_imports_next_to_nothing(line: str) -> None:
    _, out, modules = answer(**typed(f"archdsl {line}"))
    assert out.strip()
    assert not modules & (HEAVY | OF_SPECS)


def test_a_study_of_a_stranger_is_no_trap(there: Path) -> None:
    from archdsl.cli.completion import studies

    deep = Path("runs/deep")
    deep.mkdir()
    (deep / "study.journal").touch()
    (deep / "settings.json").write_text("[" * 100_000)
    (there / "runs" / "mine" / "settings.json").write_text(json.dumps({"name": 3}))
    assert studies("") == ["bad", "deep", "mine", "odd"]
