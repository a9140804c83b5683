"""The eval command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from archdsl.cli.options import (
    CheckpointFolder,
    Json,
    Source,
    check_output,
    one_source,
    print_json,
    print_parts,
    shares,
    size,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from tokenizers import Tokenizer

    from archdsl.data.types import Data
    from archdsl.evaluation.dial_sweep import DialSetting
    from archdsl.model.checkpoint import Checkpoint

    Answer = tuple[dict[str, Any], list[RenderableType]]  # for programs, for readers

Split = Annotated[
    Literal["validation", "test"], typer.Option(help="Which held-out part of the text to score.")
]
Tokens = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Score this many tokens of the text, for example 64k. Default: all of them.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="Tokens per sequence. Default: the context of the spec.",
    ),
]
Capacities = Annotated[
    list[float] | None,  # each of them a number or a list of numbers
    typer.Option(
        parser=shares,
        metavar="SHARE[,SHARE...]",
        help="Turn the compute dial: the share of the tokens that each further step processes, as "
        "one number or one for each step, for example 0.9,0.9,0. May be repeated to score several "
        "settings. Default: as trained.",
    ),
]
Depths = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Turn the compute dial: the number of steps of each loop. May be repeated to score "
        "several settings. Default: as trained.",
    ),
]
Exits = Annotated[
    list[float] | None,
    typer.Option(
        "--exit",
        min=0,
        metavar="THRESHOLD",
        help="Turn the compute dial: the threshold at which a token stops looping, for a model "
        "whose loops have an exit, for example 0.9. May be repeated to score several settings. "
        "Default: as trained.",
    ),
]
Sweep = Annotated[
    bool,
    typer.Option(
        "--sweep",
        help="Compare settings of the compute dial with the trained one: each --capacity with each "
        "--steps and each --exit. If none is given: the three capacities of the ITT paper, "
        "stretched over the routed steps of the model, and no thinking; for a model without "
        "routers, fewer and more steps; thresholds of its exits, if it has any.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png", help="With --sweep: plot the loss against the executed FLOPs."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help="Score tasks of lm-evaluation-harness instead of held-out text, for example "
        "arc_easy,piqa.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="With --tasks: read the examples from FOLDER/TASK/SPLIT.jsonl. Default: download them "
        "from the Hugging Face Hub.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="With --tasks: number of examples of each task. Default: all.",
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="With --tasks: number of solved examples before each question. Default: the task's.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --tasks: write all questions and answers to this JSON file."
    ),
]


def eval_(
    checkpoint: CheckpointFolder,
    source: Source = None,
    split: Split = "validation",
    tokens: Tokens = None,
    context: Window = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of sequences scored at once.")
    ] = 16,
    capacity: Capacities = None,
    steps: Depths = None,
    exits: Exits = None,
    sweep: Sweep = False,
    plot: Plot = None,
    tasks: Tasks = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint on held-out text, at several settings of its compute dial, or on tasks.

    On text it prints loss, perplexity and bits per byte; without --data, on the embedded corpus or
    the skill that the checkpoint was trained on. A model whose router sees later tokens is scored
    on text with that sight and also causally; on tasks only causally. Examples:

      archdsl eval runs/tiny/final --split test

      archdsl eval runs/tiny/final --sweep --plot dial.png

      archdsl eval runs/tiny/final --capacity 0.7 --capacity 0.5 --steps 6

      archdsl eval runs/tiny/final --tasks arc_easy,piqa --data-dir data --capacity 0.5
    """
    text = {"--data": source, "--tokens": tokens, "--context": context}
    asked = {"--data-dir": data_dir, "--limit": limit, "--num-fewshot": num_fewshot, "--out": out}
    _refuse_unless(tasks is None, text, "cannot be used with --tasks")
    _refuse_unless(tasks is not None, asked, "needs --tasks")
    _refuse_unless(sweep and tasks is None, {"--plot": plot}, "needs --sweep, without --tasks")
    _check_files(out, plot)
    found = _load(checkpoint)
    settings = _settings(found, capacity, steps, exits, sweep)
    if tasks is not None:
        answered = _on_tasks(
            found,
            settings,
            tasks,
            {"data_dir": data_dir, "num_fewshot": num_fewshot},
            {"limit": limit, "batch_size": batch_size},
            out,
        )
    else:
        windows: dict[str, Any] = {"split": split, "batch_size": batch_size}
        windows |= {"context": context, "limit_tokens": tokens}
        from archdsl.evaluation.data_choice import data_of

        data = data_of(found, one_source(source))
        if sweep or len(settings) > 1:
            answered = _along(found, data, settings, windows, plot)
        else:
            answered = _at(found, data, settings[0], windows)
    facts, shown = answered
    if as_json:
        print_json({"checkpoint": str(checkpoint)} | facts)
    else:
        print_parts(*shown)


def _refuse_unless(allowed: bool, given: Mapping[str, object], reason: str) -> None:
    for option, value in given.items():
        if value is not None and not allowed:
            raise ArchdslError(f"{option} {reason}")


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Raises ArchdslError for what cannot be written, before time is spent."""
    for path in filter(None, (out, plot)):
        check_output(path)
    if plot and find_spec("matplotlib") is None:
        raise ArchdslError("--plot needs matplotlib: pip install 'archdsl[plots]'")


def _load(path: Path) -> Checkpoint:

    from archdsl.model.checkpoint import load_checkpoint
    from archdsl.nn.devices import best_device

    return load_checkpoint(path, device=best_device())


def _settings(
    found: Checkpoint,
    capacity: Sequence[float | list[float]] | None,
    steps: Sequence[int] | None,
    exits: Sequence[float] | None,
    sweep: bool,
) -> list[DialSetting]:
    """The settings asked for; the trained one stands first if they are compared.

    Raises DialError for a setting that the model does not have.
    """
    from archdsl.evaluation.dial_sweep import (
        AS_TRAINED,
        DialSetting,
        check_settings,
        preset_settings,
    )

    if sweep and not (capacity or steps or exits):
        return [AS_TRAINED, *preset_settings(found.model)]
    capacities: Sequence[float | list[float] | None] = capacity or [None]
    counts: Sequence[int | None] = steps or [None]
    thresholds: Sequence[float | None] = exits or [None]
    given = [
        DialSetting(
            capacity=tuple(share) if isinstance(share, list) else share,
            steps=count,
            exit=threshold,
        )
        for share, count, threshold in product(capacities, counts, thresholds)
    ]
    check_settings(found.model, given)
    return [AS_TRAINED, *given] if sweep or len(given) > 1 else given


def _at(found: Checkpoint, data: Data, setting: DialSetting, windows: dict[str, Any]) -> Answer:
    """Scores held-out text at one setting of the compute dial."""
    from archdsl.evaluation.dial_sweep import dialled
    from archdsl.evaluation.evaluate import evaluate
    from archdsl.model.compute_meter import Meter, metered
    from archdsl.reports import tables
    from archdsl.reports.layout import TwoColumns

    meters = {True: Meter(), False: Meter()}  # by whether routers look at later tokens

    @contextmanager
    def watched() -> Iterator[None]:
        with metered(found.model) as meter:
            yield
        meters[found.model.leaks].add(meter)

    with dialled(found.model, setting):
        result = evaluate(found.model, data, **windows, watched=watched)
    flops = {leaks: meter.flops_per_token for leaks, meter in meters.items()}
    facts: dict[str, Any] = {
        "data": data.name,
        "setting": setting.model_dump(),
        "flops_per_token": flops[result.leaks],
    }
    facts |= result.model_dump()
    spent = f"{tables.short(flops[result.leaks])} FLOPs/token"
    if result.causal is not None:
        facts["causal"]["flops_per_token"] = flops[False]
        spent += f", {tables.short(flops[False])} with causal routing"
    head = f"{found.spec.name} on the {result.split} split of {data.name}"
    executed = [("dial", str(setting)), ("executed", spent)]
    return facts, [
        head,
        tables.evaluation(result, data.chance),
        TwoColumns(executed),
    ]


def _along(
    found: Checkpoint,
    data: Data,
    settings: Sequence[DialSetting],
    windows: dict[str, Any],
    picture: Path | None,
) -> Answer:
    """Scores held-out text at several settings of the compute dial."""
    from archdsl.evaluation.dial_sweep import plot, sweep
    from archdsl.reports import tables

    points = sweep(found.model, data, settings[1:], progress=True, **windows)
    if picture:
        plot(points, picture)
    head = f"{found.spec.name} on the {windows['split']} split of {data.name}"
    facts = {"data": data.name, "split": windows["split"]}
    shown = [head, "", tables.dial(points), *([f"plot: {picture}"] if picture else [])]
    return facts | {"points": [point.model_dump() for point in points]}, shown


def _on_tasks(
    found: Checkpoint,
    settings: Sequence[DialSetting],
    names: str,
    examples: dict[str, Any],
    extent: dict[str, Any],
    out: Path | None,
) -> Answer:
    """Scores tasks of lm-evaluation-harness at each setting of the compute dial."""
    try:
        from archdsl.evaluation.lm_eval_model import run_tasks, write_harness_results
        from archdsl.evaluation.lm_eval_tasks import load_tasks
    except ModuleNotFoundError as error:
        raise ArchdslError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'archdsl[lm-eval]'"
        ) from None
    from archdsl.evaluation.dial_sweep import dialled
    from archdsl.reports import tables

    tokenizer = _tokenizer(found)
    tasks = load_tasks([name.strip() for name in names.split(",") if name.strip()], **examples)
    runs, whole = [], []
    for setting in settings:
        print(f"{found.spec.name}, dial: {setting}", file=sys.stderr)
        with dialled(found.model, setting):
            scores, everything = run_tasks(tasks, found.model, tokenizer, **extent)
        runs.append((setting, scores))
        whole.append({"setting": setting.model_dump()} | everything)
    if out:
        write_harness_results(out, whole)
    facts = [{"setting": at.model_dump()} | scores.model_dump() for at, scores in runs]
    head = f"{found.spec.name}{', scored causally, as it decodes' if found.model.leaks else ''}"
    return {"routing": "causal", "settings": facts}, [head, "", tables.scores(runs)]


def _tokenizer(found: Checkpoint) -> Tokenizer:
    from archdsl.data.tokenizers import read_tokenizer

    if found.tokenizer is None:
        raise ArchdslError(
            f"{found.path} has no tokenizer because it was not trained on text: "
            "it cannot be scored on tasks"
        )
    return read_tokenizer(found.tokenizer)
