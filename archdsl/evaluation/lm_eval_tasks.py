"""Load tasks of lm-evaluation-harness (the extra ``lm-eval``).

Their examples come from the Hugging Face Hub, or from a folder of JSON lines that is organised by
task or by dataset, as the Hub names it:

    FOLDER/arc_easy/test.jsonl
    FOLDER/allenai/ai2_arc/ARC-Easy/test.jsonl

Each line is one example: a JSON object with the fields that it has on the Hub. There is one file
per split. The split that is scored is required. The split that few-shot examples are taken from is
required if there are any. Only tasks that the harness ships can be run, as others could contain
code.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from archdsl.errors import ArchdslError, describe, did_you_mean
from archdsl.files import refuse_no_file


class TaskError(ArchdslError):
    """A task is unknown, its examples are missing or damaged, or the model cannot run it."""


SHIPPED = Path(lm_eval.tasks.__file__).parent
SEED = 1234  # of the choice of few-shot examples, as in the harness
HUB_TIMEOUT = 5.0  # seconds
LOCAL_EXAMPLES = "use --data-dir FOLDER to read FOLDER/TASK/SPLIT.jsonl instead"

Tasks = dict[str, dict[str, Any]]  # the harness's tasks, groups and members of groups, by name


def load_tasks(
    names: Sequence[str], *, data_dir: Path | None = None, num_fewshot: int | None = None
) -> Tasks:
    """Load tasks, groups and tags of the harness by name, with all their examples.

    ``data_dir``: the folder with the examples; default: the Hugging Face Hub.
    ``num_fewshot``: solved examples in front of each question; default: the number that each task
    defines, which is mostly 0.

    Raises TaskError if a name is unknown or the Hub cannot be reached (both before anything is
    downloaded), and if examples are missing or damaged.
    """
    if not names:
        raise TaskError("no task was given; one task of lm-evaluation-harness is arc_easy")
    manager = _manager(names)
    for name in names:
        _check(manager, name)
    if data_dir is None:
        _reach_hub()
    found: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    with _examples_in(data_dir):
        for name in names:
            loaded = _load(manager, name)
            found = {part: known | loaded[part] for part, known in found.items()}
    for name, task in found["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"task {name} needs images or sounds; archdsl models read only text")
        _set_shots(name, task, num_fewshot)
    return found


def _manager(names: Sequence[str]) -> TaskManager:
    """Return a task manager that knows the given names, if they exist.

    It reads only the folders whose files mention one of the names, as reading all 14,000 tasks
    takes half a minute. If a name is a group, all are read: its members may be in any folder.
    """
    mention = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names).encode())
    files = [file for file in SHIPPED.rglob("*.yaml") if mention.search(file.read_bytes())]
    folders = {SHIPPED / file.relative_to(SHIPPED).parts[0] for file in files}
    # If two folders define a name the first one counts, but the manager keeps what it reads last.
    few = TaskManager(include_defaults=False, include_path=sorted(folders, reverse=True))
    kinds = {few.task_index[name].kind.name for name in names if name in few.task_index}
    return TaskManager() if "GROUP" in kinds else few


def _check(manager: TaskManager, name: str) -> None:
    if name not in manager.task_index:
        stems = (file.stem for file in SHIPPED.rglob("*.yaml"))
        alike = [stem for stem in stems if stem[:2] == name[:2]]
        raise TaskError(f"lm-evaluation-harness has no task {name!r}{did_you_mean(name, alike)}")
    # Check this before loading the task, which would download what runs the code.
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise TaskError(f"task {name} runs code that the model writes, which archdsl does not do")


def _load(manager: TaskManager, name: str) -> Tasks:
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise TaskError(f"task {name}: {_line(error)}; {LOCAL_EXAMPLES}") from None
    except ArchdslError:
        raise
    except Exception as error:  # the templates and functions of a task may raise anything
        raise TaskError(
            f"task {name} cannot be loaded, {type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _reach_hub() -> None:
    """Raise TaskError if the Hub cannot be reached.

    One request is enough. The Hub's own library would try each file for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # then only files that were downloaded before are used
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # the Hub answered
    except OSError as error:
        raise TaskError(
            f"{constants.ENDPOINT}, which has the examples of the tasks, cannot be reached "
            f"({_line(error)}): {LOCAL_EXAMPLES}, or set HF_HUB_OFFLINE=1 to use the files that "
            "were downloaded before"
        ) from None


@contextmanager
def _examples_in(folder: Path | None) -> Iterator[None]:
    """Make tasks read their examples from ``folder``, for the duration of the context."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise TaskError(f"--data-dir {folder}: this folder does not exist")
    before = ConfigurableTask.download
    ConfigurableTask.download = _from(folder)
    try:
        yield
    finally:
        ConfigurableTask.download = before


def _from(folder: Path) -> Callable[..., None]:
    def download(task: Any, *_: object, **__: object) -> None:
        task.dataset = _splits(task, folder)

    return download


def _splits(task: Any, folder: Path) -> Any:
    from datasets import Dataset, DatasetDict

    config = task.config
    scored = config.test_split or config.validation_split
    dataset = filter(None, (config.dataset_path, config.dataset_name))
    places = [folder / config.task, folder.joinpath(*dataset)]
    place = next((place for place in places if place.is_dir()), None)
    if place is None or not (place / f"{scored}.jsonl").is_file():
        files = " or ".join(str(place / f"{scored}.jsonl") for place in places)
        raise TaskError(f"the examples of task {config.task} are missing; expected {files}")
    # The harness opens every split, even those it does not use.
    splits = {config.training_split, config.validation_split, config.test_split}
    splits.add(task.fewshot_cfg.split)
    rows = {split: _rows(place / f"{split}.jsonl") for split in splits if split}
    if not rows[scored]:
        raise TaskError(f"{place / f'{scored}.jsonl'} is empty")
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the examples in a file; none if the file does not exist."""
    refuse_no_file(path, TaskError)
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as lines:
            return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text: {error}") from None


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: this line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where}: an example must be a JSON object, got {describe(row)}")
    return row


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """Set the number of few-shot examples as the harness's command does.

    A task that itself defines 0 keeps 0.
    """
    own = task.get_config("num_fewshot")
    used = own or 0 if shots is None or own == 0 else shots
    task.set_config(key="num_fewshot", value=used)
    found = len(list(task.fewshot_docs())) if used else 0
    if used > found:
        raise TaskError(
            f"task {name}: {used} few-shot examples were requested, but it has only {found}"
        )
