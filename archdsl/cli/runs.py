"""The command that trains: train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archdsl.cli.options import (
    Json,
    Overrides,
    Source,
    Spec,
    Tokenizer,
    print_json,
    print_parts,
    with_options_of,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.data.types import Data
    from archdsl.lang.spec import ModelSpec
    from archdsl.model.checkpoint import Checkpoint
    from archdsl.training.config import TrainConfig


def _config() -> type[TrainConfig]:
    from archdsl.training.config import TrainConfig

    return TrainConfig


@with_options_of(_config, "config")
def train(
    spec: Spec,
    config: TrainConfig,
    overrides: Overrides = None,
    source: Source = None,
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/ and the spec's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a spec, or a checkpoint further; the same command goes on after a crash or Ctrl-C.

    In place of SPEC may stand a checkpoint's folder. Examples:

      archdsl train tiny --steps 300

      archdsl train tiny --data skill:p-hop --context 64 --lr 2e-3

      archdsl train runs/grafted --only new --out runs/thinking
    """
    from archdsl.lang.load import load
    from archdsl.reports import tables
    from archdsl.reports.training_memory import shortage
    from archdsl.training.run import train

    start = checkpoint_at(spec, overrides, tokenizer)
    model = start.spec if start else load(spec, overrides=overrides or ())
    data = data_of(start, source) if start else data_for(model, source, tokenizer)
    folder = out or Path("runs") / model.name
    if _in_float32_on_cpu(config) and (warning := shortage(model, config)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{model.name} on {data.name}, {config.steps:,} steps, in {folder}", file=sys.stderr)
    result = train(start or model, data, config, folder, progress=True)
    if result.resumed_from == result.steps:
        print("it was trained already, nothing was left to do", file=sys.stderr)
    if as_json:
        found = result.validation.model_dump(mode="json")
        print_json(
            {
                "checkpoint": str(folder / "final"),
                "steps": result.steps,
                "resumed_from": result.resumed_from,
                "validation": found,
            }
        )
    else:
        print_parts(tables.evaluation(result.validation, data.chance))
        print(f"checkpoint: {folder / 'final'}")


def _in_float32_on_cpu(config: TrainConfig) -> bool:
    import torch

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return on_cpu and config.dtype != "bfloat16"


def checkpoint_at(
    spec: str, overrides: list[str] | None, tokenizer: str | None = None
) -> Checkpoint | None:
    """The checkpoint, if that is what stands in the place of a spec."""
    from archdsl.model.checkpoint import PROVENANCE, load_checkpoint

    if not (Path(spec) / PROVENANCE).is_file():
        return None
    for option, given in (("--set", overrides), ("--tokenizer", tokenizer)):
        if given:
            raise ArchdslError(
                f"{spec} is a checkpoint, which {option} cannot change: leave it out"
            )
    return load_checkpoint(Path(spec))


def data_of(checkpoint: Checkpoint, source: str | None) -> Data:
    """What a checkpoint was trained on, or another source, in its tokens."""
    trained_on = checkpoint.provenance.get("data", {}).get("name")
    tokenizer = str(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return data_for(checkpoint.spec, source or trained_on, tokenizer)


def data_for(spec: ModelSpec, source: str | None, tokenizer: str | None) -> Data:
    """The data, in tokens that the vocabulary has room for."""
    from archdsl.data.loading import load_data

    choice = tokenizer or _filling(spec.vocab_size)
    data = load_data(source, tokenizer=choice)
    if data.vocab_size > spec.vocab_size:
        fixes = [f"--set vocab_size={data.vocab_size}"]
        if data.chance is None and spec.vocab_size >= BYTES:
            fixes.append(f"--tokenizer {_filling(spec.vocab_size)}")
        raise ArchdslError(
            f"{data.name} has {data.vocab_size:,} different tokens and {spec.name} only a "
            f"vocab_size of {spec.vocab_size:,}: {' or '.join(fixes)}"
        )
    return data


BYTES = 257  # and the end of a document


def _filling(vocab_size: int) -> str:
    """The tokenizer that makes the most of a vocabulary."""
    return f"bpe:{vocab_size}" if vocab_size >= 2 * BYTES else "bytes"
