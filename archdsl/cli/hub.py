"""The commands that exchange models with other libraries: import, export."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli.options import (
    CheckpointFolder,
    Force,
    Json,
    print_json,
    print_parts,
    refuse_to_replace,
    size,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.interop.import_weights import ImportedModel

NEEDS_TRANSFORMERS = "exporting needs transformers: pip install 'archdsl[transformers]'"


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR_OR_GGUF",
            help="A folder with config.json, safetensors and tokenizer.json, also one that "
            "archdsl export wrote, or a .gguf file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the spec. Default: the name of the folder or file, or the own name of an "
            "exported model."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Context of the spec, for example 4k. Default, and most: the model's own.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert pretrained weights of the LLaMA family, or an exported model, into a checkpoint.

    The logits of the checkpoint equal those that transformers computes in float32. An exported
    folder comes back as it is, also after it was trained or given more tokens by other libraries;
    no code in it is run. Examples:

      archdsl import Llama-3.2-1B --out runs/llama --context 4k

      archdsl import SmolLM2-135M.gguf --out runs/smol

      archdsl import exported --out runs/back
    """
    refuse_to_replace(out, force)
    from archdsl.interop.import_weights import import_pretrained
    from archdsl.reports.layout import TwoColumns

    imported = import_pretrained(source, out, name=name, context=context)
    facts = _imported(imported)
    if as_json:
        print_json({"checkpoint": str(out)} | facts | {"notes": imported.notes})
    else:
        words = {key: f"{value:,}" for key, value in facts.items() if isinstance(value, int)}
        words["tokenizer"] = f"{facts['tokenizer']:,} tokens of {facts['vocab_size']:,}"
        del words["vocab_size"]
        own = facts["architecture"] == "archdsl"
        what = "an exported archdsl model" if own else f"a pretrained {facts['architecture']}"
        print(f"{facts['name']}, {what}")
        print_parts(TwoColumns([(f"  {key}", value) for key, value in words.items()]))
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {out}; next: archdsl build {out}/spec.yaml", file=sys.stderr)


def _imported(imported: ImportedModel) -> dict[str, Any]:
    from archdsl.costs.receipt import cost

    return {
        "name": imported.spec.name,
        "architecture": imported.architecture,
        "parameters": cost(imported.spec).params,
        "context": imported.spec.context,
        "vocab_size": imported.spec.vocab_size,
        "tokenizer": imported.tokens,
        "files": imported.files,
    }


def export(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the export to.")],
    merge_lora: Annotated[
        bool,
        typer.Option(
            "--merge-lora",
            help="Write out the low-rank differences of loops as weights of each pass: faster, and "
            "larger.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads without archdsl.

    Load it with AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). After `import
    archdsl.interop.hf_model` it also loads without trust_remote_code. Example:

      archdsl export runs/tiny/final exported
    """
    try:
        from archdsl.interop.hf_export import export
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ArchdslError(NEEDS_TRANSFORMERS) from None
    from archdsl.model.checkpoint import load_checkpoint

    found = load_checkpoint(checkpoint)
    if merge_lora:
        from archdsl.interop.merge_lora import merged

        found = replace(found, model=merged(found.model))
    done = export(found, out)
    if as_json:
        print_json(
            {
                "folder": str(done.path),
                "bytes": done.bytes,
                "compared_tokens": done.tokens,
                "largest_difference": done.difference,
                "sees_later_tokens_in_training": found.model.leaks,
            }
        )
    else:
        print(f"exported to {done.path}: {done.bytes:,} bytes")
        print(
            f"the exported model's logits differ from the checkpoint's by at most "
            f"{done.difference:.2g} (on {done.tokens:,} random tokens)"
        )
        if found.model.leaks:
            print(
                "note: in training its router sees later tokens. Outside of training the exported "
                "model selects causally, as in decoding, so that scores are those of a text that "
                "it can generate. see_later_tokens in its config.json changes that."
            )
