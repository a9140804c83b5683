"""Measures the CPU time that a command takes before it does anything, in seconds.

python -m benchmarks.startup [--json] [--small]

Help, completion and a mistyped option must answer within the target. The other commands read specs
and have no target, but none of them may import torch, which takes seconds. First each command must
end with the right status and say what it should. Bytecode is written first, as where the package is
installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.measure import (
    ROOT,
    NotEqual,
    arguments,
    bar,
    in_turns,
    progress,
    record,
)

BAR = 0.35  # seconds of user and system time
BAD_SPEC = """\
name: bad
vocab_size: 10
context: 8
dim: 8
blocks:
  - {kind: loop, stepz: 2, body: layer}
"""
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Command(NamedTuple):
    """The arguments of the interpreter, and the expected output and exit status."""

    words: Sequence[str]
    says: str
    status: int = 0
    has_target: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


def archdsl(*words: str) -> list[str]:
    return ["-m", "archdsl", *words]


def script(module: str, function: str, *words: str) -> list[str]:
    """As a console script calls it."""
    return ["-c", f"from {module} import {function}; {function}()", *words]


def commands(folder: Path) -> dict[str, Command]:
    bad = folder / "bad.yaml"
    bad.write_text(BAD_SPEC)
    options = partial(Command, has_target=True)
    typed = {"COMP_WORDS": "archdsl build itt --bu", "COMP_CWORD": "3"}
    return {
        "--help": options(archdsl("--help"), "Check a spec and print its receipt"),
        "--help, script": options(script("archdsl.cli", "main", "--help"), "Commands:"),
        "build --help": options(archdsl("build", "--help"), "--budget SIZE"),
        "train --help": options(archdsl("train", "--help"), "--batch-size"),
        "search --help": options(archdsl("search", "--help"), "--budget"),
        "mistyped option": options(archdsl("build", "itt", "--bugdet", "1M"), "--budget", 2),
        "completion": options(
            archdsl(),
            "--budget-of",
            environment=typed | {"_ARCHDSL_COMPLETE": "complete_bash"},
        ),
        "schema": Command(archdsl("schema"), "https://json-schema.org/draft/2020-12/schema"),
        "blocks": Command(archdsl("blocks"), "feed_forward"),
        "diff": Command(archdsl("diff", "loop", "itt"), "parameters"),
        "build": Command(archdsl("build", "itt"), "162,051,072"),
        "validation error": Command(archdsl("build", str(bad)), "did you mean 'steps'?", 2),
    }


PEERS = {
    "litgpt": Command(["-m", "litgpt", "--help"], "usage"),
    "transformers": Command(script("transformers.cli.transformers", "main", "--help"), "Usage"),
    "lm_eval": Command(script("lm_eval.__main__", "cli_evaluate", "--help"), "usage"),
}


def peers() -> dict[str, Command]:
    """Returns the help commands of those other libraries that are installed."""
    for name in PEERS:
        if not find_spec(name):
            progress(f"{name} is not installed")
    return {f"{name} --help": peer for name, peer in PEERS.items() if find_spec(name)}


def check(name: str, command: Command) -> None:
    """Raises NotEqual if a command has another exit status or output than expected."""
    done = subprocess.run(
        [sys.executable, *command.words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **command.environment},
    )
    output = done.stdout + done.stderr
    if done.returncode != command.status or command.says not in output:
        raise NotEqual(
            f"not equal: {name} exited with status {done.returncode} (expected {command.status}), "
            f"or did not print {command.says!r}:\n{output[-2000:]}"
        )
    progress(f"equal: {name} exits with status {command.status} and prints {command.says!r}")


def cpu_seconds(
    words: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})
) -> float:
    """Returns the user and system time of a process with these arguments, in seconds."""
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(
        [sys.executable, *words],
        stdout=quiet,
        stderr=quiet,
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Runs the benchmark. Exits with an error if a command fails."""
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        ours = {f"archdsl {name}": command for name, command in commands(Path(folder)).items()}
        every = ours if args.small else ours | peers()
        for name, command in every.items():
            check(name, command)
        timed = {
            name: partial(cpu_seconds, command.words, command.environment)
            for name, command in every.items()
        }
        timed["import torch"] = partial(cpu_seconds, ["-c", "import torch"])
        timed["python alone"] = partial(cpu_seconds, ["-c", "pass"])
        taken = in_turns(timed, args.rounds or (1 if args.small else 9))
    figures: dict[str, object] = dict(taken)
    figures |= {
        f"verdict, {name}": bar(taken[name].median, BAR)
        for name, command in ours.items()
        if command.has_target
    }
    record("startup", {"bar": BAR}, figures, args)


if __name__ == "__main__":
    main()
