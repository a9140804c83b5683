"""The program as a process: streams that are closed, and Ctrl-C at any time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import archdsl.cli
from archdsl.cli import interrupts_only_here
from tests.cli.command import SKILL

WITHOUT_STREAMS = """
import sys
from archdsl.cli import open_missing_streams

open_missing_streams()
with open("numbers", "w") as file:
    print(file.fileno() > 2, repr(sys.stdin.read()), file=file)
    print("to nowhere")
    print("to nowhere", file=sys.stderr)
"""


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What is printed would end in it."""
    (tmp_path / "program.py").write_text(WITHOUT_STREAMS)
    command = f"exec {sys.executable} program.py <&- >&- 2>&-"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "numbers").read_text() == "True ''\n"


def test_ctrl_c_raises_only_while_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def command(**_: object) -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("archdsl.cli.app.app", command)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(SystemExit) as end:
            archdsl.cli.main()
        seen.append(signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup starts a program
        with interrupts_only_here():
            seen.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert seen == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN]


@pytest.mark.slow
def test_three_interrupts_in_a_row_end_a_training_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "archdsl", "train", "tiny", "--data", SKILL, "--context", "8"]
    command += ["--steps", "1000000", "--log-every", "1", "--out", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        while not (log := tmp_path / "run" / "metrics.jsonl").exists() or not log.read_bytes():
            assert running.poll() is None
            time.sleep(0.05)
        for _ in range(3):
            running.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, said = running.communicate(timeout=60)
    assert running.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said
    left = {path.name for path in (tmp_path / "run").rglob("*.tmp")}
    assert left <= {".step-000001.tmp"}  # the third one may end the process at once


@pytest.mark.parametrize("command", ["schema", "blocks router"])  # more, and less than a buffer
def test_a_full_disk_behind_stdout_is_one_line(command: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "archdsl", *command.split()]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "the output could not be written: No space left on device\n"
