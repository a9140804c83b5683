"""The gradients command."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from archdsl.cli import completion
from archdsl.cli.options import (
    CheckpointFolder,
    Json,
    Source,
    check_output,
    one_source,
    print_json,
    print_parts,
    size,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.model.checkpoint import Checkpoint

Before = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="Also measure this checkpoint, on the same windows and tokens, and show both side by "
        "side. It must have the same tokenizer.",
        autocompletion=completion.checkpoints,
    ),
]
Split = Annotated[
    Literal["validation", "test"], typer.Option(help="Which held-out part of the data to use.")
]
Windows = Annotated[
    int,
    typer.Option(min=4, help="Number of samples: windows, spread evenly over the part."),
]
Window = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Tokens per window. Default: the context of the spec, at most 128.",
    ),
]
Each = Annotated[
    bool,
    typer.Option("--each", help="Show a row for each matrix, in place of the sum of the four."),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw the norms of each matrix by layer.")
]


def gradients(
    checkpoint: CheckpointFolder,
    source: Source = None,
    before: Before = None,
    split: Split = "validation",
    windows: Windows = 32,
    context: Window = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of windows that are in memory at once.")
    ] = 4,
    each: Each = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure how large gradients are in each layer and thinking step, for easy and hard samples.

    Prints the nuclear norm of the gradient of the attention matrices (q, k, v, o). The quarter of
    the windows with the lowest loss is easy, that with the highest is hard. As a larger loss alone
    makes gradients larger, it also prints the ratio of hard to easy after division by the norm of
    the gradient at the logits (normalised), and for tokens of equal losses (matched). A second
    table has single tokens, by deciles of their loss. Examples:

      archdsl gradients runs/tiny/final

      archdsl gradients runs/tiny/final --data my-text.txt --windows 128 --plot gradients.png

      archdsl gradients runs/thinking/final --before runs/grafted --each --json
    """
    if plot is not None:
        check_output(plot)
        if find_spec("matplotlib") is None:
            raise ArchdslError("--plot needs matplotlib: pip install 'archdsl[plots]'")
    from archdsl.evaluation.data_choice import data_of
    from archdsl.evaluation.gradients import gradients
    from archdsl.model.checkpoint import load_checkpoint
    from archdsl.nn.devices import best_device

    found = load_checkpoint(checkpoint, device=best_device())
    earlier = None if before is None else load_checkpoint(before, device=best_device())
    if earlier is not None:
        _refuse_other_tokens(found, earlier)
    data = data_of(found, one_source(source))
    measured = gradients(
        found.model,
        data,
        before=None if earlier is None else earlier.model,
        split=split,
        windows=windows,
        context=context,
        batch_size=batch_size,
        progress=True,
    )
    if plot is not None:
        from archdsl.evaluation.gradient_plot import plot as draw

        draw(measured, plot)
    if as_json:
        about = {"checkpoint": str(checkpoint), "before_checkpoint": before and str(before)}
        print_json(about | {"data": data.name} | measured.model_dump(mode="json"))
        return
    from archdsl.reports import gradient_tables

    print_parts(
        f"{found.spec.name} on the {split} split of {data.name}",
        *gradient_tables.tables(measured, each),
        *([f"plot: {plot}"] if plot else []),
    )


def _refuse_other_tokens(one: Checkpoint, other: Checkpoint) -> None:
    """Raises ArchdslError if two checkpoints have different tokenizers."""
    texts = [at.tokenizer and at.tokenizer.read_bytes() for at in (one, other)]
    if texts[0] != texts[1]:
        raise ArchdslError(
            f"{one.path} and {other.path} have different tokenizers, so that their losses are not "
            "those of the same tokens: --before must name a checkpoint with the same tokenizer"
        )
