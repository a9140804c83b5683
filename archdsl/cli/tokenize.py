"""The tokenize command, which writes text as shards of tokens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archdsl.cli.options import Column, Json, print_json, size

if TYPE_CHECKING:
    from archdsl.data.shard_index import ShardIndex
    from archdsl.data.tokenization import Tell

SECONDS_BETWEEN_LINES = 30.0

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Files or folders of text, JSONL, parquet or arrow. Several are read as if they stood "
        "in one folder. Or one hf:DATASET/CONFIG, whose text is read without storing it. "
        "SOURCE::COLUMN also says which column is the text.",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the shards, for --data of the other commands.")]
Choice = Annotated[
    str,
    typer.Option(
        metavar="CHOICE",
        help="bytes, bpe:SIZE (trained on the training text) or the path of a tokenizer.json. It "
        "must have no more tokens than the vocab_size of the spec to be trained.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes to use. Default: one for each processor."),
]
ShardTokens = Annotated[
    int, typer.Option(parser=size, metavar="SIZE", help="Most tokens of a shard.")
]


def tokenize(
    sources: Sources,
    out: Out,
    tokenizer: Choice = "bytes",
    column: Column = None,
    workers: Workers = None,
    shard_tokens: ShardTokens = 100_000_000,
    as_json: Json = False,
) -> None:
    """Write text as shards of tokens, once, for all trainings on it.

    The documents and splits are those that --data would give. The same command goes on after a
    crash, Ctrl-C or a full disk; what is finished is kept. Examples:

      archdsl tokenize novels --out tokens --tokenizer bpe:32000

      archdsl train my-spec.yaml --data tokens

      archdsl tokenize train.jsonl valid.jsonl --out tokens --tokenizer runs/a/final/tokenizer.json
    """
    from archdsl.data.tokenization import tokenize

    with _telling() as tell:
        index = tokenize(
            sources,
            out,
            tokenizer=tokenizer,
            column=column,
            workers=workers,
            shard_tokens=shard_tokens,
            tell=tell,
        )
    if as_json:
        print_json(_facts(out, index))
        return
    for split, facts in _by_split(index).items():
        words = (f"{what.replace('_', ' ')} {number:,}" for what, number in facts.items())
        print(f"{split}: {', '.join(words)}")
    print(f"shards: {out}")


def _facts(out: Path, index: ShardIndex) -> dict[str, Any]:
    return {"out": str(out), "dtype": index.dtype, "splits": _by_split(index)}


def _by_split(index: ShardIndex) -> dict[str, dict[str, int]]:
    facts: dict[str, dict[str, int]] = {}
    for shard in index.shards:
        own = facts.setdefault(
            shard.split, dict.fromkeys(("shards", "documents", "tokens", "text_bytes"), 0)
        )
        own["shards"] += 1
        own["documents"] += shard.documents
        own["tokens"] += shard.tokens
        own["text_bytes"] += shard.text_bytes
    return facts


@contextmanager
def _telling() -> Iterator[Tell]:
    """Shows on stderr how far it is: a bar in a terminal, elsewhere a line every half minute."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, before = bar.add_task("", total=None), ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal before
            if what != before:
                bar.reset(task, description=what)
            before = what
            bar.update(task, completed=done, total=total or None)

        yield tell


class _Lines:
    """Prints how far it is, and the time left."""

    def __init__(self) -> None:
        self.what, self.started, self.first, self.line = "", 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.started, self.first = what, now, done
        elif now - self.line < SECONDS_BETWEEN_LINES and done < total:
            return
        self.line = now
        left = ""
        if done > self.first and done < total:
            seconds = (now - self.started) * (total - done) / (done - self.first)
            left = f", about {seconds / 60:,.1f} minutes left"
        share = f": {done / 1e6:,.0f} of {total / 1e6:,.0f} MB{left}" if total else ""
        print(f"{what}{share}", file=sys.stderr, flush=True)
