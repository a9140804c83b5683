"""A command as a shell would run it, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archdsl.cli.app import app

SKILL = "skill:p-hop,hops=1,length=8,alphabet=3"


class Output:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs a command in this process, as a shell in ``folder`` would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Output:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="archdsl")
        status = end.value.code or 0
        assert isinstance(status, int)
        return Output(status, *self.capsys.readouterr())
