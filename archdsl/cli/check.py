"""The check command, which tests a model for leaks from later tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from archdsl.cli import completion
from archdsl.cli.options import Json, Overrides, print_json, print_parts
from archdsl.cli.runs import checkpoint_at

if TYPE_CHECKING:
    from archdsl.checks.check import Report, Row
    from archdsl.lang.spec import ModelSpec
    from archdsl.reports.layout import StackingTable

MARKS = {"PASS": "green", "LEAK": "bold red", "FAIL": "bold red"}


def check(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|CHECKPOINT",
            help="A YAML file, the name of a shipped spec, or the folder of a checkpoint.",
            autocompletion=completion.specs_and_checkpoints,
        ),
    ],
    overrides: Overrides = None,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving",
            help="Ask only whether engines with paged attention can serve an export of it, and "
            "what stands in the way.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Test that no block uses later tokens, and that decoding gives the outputs of one pass.

    In float64 it changes later tokens, takes gradients, decodes token by token with the KV cache,
    prefills in chunks and adds padding, also with the compute dial turned. A large spec is tested
    at reduced sizes of the same structure, a checkpoint with its own weights. The exit status is 1
    if the model leaks or outputs differ; the first block and step that do are named. Examples:

      archdsl check itt --set "blocks.0.body.1.router.kind=prefix"

      archdsl check runs/tiny/final --json

      archdsl check itt --serving
    """
    from archdsl.checks.check import check
    from archdsl.lang.load import load

    start = checkpoint_at(subject, overrides)
    spec = start.spec if start else load(subject, overrides=overrides or ())
    if serving:
        raise typer.Exit(_say_serving(spec, subject, overrides or [], as_json))
    report = check(start.model if start else spec)
    if as_json:
        said = [{"said": str(fault)} | fault.model_dump() for fault in report.faults]
        verdict = {"passed": report.passed, "verdict": report.verdict}
        print_json(report.model_dump(mode="json") | {"faults": said} | verdict)
    else:
        print(f"{report.name}: {report.setup}\n")
        print_parts(_table(report))
        print(_words(report))
    if not report.passed:
        raise typer.Exit(1)


def _say_serving(spec: ModelSpec, subject: str, overrides: list[str], as_json: bool) -> int:
    """Prints what stands in the way of serving the model. Returns the exit status."""
    from dataclasses import asdict

    from archdsl.checks.serving import obstacles
    from archdsl.reports.layout import StackingTable

    found = obstacles(spec)
    if as_json:
        print_json({"servable": not found, "obstacles": [asdict(one) for one in found]})
        return bool(found)
    if not found:
        print(f"{spec.name}: engines with paged attention can serve an export of it")
        return 0
    table = StackingTable("node", "why engines cannot serve it", "change")
    for one in found:
        table.add_row(one.path, one.why, one.change or "no value removes it")
    print_parts(table)
    changes = [*overrides, *(one.change for one in found if one.change)]
    words = " ".join(f'--set "{change}"' for change in changes)
    whole = all(one.change for one in found)
    print(f"\nnearest {'servable ' if whole else ''}spec: archdsl build {subject} {words}")
    return 1


def _table(report: Report) -> StackingTable:
    """The largest differences of each block, as shares of the largest output."""
    from rich.text import Text

    from archdsl.reports.layout import StackingTable

    table = StackingTable("", *report.rows[0].differences, "")
    for row in report.rows:
        table.add_row(row.place, *_cells(row), Text(row.mark, MARKS[row.mark]))
    return table


def _cells(row: Row) -> list[str]:
    return [
        "overflow" if share is None else f"{share:.1e}" if share else "0"
        for share in row.differences.values()
    ]


def _words(report: Report) -> str:
    lines = [f"{fault}" for fault in report.faults]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(["", *lines, report.verdict])
