"""A worker that is a group of processes: all of them do the same work, each as one rank.

The worker is rank 0, and forks the other ranks when it starts, before there are threads. It sends
them each piece of work, and its result is that of the group. If one of them fails or is killed, the
group ends as if the worker itself had.

Each process has the environment variables that torchrun would set, so that work connects the ranks
by `archdsl.nn.ranks.joined`, as a training that torchrun has started does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, connection
from queue import SimpleQueue
from typing import Any, NoReturn

SECONDS_TO_TELL = 2.0  # that a rank has, after another has lost it, to say why it failed
SECONDS_BETWEEN_LOOKS = 0.25  # at whether the worker is alive
HOST = "127.0.0.1"

Link = connection.Connection  # between rank 0 and another rank


@dataclass
class Group:
    """The group, as one of its ranks sees it. ``rank``: of this process.

    ``links``: of rank 0, one to each other rank; of another, the one to rank 0. ``pids``: of the
    other ranks, known to rank 0.
    """

    rank: int = 0
    links: list[Link[Any, Any]] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    done: SimpleQueue[None] = field(default_factory=SimpleQueue)  # the ranks that have ended work
    store: Any = None  # in which the ranks leave their addresses

    def open(self, fail: Callable[[Any], None]) -> None:
        """Tell the other ranks where to meet, and listen to them. Called by rank 0.

        ``fail``: is called with a failure of another rank, in a thread. It must not return.
        """
        if not self.links:
            return
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for link, pid in zip(self.links, self.pids, strict=True):
            link.send(self.store.port)
            threading.Thread(target=self._listen, args=(link, pid, fail), daemon=True).start()
        self._meet_at(self.store.port)

    def follow(self) -> Link[Any, Any]:
        """Hear where the ranks meet; return the link to rank 0. Called by another rank."""
        [link] = self.links
        self._meet_at(link.recv())
        return link

    def send(self, work: bytes) -> None:
        """Send work to the other ranks. Called by rank 0."""
        for link in self.links:
            link.send_bytes(work)

    def wait(self) -> None:
        """Wait until the other ranks have ended their work. Called by rank 0."""
        for _ in self.links:
            self.done.get()

    def _listen(self, link: Link[Any, Any], pid: int, fail: Callable[[Any], None]) -> None:
        try:
            while (failure := link.recv()) is None:
                self.done.put(None)
            fail(failure)
        except (EOFError, OSError):
            _end_like(pid)

    def _meet_at(self, port: int) -> None:
        os.environ.update(
            MASTER_ADDR=HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True"
        )


def fork(devices: Sequence[int]) -> Group:
    """Fork the other ranks of a group, one for each device, and return the group in each of them.

    ``devices``: the number of each rank's device on this machine.
    """
    worker, pids = os.getpid(), list[int]()
    links: list[Link[Any, Any]] = []
    for rank, _ in enumerate(devices[1:], 1):
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            for link in (ours, *links):
                link.close()
            threading.Thread(target=_exit_after, args=(worker,), daemon=True).start()
            return _group(Group(rank, [theirs]), devices)
        theirs.close()
        links.append(ours)
        pids.append(pid)
    return _group(Group(0, links, pids), devices)


def _group(group: Group, devices: Sequence[int]) -> Group:
    size, device = str(len(devices)), str(devices[group.rank])
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=size, LOCAL_RANK=device)
    os.environ.update(LOCAL_WORLD_SIZE=size, GROUP_WORLD_SIZE="1")
    return group


def _exit_after(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _end_like(pid: int) -> NoReturn:
    """End this process in the way in which another one, which has ended, did."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
        time.sleep(SECONDS_TO_TELL)  # a thread of this process takes the signal
    os._exit(code or 1)
