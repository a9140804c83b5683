"""A train file: everything that ``archdsl train`` takes, as one YAML file.

::

    model: tiny    # the name or path of a spec, a whole spec, or the folder of a checkpoint
    data: [novels:0.8, speeches:0.2]
    out: runs/mixed
    steps: 2k
    lr: 2e-3

The settings are those of `TrainConfig`. Each run keeps the file that gives the same run again, with
every value resolved, as ``run.yaml`` in its folder. Nothing here imports torch before a plan is
made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from archdsl.errors import ArchdslError, Position, Problem, SpecError, blamed_on, describe
from archdsl.files import why_unreadable
from archdsl.lang import source
from archdsl.lang.config import OF_SPECS, check_config
from archdsl.lang.load import load_tree, refuse_other_files
from archdsl.lang.spec import ModelSpec, to_tree
from archdsl.training.config import TrainConfig

if TYPE_CHECKING:
    from archdsl.data.types import Data
    from archdsl.model.checkpoint import Checkpoint
    from archdsl.training.run import TrainResult

RUN_FILE = "run.yaml"  # in the folder of a run
CHECKPOINT = "provenance.json"  # every checkpoint has this file


def _sources(value: Any) -> Any:
    sources = [value] if isinstance(value, str) else value
    if value is None or (
        isinstance(sources, list | tuple)
        and sources
        and all(isinstance(one, str) and one for one in sources)
    ):
        return value if value is None else tuple(sources)
    raise ValueError(f"must be SOURCE, or a list of SOURCE:WEIGHT, got {describe(value)}")


def _folder(value: Any) -> Any:
    if value is None or (isinstance(value, str | os.PathLike) and os.fspath(value)):
        return value if value is None else Path(value)
    raise ValueError(f"must be the path of a folder, got {describe(value)}")


def _model(value: Any) -> Any:
    if value is None or isinstance(value, dict) or (isinstance(value, str) and value):
        return value
    message = "must be a spec, the name or path of one, or the folder of a checkpoint, got "
    raise ValueError(message + describe(value))


class TrainFile(TrainConfig):
    """The values of a train file: the settings of a training, its model, its data and its folder.

    ``model``: as it is written in the file; a spec that it names stands here as a mapping.
    """

    model: Annotated[Any, BeforeValidator(_model)] = Field(
        None, description="a spec, the name or path of one, or the folder of a checkpoint"
    )
    data: Annotated[tuple[str, ...] | None, BeforeValidator(_sources)] = Field(
        None, description="as --data: SOURCE, or a list of SOURCE:WEIGHT"
    )
    column: str | None = Field(None, description="the column of the data that is the text")
    tokenizer: str | None = Field(
        None, description="bytes, bpe:SIZE or the path of a tokenizer.json"
    )
    out: Annotated[Path | None, BeforeValidator(_folder)] = Field(
        None, description="folder of the run; default: runs/ and the name of the spec"
    )

    @property
    def config(self) -> TrainConfig:
        """The settings of the training alone."""
        names = TrainConfig.model_fields
        return TrainConfig.model_construct(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TrainPlan:
    """A training that is ready to start.

    ``text``: the train file that gives the same run, with every value resolved.
    """

    model: ModelSpec | Checkpoint
    data: Data
    config: TrainConfig
    out: Path
    text: str

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model."""
        return self.model if isinstance(self.model, ModelSpec) else self.model.spec

    def run(self, progress: bool = False) -> TrainResult:
        """Train, and keep the train file in the folder: see `archdsl.train`."""
        from archdsl.training.run import train

        return train(self.model, self.data, self.config, self.out, progress, record=self.text)


def is_train_file(name: str) -> bool:
    """Whether ``name`` is a YAML file with the key ``model`` and without those that a spec has.

    Raises SpecError if it is a file that is no YAML.
    """
    path = Path(name)
    if why_unreadable(path):
        return False
    keys = source.read_file(path, "a spec").value.keys()
    return "model" in keys and not keys & OF_SPECS


def read_tree(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> source.Tree:
    """Read a train file into a tree, in which the spec that it names stands as a mapping.

    ``overrides``: values to set, such as ``lr=1e-3`` or ``model.dim=64``. Raises SpecError.
    """
    tree = source.read_file(path, "a train file")
    name = tree.value.get("model")
    is_spec = isinstance(name, dict) or (isinstance(name, str) and not _is_checkpoint(name))
    if is_spec:
        tree = source.put(tree, ("model",), source.read_inside(tree, "model", Path(path).parent))
    for assignment in overrides:
        key = assignment.partition("=")[0].split(".")[0].strip()
        if key in ModelSpec.model_fields and key not in TrainFile.model_fields:
            message = f"is a value of the spec, which is below model here: --set model.{assignment}"
            raise SpecError(Problem(key, message, Position(f"--set {assignment}", 0, 0)))
    return source.override(tree, overrides)


def train_plan(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainPlan:
    """Read a train file, and load its model and its data.

    ``overrides``: values to set, such as ``lr=1e-3`` or ``model.dim=64``. Raises SpecError with
    everything that is wrong in the file, ArchdslError if the data or the checkpoint cannot be read
    or do not fit together.

    >>> plan = train_plan("run.yaml", overrides=["steps=20"])  # doctest: +SKIP
    >>> plan.run().validation.loss  # doctest: +SKIP
    """
    tree = read_tree(path, overrides)
    settings = check_config(TrainFile, tree)
    if settings.model is None:
        message = "is required: " + str(TrainFile.model_fields["model"].description)
        raise SpecError(Problem("model", message, tree.position(())))
    return planned(settings, subject_of(tree, overrides))


def subject_of(tree: source.Tree, overrides: Sequence[str] = ()) -> ModelSpec | Checkpoint:
    """Return the spec or the checkpoint that a tree of `read_tree` has as its model."""
    model = tree.value["model"]
    if not isinstance(model, str):
        spec = source.subtree(tree, ("model",), model)
        refuse_other_files(spec, "model")
        return load_tree(spec)
    from archdsl.model.checkpoint import load_checkpoint

    with blamed_on("model"):
        return load_checkpoint(Path(model))


def planned(settings: TrainFile, model: ModelSpec | Checkpoint) -> TrainPlan:
    """Load the data for a model, and return the training as it would start.

    Raises ArchdslError if the data cannot be read or do not fit the model.
    """
    from archdsl.evaluation.data_choice import data_for, data_of, tokenizer_for

    named = one_source(settings.data, settings.column)
    if isinstance(model, ModelSpec):
        spec, tokenizer = model, tokenizer_for(model, settings.tokenizer, named)
        with blamed_on("data"):
            data = data_for(model, named, tokenizer)
    else:
        spec, tokenizer = model.spec, None
        if settings.tokenizer:
            raise ArchdslError(
                f"{model.path} is a checkpoint, whose tokenizer cannot be changed: leave tokenizer "
                "out"
            )
        with blamed_on("data"):
            data = data_of(model, named)
    out = settings.out or Path("runs") / spec.name
    resolved = {
        "model": to_tree(model) if isinstance(model, ModelSpec) else str(model.path.absolute()),
        "data": [_absolute(one) for one in settings.data or [data.name]],
        "column": settings.column,
        "tokenizer": tokenizer and _absolute(tokenizer),
        "out": str(out.absolute()),
        **settings.config.model_dump(mode="json"),
    }
    return TrainPlan(model, data, settings.config, out, source.dump(resolved))


def _absolute(name: str) -> str:
    """Return a name that is found from every folder, if it is that of a file or a folder."""
    found = next((cut for cut in _heads(name) if Path(cut).exists()), None)
    return name if found is None else str(Path(found).absolute()) + name[len(found) :]


def _heads(name: str) -> list[str]:
    """Return the name, and what is before a ``::COLUMN`` and a ``:WEIGHT`` in it."""
    return [name, name.partition("::")[0], name.rpartition(":")[0] or name]


def _is_checkpoint(name: str) -> bool:
    return (Path(name) / CHECKPOINT).is_file()


def one_source(sources: Sequence[str] | None, column: str | None = None) -> str | None:
    """The data of all ``--data`` as one text, which `archdsl.load_data` takes; None without any.

    Raises ArchdslError if a column is given beside several data.
    """
    if not sources:
        from archdsl.data.documents import EMBEDDED

        return f"{EMBEDDED}::{column}" if column else None
    if column and len(sources) > 1:
        raise ArchdslError(
            f"--column {column} belongs to one of several --data: write it as SOURCE::{column}"
        )
    return f"{sources[0]}::{column}" if column else " + ".join(sources)
