"""Tests of loading tasks: examples from a folder, and the errors for missing ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from archdsl.evaluation import lm_eval_tasks
from archdsl.evaluation.lm_eval_tasks import TaskError, load_tasks
from tests.examples import ARC_EASY, GSM8K, PIQA, SHIPPED, write_examples, write_rows

every_folder = lm_eval_tasks._manager


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read only the few tasks that these tests need."""
    folders = [SHIPPED / name for name in ("arc", "piqa", "gsm8k", "humaneval")]
    few = TaskManager(include_defaults=False, include_path=folders)
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda names: few)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "data")


def test_examples_are_found_by_the_name_of_the_task_or_of_its_dataset(folder: Path) -> None:
    found = load_tasks(["arc_easy", "piqa"], data_dir=folder)["tasks"]
    assert list(found["arc_easy"].eval_docs) == ARC_EASY
    assert list(found["piqa"].eval_docs) == PIQA


def test_tasks_and_tags_are_found_without_reading_all_of_them() -> None:
    few = every_folder(["arc_easy", "ai2_arc", "lambada_openai"])
    assert {"arc_easy", "arc_challenge", "ai2_arc", "lambada_openai"} <= set(few.all_tasks)
    assert len(few.all_tasks) < 1000


def test_all_folders_are_read_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The members of a group may be in any folder. Without options the harness reads them all."""
    whole: list[bool] = []

    def manager(**options: Any) -> TaskManager | None:
        whole.append(not options)
        return TaskManager(**options) if options else None

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", manager)
    assert every_folder(["arc_easy"]) is not None
    assert every_folder(["agieval"]) is None  # the manager of all folders
    assert whole == [False, False, True]


def test_a_tag_stands_for_its_tasks(folder: Path) -> None:
    write_rows(folder / "allenai" / "ai2_arc" / "ARC-Challenge" / "test.jsonl", ARC_EASY[:3])
    found = load_tasks(["ai2_arc"], data_dir=folder)["tasks"]
    assert {name: len(task.eval_docs) for name, task in found.items()} == {
        "arc_challenge": 3,
        "arc_easy": 8,
    }


def test_shots_are_drawn_from_their_own_split(folder: Path) -> None:
    [task] = load_tasks(["gsm8k"], data_dir=folder, num_fewshot=2)["tasks"].values()
    prompt = task.fewshot_context(GSM8K[0], num_fewshot=2)
    assert sum(row["question"] in prompt for row in GSM8K[2:]) == 2
    assert task.get_config("num_fewshot") == 2


def test_a_task_that_says_no_shots_keeps_to_it(folder: Path) -> None:
    write_rows(folder / "allenai" / "ai2_arc" / "ARC-Challenge" / "test.jsonl", ARC_EASY)
    loaded = load_tasks(["arc_challenge_chat"], data_dir=folder, num_fewshot=2)["tasks"]
    assert loaded["arc_challenge_chat"].get_config("num_fewshot") == 0


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "no task was given"),
        (["arc_esay"], {}, "has no task 'arc_esay' (did you mean 'arc_easy'?)"),
        (["arc_easy", "nope"], {}, "has no task 'nope'"),
        (["arc_challenge"], {}, "the examples of task arc_challenge are missing; expected "),
        (["arc_challenge"], {}, "ai2_arc/ARC-Challenge/test.jsonl"),
        (["gsm8k"], {"num_fewshot": 8}, "8 few-shot examples were requested, but it has only 7"),
        (["piqa"], {"num_fewshot": 7}, "7 few-shot examples were requested, but it has only 0"),
        (["humaneval"], {}, "runs code that the model writes"),
    ],
)
def test_what_is_missing_is_said(
    folder: Path, names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        load_tasks(names, data_dir=folder, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"goal": "a"\n', r"validation.jsonl:1: this line is not JSON"),
        (b"[" * 100_000, r"validation.jsonl:1: this line is not JSON"),
        (
            b'{"goal": "a"}\n[1]\n',
            r"validation.jsonl:2: an example must be a JSON object, got a list",
        ),
        (b"\xff\n", r"validation.jsonl is not UTF-8"),
        (b"", r"validation.jsonl is empty"),
        (b'{"gaol": "a"}\n', r"task piqa cannot be loaded, UndefinedError: 'goal' is undefined"),
        (b'{"goal": 1}\n{"goal": "a"}\n', r"task piqa cannot be loaded"),
    ],
)
def test_examples_that_are_none_are_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "baber" / "piqa" / "validation.jsonl").write_bytes(content)
    with pytest.raises(TaskError, match=message):
        load_tasks(["piqa"], data_dir=folder)


def test_without_a_folder_the_hub_is_asked_once_and_its_absence_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TaskError, match=r"cannot be reached .*--data-dir FOLDER"):
        load_tasks(["arc_easy"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"task arc_easy: Couldn't reach .*--data-dir FOLDER"):
        load_tasks(["arc_easy"])
    with pytest.raises(TaskError, match="this folder does not exist"):
        load_tasks(["arc_easy"], data_dir=tmp_path / "nowhere")


def test_tasks_that_are_no_part_of_the_harness_are_not_run(folder: Path) -> None:
    """Loading a task runs the code beside its YAML file, so other tasks are refused."""
    (folder / "utils.py").write_text("raise SystemExit")
    own = folder / "own.yaml"
    own.write_text("task: own\ndataset_path: json\ndoc_to_text: !function utils.f\n")
    with pytest.raises(TaskError, match=r"has no task '.*own.yaml'"):
        load_tasks([str(own)], data_dir=folder)
