"""The commands on specs: build, diff, blocks, schema."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from archdsl.cli import completion
from archdsl.cli.options import (
    KV,
    BudgetOf,
    Flops,
    Force,
    Json,
    Overrides,
    Params,
    Spec,
    Tokenizer,
    budget,
    print_json,
    print_parts,
    refuse_to_replace,
    size,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.costs import devices as costs
    from archdsl.lang.spec import ModelSpec

Convention = Annotated[
    Literal["node", "paper"],
    typer.Option(
        help="How FLOPs are counted. node: exactly, node by node; paper: as Chen et al. "
        "(2502.13842, Table 2) count them."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Count at this sequence length, for example 4k. Default: the context of the spec.",
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Also say what training on so many devices needs: the memory of each, and the bytes "
        "that it sends for one optimizer step.",
    ),
]
Parallel = Annotated[
    Literal["ddp", "fsdp", "hsdp"] | None,
    typer.Option(
        help="With --devices: ddp keeps all weights on each device, fsdp a shard of them, hsdp a "
        "shard within a group of devices. Default: fsdp."
    ),
]
ShardGroup = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --parallel hsdp: the number of devices that share one copy of the weights.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Write a checkpoint with initial weights to this folder.")
]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights.")]


class OverBudgetError(ArchdslError):
    """A model costs more than its budget allows."""


def build(
    spec: Spec,
    overrides: Overrides = None,
    params: Params = None,
    budget_of: BudgetOf = None,
    flops: Flops = None,
    kv: KV = None,
    convention: Convention = "node",
    tokens: Tokens = None,
    devices: Devices = None,
    parallel: Parallel = None,
    shard_group: ShardGroup = None,
    out: Out = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Check a spec and print its receipt: parameters, FLOPs and memory, node by node.

    A limit given here replaces the same limit of the file; the file's other limits stay. The exit
    status is 1 if the model is over its budget. Examples:

      archdsl build itt --set blocks.0.body.1.router.kind=prefix

      archdsl build itt --budget 100M --budget-of non_embedding --kv 64KiB

      archdsl build itt --devices 16 --parallel hsdp --shard-group 8
    """
    from archdsl.lang.budget import describe_excess, largest_excess
    from archdsl.lang.load import load
    from archdsl.reports import tables

    several = _devices(devices, parallel, shard_group)
    model = load(spec, overrides=overrides or (), budget=budget(params, flops, kv, budget_of))

    counted = model.model_copy(update={"context": tokens}) if tokens else model
    if as_json:
        print_json(tables.receipt_data(counted, convention, model.budget, several))
    else:
        print_parts(tables.receipt(counted, convention, model.budget, several))
    if model.budget and largest_excess(model, model.budget) > 0:
        raise OverBudgetError(
            f"{model.name} is over its budget: {describe_excess(model, model.budget)}"
        )
    if out:
        _write(model, out, tokenizer, seed, force)
        print(f"wrote {out}", file=sys.stderr)


def _devices(
    count: int | None, parallel: Parallel, shard_group: int | None
) -> costs.Devices | None:
    from archdsl.costs.devices import devices

    if count is None:
        if parallel or shard_group:
            raise typer.BadParameter("--parallel and --shard-group go with --devices: give it too")
        return None
    return devices(count, parallel or "fsdp", shard_group)


def _write(model: ModelSpec, out: Path, tokenizer: str | None, seed: int, force: bool) -> None:
    refuse_to_replace(out, force)
    from archdsl.evaluation.data_choice import BYTES, data_for
    from archdsl.model.build import build as build_model
    from archdsl.model.checkpoint import save_checkpoint

    is_for_text = model.vocab_size >= BYTES  # a skill has few tokens, and no tokenizer
    save_checkpoint(
        out,
        build_model(model, seed=seed),
        tokenizer_from=data_for(model, None, tokenizer) if tokenizer or is_for_text else None,
        provenance={"seed": seed, "step": 0},
    )


def diff(
    first: Spec,
    second: Spec,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print the differences between two specs: their values, their totals, the cost of each node.

    --set changes the second spec. Examples:

      archdsl diff loop itt

      archdsl diff itt itt --set blocks.0.repeat=2
    """
    from archdsl.lang.load import load
    from archdsl.reports.diff import diff_data, diff_specs, diff_tables

    both = diff_specs(load(first), load(second, overrides=overrides or ()))
    if as_json:
        print_json(diff_data(both))
    else:
        print_parts(diff_tables(both))


def blocks(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A kind, such as loop; a family of kinds, such as router; a key at the top of a "
            "spec, such as norm; or spec for all of these keys.",
            autocompletion=completion.kinds,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys of a spec and the kinds of blocks and parts it can use, or describe one.

    The description of one kind has its fields, their defaults and an example. Examples:

      archdsl blocks loop

      archdsl blocks router

      archdsl blocks spec
    """
    from archdsl.reports.catalogue import catalogue, shown

    if as_json:
        print_json([asdict(entry) for entry in catalogue(name)])
    else:
        print_parts(shown(name))


def schema() -> None:
    """Print the JSON schema of spec files, with which editors check and complete them.

    Example:

      archdsl schema > archdsl.schema.json
    """
    from archdsl.lang.schema import json_schema

    print_json(json_schema())
