"""The retrofit command, which makes a trained model one with loops."""

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
            help="A YAML file that says what to add, or a shipped one: itt-overlay or "
            "retrofit-recurrence-overlay.",
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

    Afterwards `archdsl train FOLDER --only new` trains the new parameters alone. An overlay with
    prelude, core and coda, such as retrofit-recurrence-overlay, makes layers a core that loops
    instead. That changes the logits, and all parameters must be trained. Examples:

      archdsl retrofit runs/plain/final itt-overlay --out runs/grafted

      archdsl retrofit runs/plain/final itt-overlay --set "layers=[2]" --out runs/grafted

      archdsl retrofit runs/plain/final retrofit-recurrence-overlay --set core=2 --out runs/deep
    """
    refuse_to_replace(out, force)
    from archdsl.interop.overlay import Recurrence, parse_overlay
    from archdsl.interop.retrofit import retrofit
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
    only = "all" if isinstance(wanted, Recurrence) else "new"
    print(f"wrote {out}; next: archdsl train {out} --only {only}", file=sys.stderr)


def _facts(base: Checkpoint, grown: Retrofit) -> dict[str, Any]:
    from archdsl.costs.receipt import cost

    before, after = cost(base.spec), cost(grown.model.spec)
    weights = dict(grown.model.named_parameters())
    new = sum(weights[name].numel() for name in grown.new)
    kept = after.params - new
    return {
        "model": grown.model.spec.name,
        "layers": list(grown.layers),
        "removed": list(grown.removed),
        "parameters": {"before": before.params, "kept": kept, "new": new},
        "flops_per_token": {"before": before.expected, "after": after.expected},
        "logits_differ_by": grown.difference,
        "new": list(grown.new),
    }


def _in_words(facts: dict[str, Any]) -> str:
    parameters, flops = facts["parameters"], facts["flops_per_token"]
    removed = ", ".join(map(str, facts["removed"]))
    return (
        f"{facts['model']}: loops on layers {', '.join(map(str, facts['layers']))}"
        f"{f'; without layers {removed}' if removed else ''}\n"
        f"parameters  {parameters['kept']:,} unchanged, {parameters['new']:,} new\n"
        f"forward     {flops['before'] / 1e6:,.1f}M FLOPs/token before, "
        f"{flops['after'] / 1e6:,.1f}M now at the routers' capacities\n"
        f"logits      differ by at most {facts['logits_differ_by']:.1e} of the largest logit"
    )
