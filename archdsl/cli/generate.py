"""The generate command."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli.options import (
    Capacity,
    CheckpointFolder,
    Exit,
    Json,
    Steps,
    check_output,
    config_from,
    print_json,
)
from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from rich.progress import Progress
    from tokenizers import Tokenizer

    from archdsl.generation.generate import Generation, GenerationRun, Throughput
    from archdsl.generation.sampling_config import Sampling
    from archdsl.model.checkpoint import Checkpoint

# control characters of a text could change the terminal: visible ones are printed instead
VISIBLE = {n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"}
VISIBLE |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)

MOST_NAMED = 4  # routed steps whose shares are printed one by one

Prompt = Annotated[
    str,
    typer.Argument(
        help="The text to continue. - reads it from stdin. Default: begin a new document.",
        show_default=False,
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Continue many prompts: one per line of a text file, or the key `prompt` of each "
        "line of a .jsonl file. Prints one JSON object per line.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --prompts: write the JSON lines to this file, not to stdout."
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="With --prompts: number of prompts continued at once.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Stop where this text would begin, and do not print it. May be repeated.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the decoding step first. This takes up to two minutes, so it is for long "
        "texts and for many prompts.",
    ),
]
MapFile = Annotated[
    Path | None,
    typer.Option(
        "--think-map",
        metavar="FILE",
        help="Write an HTML page that colours each token by its number of thinking steps.",
    ),
]


def config_class() -> type[Sampling]:
    """The settings that are options of ``archdsl generate``."""
    from archdsl.generation.sampling_config import Sampling

    return Sampling


def generate(
    ctx: typer.Context,
    checkpoint: CheckpointFolder,
    prompt: Prompt = "",
    file: PromptsFile = None,
    out: Out = None,
    batch_size: BatchSize = 8,
    stop: Stop = None,
    capacity: Capacity = None,
    steps: Steps = None,
    leave: Exit = None,
    compiled: Compile = False,
    map_file: MapFile = None,
    as_json: Json = False,
) -> None:
    """Continue a text with a trained model.

    The text goes to stdout while it is generated; speed and compute go to stderr. Examples:

      archdsl generate runs/tiny/final "My fellow citizens" --temperature 0

      archdsl generate runs/tiny/final --capacity 0.9,0 --think-map map.html

      archdsl generate runs/tiny/final --prompts prompts.txt --out texts.jsonl
    """
    sampling = config_from(ctx, config_class())
    _check(prompt, file, out, map_file, as_json)
    from archdsl.generation.prompts import read_prompts

    prompts = read_prompts(file) if file else [_from_stdin() if prompt == "-" else prompt]
    found, tokenizer = _loaded(checkpoint)
    found.model.dial(capacity, steps, leave)
    from archdsl.generation.generate import generation_runs

    done = generation_runs(
        found.model,
        prompts,
        sampling,
        tokenizer=tokenizer,
        stop=stop or (),
        batch_size=batch_size,
        compiled=compiled,
    )
    if file is None:
        _print_stream(done[0], prompts[0], as_json)
    else:
        _print_lines(done, prompts, out)
    if as_json:
        print_json(({} if file else _facts(done[0].rows[0])) | _speed_figures(done))
    else:
        print("\n".join(_lines(done)), file=sys.stderr)
    if map_file:
        _write_map(map_file, done, tokenizer, _setting(capacity, steps, leave))


def _check(
    prompt: str, file: Path | None, out: Path | None, map_file: Path | None, as_json: bool
) -> None:
    """Raises ArchdslError for options that do not go together, before time is spent."""
    if file and prompt:
        raise ArchdslError("a prompt and --prompts are given: give only one of them")
    if out and not file:
        raise ArchdslError("--out needs --prompts: a single text goes to stdout")
    if file and as_json and not out:
        raise ArchdslError(
            "--prompts prints JSON lines to stdout already: --json also needs --out FILE"
        )
    for path in (out, map_file):
        if path:
            check_output(path)


def _from_stdin() -> str:
    """All of stdin without its last newline, as a shell's $(...) would give it."""
    from archdsl.generation.prompts import decoded

    return decoded(sys.stdin.buffer.read(), "stdin").removesuffix("\n")


def _print_stream(run: GenerationRun, prompt: str, quiet: bool) -> None:
    if not quiet and sys.stdout.isatty():
        print(prompt.translate(VISIBLE), end="")
    for piece in run:
        if not quiet:
            text = piece.text.translate(VISIBLE) if sys.stdout.isatty() else piece.text
            print(text, end="", flush=True)
    if not quiet:
        print()


def _print_lines(runs: Sequence[GenerationRun], prompts: Sequence[str], out: Path | None) -> None:
    lines = []
    remaining = iter(prompts)
    with _bar() as bar:
        task = bar.add_task("prompts", total=len(prompts))
        for run in runs:
            for piece in run:
                bar.advance(task, run.rows[piece.row].stopped is not None)
            for row in run.rows:
                lines.append(_line(next(remaining), row))
                if out is None:
                    print(lines[-1], flush=True)
    if out is not None:
        _write(out, "".join(f"{line}\n" for line in lines))


def _line(prompt: str, row: Generation) -> str:
    return json.dumps({"prompt": prompt} | _facts(row), allow_nan=False)


def _facts(row: Generation) -> dict[str, Any]:
    return {
        "text": row.text,
        "tokens": row.tokens,
        "stopped": row.stopped,
        "thinking_steps": row.thinking_steps,
    }


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())


def _loaded(path: Path) -> tuple[Checkpoint, Tokenizer]:

    from archdsl.data.tokenizers import read_tokenizer
    from archdsl.model.checkpoint import load_checkpoint
    from archdsl.nn.devices import best_device

    found = load_checkpoint(path, device=best_device())
    if found.tokenizer is None:
        raise ArchdslError(
            f"{path} has no tokenizer because it was not trained on text: it cannot write text"
        )
    found.model.for_decoding()
    return found, read_tokenizer(found.tokenizer)


def _speed_figures(runs: Sequence[GenerationRun]) -> dict[str, Any]:
    return {"preparation_s": sum(run.preparation for run in runs)} | {
        name: {
            "tokens": pace.tokens,
            "tokens_per_s": pace.tokens_per_s,
            "thinking_steps": pace.thinking_steps,
            "shares": pace.router_shares,
        }
        for name, pace in _summed(runs).items()
    }


def _summed(runs: Sequence[GenerationRun]) -> dict[str, Throughput]:
    from archdsl.generation.generate import Throughput

    paces = {"prefill": Throughput(), "decode": Throughput()}
    for run in runs:
        paces["prefill"].add(run.prefill)
        paces["decode"].add(run.decode)
    return paces


def _lines(runs: Sequence[GenerationRun]) -> Iterator[str]:
    """The figures for a reader, one line each."""
    paces, rows = _summed(runs), [row for run in runs for row in run.rows]
    yield f"prompt: {paces['prefill'].tokens:,} tokens{_speed(paces['prefill'])}"
    if seconds := sum(run.preparation for run in runs):
        yield f"preparing the decoding step: {seconds:.1f} s"
    yield f"text: {sum(len(row.tokens) for row in rows):,} tokens{_speed(paces['decode'])}"
    counts = Counter(_end(run, row) for run in runs for row in run.rows)
    for end, count in counts.most_common():
        many = f"{count:,} text{'s' if count > 1 else ''} " if len(rows) > 1 else ""
        yield f"{many}stopped {end}"


def _speed(pace: Throughput) -> str:
    if not pace.tokens:
        return ""
    return (
        f" at {pace.tokens_per_s:,.1f} tokens/s, "
        f"{pace.thinking_steps:.2f} further thinking steps per token{_selected(pace.router_shares)}"
    )


def _selected(shares: dict[str, float]) -> str:
    if not shares:
        return ""
    if len(shares) <= MOST_NAMED:
        named = ", ".join(f"{place} {share:.0%}" for place, share in shares.items())
        return f" (selected: {named})"
    least, most = min(shares.values()), max(shares.values())
    return f" (selected: {least:.0%} to {most:.0%} by {len(shares)} routed steps)"


def _end(run: GenerationRun, row: Generation) -> str:
    return {
        "end": "at the end of the document",
        "stop": "before a --stop",
        "length": f"after {len(row.tokens):,} tokens (--max-tokens)",
        "context": f"at the context limit of {run.model.spec.context:,} tokens",
    }[row.stopped or "length"]


def _setting(capacity: float | list[float] | None, steps: int | None, leave: float | None) -> str:
    given = {"capacity": capacity, "steps": steps, "exit": leave}
    words = [
        f"{name} {','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
        if value is not None
    ]
    return ", ".join(words) or "as trained"


def _write_map(
    path: Path, runs: Sequence[GenerationRun], tokenizer: Tokenizer, setting: str
) -> None:
    from archdsl.generation.think_map import think_map

    rows = [row for run in runs for row in run.rows]
    _write(path, think_map(rows, tokenizer, name=runs[0].model.spec.name, setting=setting))


def _write(path: Path, text: str) -> None:
    from archdsl.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise ArchdslError(f"{path} could not be written: {error.strerror}") from None
