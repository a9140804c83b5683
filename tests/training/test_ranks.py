"""Several processes that train one model: the same answer as one process, from less memory.

They are started by torchrun on the CPU, connected by gloo.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from archdsl.errors import ArchdslError
from archdsl.files import read_lines
from archdsl.model.checkpoint import CheckpointError, load_checkpoint
from archdsl.nn.ranks import Ranks
from archdsl.training.run import Recorder, TrainingDiverged, last_checkpoint
from archdsl.training.sharded import result_of
from tests.cli.command import Cli
from tests.training.ranks_job import TRAINED, losses, models, trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
ALONE = Ranks(torch.device("cpu"))
BY_HAND = "ARCHDSL_BENCHMARKS" in os.environ  # what would take minutes
WORLDS = [(2, "fsdp"), (4, "fsdp"), (4, "ddp")] if BY_HAND else [(2, "fsdp")]


def launch(processes: int, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    arguments = [*TORCHRUN, str(processes), "-m", *command]
    return subprocess.run(
        arguments, env=ENV, capture_output=True, text=True, timeout=600, check=False, **options
    )


def result(folder: Path, job: str, processes: int, parallel: str) -> dict[str, Any]:
    file = folder / "found.json"
    done = launch(processes, "tests.training.ranks_job", job, parallel, str(file))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(file.read_text()))


@cache
def alone() -> dict[str, Any]:
    return losses(ALONE)


# The same answer


def test_gradients_are_those_of_one_process_and_weights_are_gathered_once(tmp_path: Path) -> None:
    results = result(tmp_path, "gradients", 2, "fsdp")
    assert results["error of the second"] == ["blocks.0: is wrong", 2, True]
    found = results["models"]
    assert found.keys() == models().keys()
    for name, one in found.items():
        assert one["error"] < 1e-9, name
        layers = one["units"] - 1
        # each layer once forward and once backward, or once for all parts; the rest once
        gathers = layers + 1 if name == "depths" else 2 * layers + 1
        assert one["collectives"]["_allgather_base_"] == gathers, name
        assert one["collectives"]["_reduce_scatter_base_"] == layers + 1, name


@pytest.mark.parametrize(("processes", "parallel"), WORLDS)
def test_losses_statistics_and_validation_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, processes: int, parallel: str
) -> None:
    found = result(tmp_path, "losses", processes, parallel)
    share = 1 if parallel == "ddp" else 1 / processes
    for name in TRAINED:
        wanted, got = alone()[name], found[name]
        for figure in ("losses", "validation", "statistics"):
            assert got[figure] == pytest.approx(wanted[figure], rel=1e-9, abs=1e-9), (name, figure)
        assert got["bytes"] <= (share + 0.05 * (share < 1)) * wanted["bytes"], name


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    ranks = Ranks(torch.device("cpu"), rank=1, size=3)
    with pytest.raises(ArchdslError, match=r"8 sequences cannot .* processes \(3\).*multiple of 3"):
        trainer(models()["threshold"], ranks)


# Checkpoints

RUN = "tiny --batch-size 4 --context 16 --eval-tokens 32 --log-every 1 --checkpoint-every 4"
RUN += (
    " --data skill:p-hop,length=16 --device cpu --schedule constant --warmup-steps 2 --set dim=16"
)


def train(out: Path, processes: int, *more: str) -> None:
    done = launch(processes, "archdsl", "train", *RUN.split(), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1  # one of them speaks


def train_on_two_machines(out: Path, *more: str) -> None:
    """Two torchruns of two processes each, as two machines would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*TORCHRUN, "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port), "--node-rank"]
    runs = [
        subprocess.Popen(
            [*command, rank, "-m", "archdsl", "train", *RUN.split(), "--out", str(out), *more],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out.count("perplexity") for out, _ in said] == [1, 0]


def logged(out: Path) -> list[float]:
    return [line["loss"] for line in read_lines(out / "metrics.jsonl")]


def test_a_run_goes_on_with_other_processes_and_ends_as_a_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divided, whole, alone = tmp_path / "divided", tmp_path / "whole", Cli(capsys)
    train(divided, 2, "--parallel", "fsdp", "--steps", "6")
    check_shards(divided / "checkpoints" / "step-000006", divided / "final")
    assert alone("train", *RUN.split(), "--out", str(divided), "--steps", "11").status == 0
    train_on_two_machines(divided, "--parallel", "hsdp", "--steps", "15")
    assert alone("train", *RUN.split(), "--out", str(whole), "--steps", "15").status == 0
    assert logged(divided) == pytest.approx(logged(whole), abs=1e-5)
    ends = [load_checkpoint(out / "final").model.state_dict() for out in (divided, whole)]
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-4), name


def check_shards(saved: Path, final: Path) -> None:
    """A checkpoint of shards is one for every command, and one without a shard is refused."""
    weights = load_checkpoint(saved).model.state_dict()
    for name, tensor in load_checkpoint(final).model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    copy = saved.parent.parent / "copy"
    shutil.copytree(saved, copy)
    next(copy.glob("shard-*")).unlink()
    with pytest.raises(ArchdslError, match=r"shard-\S+ is missing"):
        load_checkpoint(copy)


def test_a_divergence_is_told_by_the_first_process_alone() -> None:
    for rank in (0, 1):
        seen = cast(Recorder, SimpleNamespace(out=None, ranks=Ranks(ALONE.device, rank, size=2)))
        with pytest.raises(TrainingDiverged, match="the loss is nan; no checkpoint was") as error:
            Recorder.give_up(seen, TrainingDiverged("the loss is nan"))
        assert error.value.told_by_another == (rank == 1)


def test_a_full_disk_of_any_process_is_told_in_one_line() -> None:
    running: Future[None] = Future()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    running.set_exception(CheckpointException("write", {1: (full, StackSummary())}))
    with pytest.raises(CheckpointError, match=r"^out could not be written: No space left on dev"):
        result_of(running, Path("out"))


@pytest.mark.skipif(not BY_HAND, reason="a minute for each of twelve kills; by hand")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("killed_are", ["one", "all"])
def test_a_killed_process_costs_at_most_one_interval(
    tmp_path: Path, seed: int, killed_are: str
) -> None:
    """torchrun starts again after one of them is killed; after all are, the same command does."""
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(seed)
    command = [*TORCHRUN, "2", "--max-restarts", "1", "-m", "archdsl", "train", *RUN.split()]
    more = ["--parallel", "fsdp", "--steps", "40", "--out", str(killed)]
    train(whole, 1, "--steps", "40")
    with subprocess.Popen([*command, *more], env=ENV, stderr=subprocess.DEVNULL) as run:
        while not (killed / "metrics.jsonl").exists() or not logged(killed):
            assert run.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        workers = _workers(run.pid)
        for pid in [draw.choice(workers)] if killed_are == "one" else [run.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        reached = read_lines(killed / "metrics.jsonl")[-1]["step"]
        checkpoint = last_checkpoint(killed)
        kept = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        assert reached - kept <= 2 * 4  # an interval, and one that was being written
        assert run.wait(120) == (0 if killed_are == "one" else -signal.SIGKILL)
    if killed_are == "all":
        train(killed, 2, *more[:-2])
    assert logged(killed) == pytest.approx(logged(whole), abs=1e-4)


def _workers(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(task) for task in tasks]
