"""The retrofit command, which adds thinking steps to a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli import completion
from archdsl.cli.options import (
    CheckpointFolder,
    Force,
    Json,
    Overrides,
    print_json,
    refuse_to_replace,
)

if TYPE_CHECKING:
    from archdsl.interop.retrofit import Retrofit
    from archdsl.model.checkpoint import Checkpoint


def retrofit(
    checkpoint: CheckpointFolder,
    overlay: Annotated[
        str,
        typer.Argument(
            metavar="OVERLAY",
            help="A YAML file that says what to add, or the shipped itt-overlay.",
            autocompletion=completion.overlays,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the new checkpoint to.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights of new routers.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add thinking steps to layers of a trained model without changing its logits.

    Afterwards `archdsl train FOLDER --only new` trains the new parameters alone. Examples:

      archdsl retrofit runs/plain/final itt-overlay --out runs/grafted

      archdsl retrofit runs/plain/final itt-overlay --set "layers=[2]" --out runs/grafted
    """
    refuse_to_replace(out, force)
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
        f"parameters  {parameters['before']:,} unchanged, {parameters['new']:,} new\n"
        f"forward     {flops['before'] / 1e6:,.1f}M FLOPs/token before, "
        f"{flops['after'] / 1e6:,.1f}M now at the routers' capacities\n"
        f"logits      differ by at most {facts['logits_differ_by']:.1e} of the largest logit"
    )
