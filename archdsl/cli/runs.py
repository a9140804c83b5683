"""The train command, and how commands find a checkpoint and its data."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    print_json,
    print_parts,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.data.types import Data
    from archdsl.lang.spec import ModelSpec
    from archdsl.model.checkpoint import Checkpoint
    from archdsl.nn.ranks import Ranks
    from archdsl.training.config import TrainConfig
    from archdsl.training.run import TrainResult
    from archdsl.training.train_file import TrainPlan

Subject = Annotated[
    str,
    typer.Argument(
        metavar="SPEC|CHECKPOINT|RUN.yaml",
        help="A YAML file, the name of a shipped spec such as itt, the folder of a checkpoint "
        "to train further, or a train file, which has all that this command takes.",
        autocompletion=completion.specs_and_checkpoints,
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the run. Default: runs/ and the name of the spec.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Do not train; print the steps, the memory of each device and the bytes that it "
        "sends. This needs no device.",
    ),
]
Devices = Annotated[
    int, typer.Option(min=1, help="With --dry-run: the number of devices to train on.")
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tensorboard|wandb|trackio",
        help="Where the figures go besides metrics.jsonl. May be repeated.",
        autocompletion=completion.words("tensorboard", "wandb", "trackio"),
    ),
]


def config_class() -> type[TrainConfig]:
    """The settings that are options of ``archdsl train``."""
    from archdsl.training.config import TrainConfig

    return TrainConfig


def train(
    ctx: typer.Context,
    spec: Subject,
    overrides: Overrides = None,
    source: Source = None,
    column: Column = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    dry_run: DryRun = False,
    devices: Devices = 1,
    as_json: Json = False,
    config_file: ConfigFile = None,
    log: Log = None,
) -> None:
    """Train a model from a spec or as a train file says, or train a checkpoint further.

    The same command continues after a crash, Ctrl-C or SIGTERM from the last checkpoint. With more
    --steps it goes on where the learning rates so far stay the same: with --schedule constant, or
    wsd before the rate falls.

    A train file is YAML with the key model (a spec, or the name of one), and may have data, column,
    tokenizer, out and every option of this command with _ in place of -. Options given here replace
    its values. The folder of each run has the file that gives the same run, run.yaml. Examples:

      archdsl train tiny --steps 300

      archdsl train tiny --data skill:p-hop --context 64 --lr 2e-3

      archdsl train tiny --data novels:0.8 --data speeches:0.2

      archdsl train tiny --config training.yaml --out runs/mine

      archdsl train run.yaml --set model.dim=64 --lr 1e-3

      archdsl train runs/grafted --only new --out runs/thinking

      archdsl train itt --batch-size 512 --dry-run --devices 64

      torchrun --nproc-per-node 8 -m archdsl train itt --batch-size 64
    """
    options = {"data": source, "column": column, "tokenizer": tokenizer, "out": out, "log": log}
    plan_of = _checked(ctx, spec, overrides or [], config_file, options)
    from archdsl.nn.ranks import connected

    with connected() as ranks:
        plan = ranks.one_after_first(plan_of)
        if dry_run:
            if ranks.first:
                _print_forecast(plan.spec, plan.config, devices, as_json)
            return
        if ranks.first:
            _announce(plan, ranks)
        result = plan.run(progress=True)
    if ranks.first:
        _print_result(result, plan, as_json)


def _announce(plan: TrainPlan, ranks: Ranks) -> None:
    from archdsl.reports.training_memory import shortage

    model, data, config = plan.spec, plan.data, plan.config
    if _in_float32_on_cpu(config) and (warning := shortage(model, config)):
        print(f"warning: {warning}", file=sys.stderr)
    processes = f" by {ranks.size} processes" if ranks.size > 1 else ""
    steps = f"{config.steps:,} steps{processes}"
    print(f"{model.name} on {data.name}, {steps}, in {plan.out}", file=sys.stderr)
    say_what_is_in(data)


def _print_result(result: TrainResult, plan: TrainPlan, as_json: bool) -> None:
    from archdsl.reports import tables

    folder, data = plan.out, plan.data
    if result.resumed_from == result.steps:
        print("the run was complete already: no step was trained", file=sys.stderr)
    if as_json:
        print_json(_facts(result, folder))
    else:
        print_parts(tables.evaluation(result.validation, data.chance))
        print(f"checkpoint: {folder / 'final'}")


def _print_forecast(model: ModelSpec, config: TrainConfig, number: int, as_json: bool) -> None:
    from archdsl.costs.devices import devices
    from archdsl.reports.train_forecast import forecast_data, forecast_table, forecast_training

    parallel = "fsdp" if config.parallel == "auto" else config.parallel
    group = min(8, number) if parallel == "hsdp" else None  # as many as most machines have
    found = forecast_training(model, config, devices(number, parallel, group))
    print_json(forecast_data(found)) if as_json else print_parts(forecast_table(found))


def _checked(
    ctx: typer.Context,
    subject: str,
    overrides: list[str],
    config_file: Path | None,
    options: dict[str, Any],
) -> Callable[[], TrainPlan]:
    """What loads the model and the data of a train file, a spec or a checkpoint for a training with
    the options of the command. These are checked at once, without torch."""
    from archdsl.lang.load import load
    from archdsl.training.train_file import (
        TrainFile,
        is_train_file,
        planned,
        read_tree,
        subject_of,
    )

    if is_train_file(subject):
        if config_file:
            raise ArchdslError(
                f"{subject} is a train file, so its settings do not come from --config "
                f"{config_file}: give one of the two"
            )
        tree = read_tree(subject, overrides)
        found = config_from(ctx, TrainFile, tree, options)
        return lambda: planned(found, subject_of(tree))
    settings = config_from(ctx, TrainFile, config_file, options)

    def plan() -> TrainPlan:
        start = checkpoint_at(subject, overrides, settings.tokenizer)
        return planned(settings, start or load(subject, overrides=overrides))

    return plan


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
