"""The train command, and how commands find a checkpoint and its data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli import completion
from archdsl.cli.options import (
    Column,
    ConfigFile,
    Json,
    Overrides,
    Source,
    Tokenizer,
    config_from,
    one_source,
    print_json,
    print_parts,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.data.types import Data
    from archdsl.lang.spec import ModelSpec
    from archdsl.model.checkpoint import Checkpoint
    from archdsl.training.config import TrainConfig
    from archdsl.training.run import TrainResult

SpecOrCheckpoint = Annotated[
    str,
    typer.Argument(
        metavar="SPEC|CHECKPOINT",
        help="A YAML file, the name of a shipped spec such as itt, or the folder of a checkpoint "
        "to train further.",
        autocompletion=completion.specs_and_checkpoints,
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the run. Default: runs/ and the name of the spec.")
]


def config_class() -> type[TrainConfig]:
    """The settings that are options of ``archdsl train``."""
    from archdsl.training.config import TrainConfig

    return TrainConfig


def train(
    ctx: typer.Context,
    spec: SpecOrCheckpoint,
    overrides: Overrides = None,
    source: Source = None,
    column: Column = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Train a model from a spec, or train a checkpoint further.

    The same command continues after a crash, Ctrl-C or SIGTERM from the last checkpoint. With more
    --steps it goes on where the learning rates so far stay the same: with --schedule constant, or
    wsd before the rate falls. Examples:

      archdsl train tiny --steps 300

      archdsl train tiny --data skill:p-hop --context 64 --lr 2e-3

      archdsl train tiny --data novels:0.8 --data speeches:0.2

      archdsl train tiny --config training.yaml --out runs/mine

      archdsl train runs/grafted --only new --out runs/thinking
    """
    config = config_from(ctx, config_class(), config_file)
    from archdsl.lang.load import load
    from archdsl.reports import tables
    from archdsl.reports.training_memory import shortage
    from archdsl.training.run import train

    start = checkpoint_at(spec, overrides, tokenizer)
    model = start.spec if start else load(spec, overrides=overrides or ())
    named = one_source(source, column)
    data = data_of(start, named) if start else data_for(model, named, tokenizer)
    folder = out or Path("runs") / model.name
    if _in_float32_on_cpu(config) and (warning := shortage(model, config)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{model.name} on {data.name}, {config.steps:,} steps, in {folder}", file=sys.stderr)
    say_what_is_in(data)
    result = train(start or model, data, config, folder, progress=True)
    if result.resumed_from == result.steps:
        print("the run was complete already: no step was trained", file=sys.stderr)
    if as_json:
        print_json(_facts(result, folder))
    else:
        print_parts(tables.evaluation(result.validation, data.chance))
        print(f"checkpoint: {folder / 'final'}")


def _facts(result: TrainResult, folder: Path) -> dict[str, Any]:
    return {
        "checkpoint": str(folder / "final"),
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "validation": result.validation.model_dump(mode="json"),
    }


def _in_float32_on_cpu(config: TrainConfig) -> bool:
    from archdsl.nn.devices import best_device

    on_cpu = "cpu" in (config.device, best_device().type)
    return on_cpu and config.dtype != "bfloat16"


def say_what_is_in(data: Data) -> None:
    """Prints to stderr what each split of a text has, and what is left out and why."""
    from archdsl.data.loading import MixedData, TextData

    for line in data.summary() if isinstance(data, TextData | MixedData) else ():
        print(f"  {line}", file=sys.stderr)


def checkpoint_at(
    spec: str, overrides: list[str] | None, tokenizer: str | None = None
) -> Checkpoint | None:
    """The checkpoint in a folder; None if ``spec`` is no such folder.

    Raises ArchdslError if options are given that cannot change a checkpoint.
    """
    from archdsl.model.checkpoint import PROVENANCE, load_checkpoint

    if not (Path(spec) / PROVENANCE).is_file():
        return None
    for option, given in (("--set", overrides), ("--tokenizer", tokenizer)):
        if given:
            raise ArchdslError(
                f"{spec} is a checkpoint, which {option} cannot change: leave {option} out"
            )
    return load_checkpoint(Path(spec))


def data_of(checkpoint: Checkpoint, source: str | None) -> Data:
    """The data of ``source``, else that which the checkpoint was trained on, in its tokens.

    Whoever made a checkpoint must not decide which files or data sets are read: raises ArchdslError
    if it was trained on other data than the embedded corpus or a skill, and ``source`` is None.
    """
    trained_on = checkpoint.provenance.get("data", {}).get("name")
    if not source and trained_on and not is_embedded(trained_on):
        raise ArchdslError(
            f"{checkpoint.path} was trained on {trained_on!r}. A checkpoint does not decide which "
            f"data are read: name them, as in --data {shlex.quote(trained_on)}"
        )
    tokenizer = str(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return data_for(checkpoint.spec, source or trained_on, tokenizer)


def data_for(spec: ModelSpec, source: str | None, tokenizer: str | None) -> Data:
    """The data, in tokens that fit into the vocabulary. Raises ArchdslError if they do not fit."""
    from archdsl.data.loading import load_data

    choice = tokenizer or _filling(spec.vocab_size)
    data = load_data(source, tokenizer=choice)
    if data.vocab_size > spec.vocab_size:
        fixes = [f"--set vocab_size={data.vocab_size}"]
        if data.chance is None and spec.vocab_size >= BYTES:
            fixes.append(f"--tokenizer {_filling(spec.vocab_size)}")
        raise ArchdslError(
            f"{data.name} has {data.vocab_size:,} different tokens, but {spec.name} has only a "
            f"vocab_size of {spec.vocab_size:,}. Use {' or '.join(fixes)}"
        )
    return data


def is_embedded(source: str) -> bool:
    """Whether data come with archdsl: the embedded corpus, or a skill."""
    from archdsl.data.documents import EMBEDDED

    return source == EMBEDDED or source.startswith("skill:")


BYTES = 257  # tokens of the tokenizer `bytes`: 256, and one that ends a document


def _filling(vocab_size: int) -> str:
    """The choice of tokenizer that uses as much of a vocabulary as possible."""
    return f"bpe:{vocab_size}" if vocab_size >= 2 * BYTES else "bytes"
