"""docs/extending.md, followed step by step in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"^\$ (.+)$", re.M)


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    files = FILE.findall(PAGE)
    assert len(files) == 5
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = []
    for command in COMMAND.findall(PAGE):
        if command.startswith("pip install"):
            continue  # test_plugin_example.py installs a package
        words = command.replace("archdsl ", "python -m archdsl ", 1).split()
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran.append(words[2])
    assert ran == ["pytest", "archdsl", "archdsl", "archdsl"]


def test_the_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`((?:archdsl|blocks|examples)/[\w./-]+)`", PAGE)
    assert len(named) > 4
    assert all((ROOT / name).exists() for name in named)
