"""The command that grafts thinking steps onto a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli.options import Json, Overrides, print_json
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.interop.retrofit import Retrofit
    from archdsl.model.checkpoint import Checkpoint


def retrofit(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    overlay: Annotated[
        str, typer.Argument(metavar="OVERLAY", help="A YAML file, or the shipped itt-overlay.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the grown checkpoint.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Of the new routers.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Graft thinking steps onto layers of a trained model, whose logits stay what they were.

    `train --only new` then trains the new parts alone. Examples:

      archdsl retrofit runs/plain/final itt-overlay --out runs/grafted

      archdsl retrofit runs/plain/final itt-overlay --set "layers=[2]" --out runs/grafted
    """
    if not force and out.is_dir() and any(out.iterdir()):
        raise ArchdslError(f"{out} is not empty; --force replaces a checkpoint")
    from archdsl.interop.retrofit import parse_overlay, retrofit
    from archdsl.lang import source
    from archdsl.model.checkpoint import load_checkpoint, save_checkpoint

    wanted = parse_overlay(source.override(source.read(overlay), overrides or ()))
    base = load_checkpoint(checkpoint)
    grown = retrofit(base, wanted, seed=seed)
    save_checkpoint(out, grown.model, tokenizer_from=base.tokenizer, provenance=grown.provenance)
    facts = _facts(base, grown)
    if as_json:
        print_json({"checkpoint": str(out)} | facts)
    else:
        print(_in_words(facts))
    print(f"wrote {out}; next: archdsl train {out} --only new", file=sys.stderr)


def _facts(base: Checkpoint, grown: Retrofit) -> dict[str, Any]:
    from archdsl.costs.receipt import cost

    before, after = cost(base.spec), cost(grown.model.spec)
    return {
        "model": grown.model.spec.name,
        "layers": list(grown.layers),
        "parameters": {"before": before.params, "new": after.params - before.params},
        "flops_per_token": {"before": before.expected, "after": after.expected},
        "logits_differ_by": grown.difference,
        "new": list(grown.new),
    }


def _in_words(facts: dict[str, Any]) -> str:
    parameters, flops = facts["parameters"], facts["flops_per_token"]
    return (
        f"{facts['model']}: thinking steps on layers {', '.join(map(str, facts['layers']))}\n"
        f"parameters  {parameters['before']:,} as they were, {parameters['new']:,} new\n"
        f"forward     {flops['before'] / 1e6:,.1f}M FLOPs/token before, "
        f"{flops['after'] / 1e6:,.1f}M now at the routers' capacities\n"
        f"logits      differ by {facts['logits_differ_by']:.1e} of the largest"
    )
