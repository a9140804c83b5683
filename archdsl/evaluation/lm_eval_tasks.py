"""Tasks of lm-evaluation-harness (the extra ``lm-eval``), with examples from the Hub or a folder:

    FOLDER/arc_easy/test.jsonl                      under the name of the task, or
    FOLDER/allenai/ai2_arc/ARC-Easy/test.jsonl      of its dataset, as the Hub has it

One example per line, a JSON object with the fields that it has on the Hub; one file per split of
the task's. The split that is scored must be there, and the one that shots are drawn from if there
are any. Only tasks that the harness ships are run: others could bring code along.
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


class TaskError(ArchdslError):
    """A task that cannot be run: unknown, without its data, or not made for this model."""


SHIPPED = Path(lm_eval.tasks.__file__).parent
SEED = 1234  # of the draw of shots; the harness's own
SECONDS = 5.0  # to wait for the Hub
ELSEWHERE = "--data-dir FOLDER reads FOLDER/TASK/SPLIT.jsonl instead"

Tasks = dict[str, dict[str, Any]]  # the harness's tasks, groups and members of groups, by name


def load_tasks(
    names: Sequence[str], *, data_dir: Path | None = None, num_fewshot: int | None = None
) -> Tasks:
    """Tasks, groups and tags of the harness by name, with all their examples.

    ``num_fewshot``: solved examples in front of each; default: each task's own, which mostly is
    none. Raises TaskError before anything is fetched if a name is unknown or the Hub out of reach.
    """
    if not names:
        raise TaskError("no task was named; one of lm-evaluation-harness is arc_easy")
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
            raise TaskError(f"task {name} shows images or plays sounds; models here read text")
        _set_shots(name, task, num_fewshot)
    return found


def _manager(names: Sequence[str]) -> TaskManager:
    """Knows these names, if any does: reading all of the 14,000 tasks takes half a minute."""
    mention = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names).encode())
    files = [file for file in SHIPPED.rglob("*.yaml") if mention.search(file.read_bytes())]
    folders = {SHIPPED / file.relative_to(SHIPPED).parts[0] for file in files}
    # of a name that two folders define the first counts, and the manager keeps what it reads last
    few = TaskManager(include_defaults=False, include_path=sorted(folders, reverse=True))
    kinds = {few.task_index[name].kind.name for name in names if name in few.task_index}
    return TaskManager() if "GROUP" in kinds else few  # whose members may be anywhere


def _check(manager: TaskManager, name: str) -> None:
    if name not in manager.task_index:
        stems = (file.stem for file in SHIPPED.rglob("*.yaml"))
        alike = [stem for stem in stems if stem[:2] == name[:2]]
        raise TaskError(f"lm-evaluation-harness has no task {name!r}{did_you_mean(name, alike)}")
    # known before it is loaded, which would fetch what runs the code
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise TaskError(f"task {name} runs code that models write; archdsl does not")


def _load(manager: TaskManager, name: str) -> Tasks:
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise TaskError(f"task {name}: {_line(error)}; {ELSEWHERE}") from None
    except ArchdslError:
        raise
    except Exception as error:  # whatever a task's templates and functions make of its examples
        raise TaskError(
            f"task {name} cannot be loaded, {type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _reach_hub() -> None:
    """Asks once: the Hub's own library tries for half a minute per file, and logs each time."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # then only what was fetched before is asked for
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except HTTPError:
        return  # an answer
    except OSError as error:
        raise TaskError(
            f"{constants.ENDPOINT}, where the tasks' examples are, cannot be reached "
            f"({_line(error)}): {ELSEWHERE}; HF_HUB_OFFLINE=1 takes what was fetched before"
        ) from None


@contextmanager
def _examples_in(folder: Path | None) -> Iterator[None]:
    """Meanwhile tasks find their examples in ``folder``, and nowhere else."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise TaskError(f"--data-dir {folder}: there is no such folder")
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

    of = task.config
    scored = of.test_split or of.validation_split
    places = [folder / of.task, folder.joinpath(*filter(None, (of.dataset_path, of.dataset_name)))]
    place = next((place for place in places if place.is_dir()), None)
    if place is None or not (place / f"{scored}.jsonl").is_file():
        files = " or ".join(str(place / f"{scored}.jsonl") for place in places)
        raise TaskError(f"task {of.task}: its examples are missing; expected {files}")
    # the harness opens every split, also those that it needs nothing of
    named = {of.training_split, of.validation_split, of.test_split, task.fewshot_cfg.split}
    rows = {split: _rows(place / f"{split}.jsonl") for split in named if split}
    if not rows[scored]:
        raise TaskError(f"{place / f'{scored}.jsonl'} is empty")
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file."""
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
        raise TaskError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where}: an example is a JSON object, got {describe(row)}")
    return row


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """As the harness's own command does; a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    used = own or 0 if shots is None or own == 0 else shots
    task.set_config(key="num_fewshot", value=used)
    found = len(list(task.fewshot_docs())) if used else 0
    if used > found:
        raise TaskError(f"task {name}: {used} shots need as many solved examples, found {found}")
