"""Commands on specs: build, diff, blocks, schema."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from archdsl.cli.options import (
    KV,
    BudgetOf,
    Flops,
    Json,
    Overrides,
    Params,
    Spec,
    Tokenizer,
    budget,
    print_json,
    print_parts,
    size,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.lang.spec import ModelSpec


class OverBudgetError(ArchdslError):
    """A model that costs more than its budget."""


def build(
    spec: Spec,
    overrides: Overrides = None,
    params: Params = None,
    budget_of: BudgetOf = None,
    flops: Flops = None,
    kv: KV = None,
    convention: Annotated[
        Literal["node", "paper"], typer.Option(help="How FLOPs and parameters are counted.")
    ] = "node",
    tokens: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", help="Count at this length, not the context."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write an initialised checkpoint to this folder.")
    ] = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Of the initial values.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Check a spec and show what it costs, node by node.

    Limits given here stand beside those of the file, or in their place where both set the same
    one. Exit status 1: over its budget. Examples:

      archdsl build itt --set blocks.0.body.1.router.kind=prefix

      archdsl build itt --budget 100M --budget-of non_embedding --kv 64KiB
    """
    from archdsl.lang.budget import describe_excess, largest_excess
    from archdsl.lang.load import load

    model = load(spec, overrides=overrides or (), budget=budget(params, flops, kv, budget_of))
    from archdsl.reports import tables  # a mistaken spec needs no tables

    counted = model.model_copy(update={"context": tokens}) if tokens else model
    if as_json:
        print_json(tables.receipt_data(counted, convention, model.budget))
    else:
        print_parts(tables.receipt(counted, convention, model.budget))
    if model.budget and largest_excess(model, model.budget) > 0:
        raise OverBudgetError(
            f"{model.name} is over its budget: {describe_excess(model, model.budget)}"
        )
    if out:
        _write(model, out, tokenizer, seed, force)
        print(f"wrote {out}", file=sys.stderr)


def _write(model: ModelSpec, out: Path, tokenizer: str | None, seed: int, force: bool) -> None:
    if not force and out.is_dir() and any(out.iterdir()):
        raise ArchdslError(f"{out} is not empty; --force replaces a checkpoint")
    from archdsl.cli.runs import BYTES, data_for
    from archdsl.model.build import build as build_model
    from archdsl.model.checkpoint import save_checkpoint

    has_room = model.vocab_size >= BYTES  # a model of a skill's few tokens has no tokenizer
    save_checkpoint(
        out,
        build_model(model, seed=seed),
        tokenizer_from=data_for(model, None, tokenizer) if tokenizer or has_room else None,
        provenance={"seed": seed, "step": 0},
    )


def diff(
    first: Spec,
    second: Spec,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what differs between two specs.

    Their values, their totals, and the cost of each node. --set changes the second. Examples:

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
    kind: Annotated[str | None, typer.Argument(help="One kind, such as loop.")] = None,
    as_json: Json = False,
) -> None:
    """List what a spec can be made of, or show one kind.

    Of one kind, its fields with their defaults, and an example. Example:

      archdsl blocks loop
    """
    from archdsl.reports.catalogue import catalogue, listing, page

    if as_json:
        print_json([asdict(entry) for entry in catalogue(kind)])
    elif kind is None:
        print_parts(listing())
    else:
        print_parts(*(page(entry) for entry in catalogue(kind)))


def schema() -> None:
    """Print the JSON schema of spec files, for editors.

    Example:

      archdsl schema > archdsl.schema.json
    """
    from archdsl.lang.schema import json_schema

    print_json(json_schema())
