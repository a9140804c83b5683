"""Everything that archdsl writes or reads, small, and the commands that read each of them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archdsl.cli.app import app
from archdsl.data.loading import load_data
from archdsl.data.tokenizers import train_bpe
from archdsl.errors import ArchdslError
from archdsl.training.run import train
from tests.interop.test_import_weights import pretrained
from tests.search.test_search import SPACE, go
from tests.training.test_run import CONFIG, SKILL, HookedData, Killed, kill, spec

SECONDS = 60  # that a command may take
SMALL = """
name: small
vocab_size: 257
context: 16
dim: 8
blocks:
  - {kind: layer, attention: {head_size: 4}, ffn: {hidden: 8}}
  - kind: loop
    steps: 2
    router: {kind: prefix, capacity: 0.5}
    body: {kind: layer, attention: {head_size: 4}, ffn: {hidden: 8}}
"""
PLAIN = """
name: plain
vocab_size: 257
context: 16
dim: 8
blocks:
  - {kind: layer, attention: {head_size: 4}, ffn: {hidden: 8}}
"""
TRAINING = "steps: 3\nbatch_size: 2\ncheckpoint_every: 1\nlog_every: 1\neval_tokens: 32\nseed: 1\n"
OVERLAY = """
name: thinking
layers: [0]
loop: {steps: 2, router: {kind: prefix, capacity: 0.5}, residual: {kind: thinking},
  encoding: {kind: scale, init: 0}}
"""
TEXTS = [f"It was the {number}th of many days, and the sun shone." for number in range(40)]

CHATS = "".join(
    json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in TEXTS
)

Command = Callable[[Path], None]  # runs in a copy of the artefacts, with the altered file


@dataclass(frozen=True)
class Outcome:
    """The end of a command. ``fault``: what went wrong with it, such as a traceback."""

    status: int
    said: str
    fault: str = ""


def ran(command: Command, altered: Path) -> Outcome:
    """Runs a command; what is neither its success nor an error of archdsl is a fault."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            with _at_most(SECONDS):
                command(altered)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except ArchdslError as error:
            status = error.exit_status
            said.write(str(error))
        except (Exception, _TooLongError) as error:
            return Outcome(-1, said.getvalue(), f"{type(error).__name__}: {error}"[:500])
    fault = "" if status in (0, 1, 2) else f"status {status}"
    if "Traceback" in said.getvalue():
        fault = "a traceback"
    return Outcome(status, said.getvalue(), fault)


class _TooLongError(BaseException):
    """Nothing catches it."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise _TooLongError(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cli(words: str) -> Command:
    """A command of the command line, in which ALTERED stands for the altered file."""

    def run(altered: Path) -> None:
        given = [str(altered) if word == "ALTERED" else word for word in words.split()]
        app(given, prog_name="archdsl")

    return run


def search_on(space: str, out: str, **given: Any) -> Command:
    return lambda altered: (go(Path(space), Path(out), **given), None)[1]


def resume(folder: str) -> Command:
    return lambda altered: (train(spec(), SKILL, CONFIG, folder), None)[1]


def read_data(altered: Path) -> None:
    load_data(altered, cache=tempfile.mkdtemp(dir=".")).batch(0, 1, 4, 0)


def check_config(altered: Path) -> None:
    """Reads the settings alone: with some of them a training may rightly take any time."""

    def end(*_: object, **__: object) -> None:
        raise SystemExit(0)

    is_search = altered.name == "search.yaml"
    command = "search space.yaml" if is_search else "train small.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archdsl.training.run.train", end)
        patch.setattr("archdsl.search.run.run_search", end)
        patch.setattr("archdsl.search.workers.pool.start_server", lambda: None)
        cli(f"{command} --config ALTERED")(altered)


@dataclass(frozen=True)
class Artefact:
    """Files of one kind: where they are, and the commands that read them.

    ``all_is_read``: whether each command reads each tensor.
    """

    files: str  # a pattern below the folder of all artefacts
    commands: list[Command] = field(default_factory=list)
    all_is_read: bool = False


ON_TEXT = "--data text.txt --context 16 --tokens 32"
ARTEFACTS: Mapping[str, Artefact] = {
    "checkpoint": Artefact(
        "run/final/*",
        [
            cli(f"eval run/final {ON_TEXT}"),
            cli(f"eval run/final --sweep {ON_TEXT}"),
            cli("generate run/final It --max-tokens 2"),
            cli("train run/final --data text.txt --steps 1 --out new"),
            cli("retrofit run/final overlay.yaml --out grown"),
            cli("check run/final"),
            cli("export run/final written"),
            cli("train small.yaml --data text.txt --config training.yaml --out run"),
        ],
        all_is_read=True,
    ),
    "training state": Artefact(
        "begun/{metrics.jsonl,checkpoints/step-000010/*.*}", [resume("begun")], all_is_read=True
    ),
    "finished training": Artefact(
        "done/{metrics.jsonl,final/*.*}", [resume("done")], all_is_read=True
    ),
    "study": Artefact(
        "found/*.j*",
        [
            cli("study ls ."),
            cli("study ls . --json"),
            cli("study show found"),
            cli("study show found --json"),
            cli("study best found"),
            cli("study export found --as jsonl"),
            cli("study export found"),
            cli("study rm found --yes"),
            search_on("space.yaml", "found", trials=3),
        ],
    ),
    "result store": Artefact(
        "found/proxies/**/*",
        [
            search_on("space.yaml", "found", trials=3),
            search_on("space.yaml", "other", trials=2, store="found/proxies"),
        ],
    ),
    "token cache": Artefact("cache/tokens/*", [cli(f"eval run/final {ON_TEXT}")]),
    "exported folder": Artefact(
        "exported/*.*", [cli("import exported --out imported")], all_is_read=True
    ),
    "foreign folder": Artefact(
        "foreign/*.*", [cli("import foreign --out imported")], all_is_read=True
    ),
    "imported checkpoint": Artefact(
        "kept/text_format.json",
        [
            cli("generate kept It --max-tokens 2"),
            cli(f"eval kept {ON_TEXT}"),
            cli("export kept written"),
            cli("train kept --data chats.jsonl --steps 1 --batch-size 1 --out new"),
        ],
    ),
    "spec": Artefact(
        "{small,base,overlay,space}.yaml",
        [
            cli("build ALTERED"),
            cli("build child.yaml"),
            cli("diff ALTERED small.yaml"),
            cli("check ALTERED"),
            cli("retrofit run/final ALTERED --out grown"),
        ],
    ),
    "config": Artefact("{training,search}.yaml", [check_config]),
    "data": Artefact(
        "data/**/*.*",
        [read_data, cli("eval run/final --data ALTERED --context 16 --tokens 32")],
    ),
    "saved data set": Artefact("saved/**/*.*", [lambda altered: read_data(Path("saved"))]),
    "prompts": Artefact("prompts.*", [cli("generate run/final --prompts ALTERED --max-tokens 1")]),
    "tokenizer": Artefact(
        "own/tokenizer.json",
        [
            cli(
                "train small.yaml --data text.txt --config training.yaml --out new "
                "--tokenizer ALTERED"
            )
        ],
    ),
}


def make(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Writes all artefacts into the folder, which becomes the working directory."""
    patch.chdir(folder)
    patch.setenv("ARCHDSL_CACHE", "cache")
    patch.setenv("COLUMNS", "200")
    for name, text in {
        "small.yaml": SMALL,
        "base.yaml": SMALL,
        "plain.yaml": PLAIN,
        "child.yaml": "extends: base.yaml\nset: {blocks.1.steps: 3}\n",
        "overlay.yaml": OVERLAY,
        "space.yaml": SPACE,
        "training.yaml": TRAINING,
        "search.yaml": "trials: 2\nproxy: dim=16,head_size=8,steps=2\nobjective: loss\nseeds: 2\n",
        "text.txt": "\n".join(TEXTS),
        "chats.jsonl": CHATS,
        "prompts.txt": "It was\nand then",
        "prompts.jsonl": '{"prompt": "It was"}\n{"prompt": "and then"}\n',
    }.items():
        Path(name).write_text(text)
    write_data(Path("data"))
    run("train small.yaml --data text.txt --config training.yaml --tokenizer bytes --out run")
    with pytest.raises(Killed):
        train(spec(), HookedData(SKILL.skill, 11, kill), CONFIG, folder / "begun")
    train(spec(), SKILL, CONFIG, folder / "done")
    go(Path("space.yaml"), Path("found"), trials=2)
    run("build plain.yaml --out plain")
    run("export plain exported")
    Path("exported/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    run("import exported --out kept")
    pretrained(Path("foreign"))
    own = train_bpe(TEXTS, 257)
    Path("own").mkdir()
    own.save("own/tokenizer.json")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk("saved")
    shutil.rmtree("cache")
    run(f"eval run/final {ON_TEXT}")  # so that the cache holds this alone


def run(words: str) -> None:
    """Runs a command that must succeed."""
    done = ran(cli(words), Path())
    assert (done.status, done.fault) == (0, ""), done.said


def write_data(folder: Path) -> None:
    """Writes the texts in each format."""
    import bz2
    import gzip
    import lzma

    folder.mkdir()
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    table = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "b.jsonl").write_bytes(lines)
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "e.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "f.txt.xz").write_bytes(lzma.compress(lines))
    with pa.CompressedOutputStream(str(folder / "g.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    pq.write_table(table, folder / "h.parquet")
    with pa.ipc.new_file(str(folder / "i.arrow"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(str(folder / "j.arrow"), table.schema) as stream:
        stream.write_table(table)
