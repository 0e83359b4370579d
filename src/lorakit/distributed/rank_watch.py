"""Name a rank that is dead or stopped, and end the others.

A collective waits for a lost rank until its timeout: torchrun alone was still waiting after 150 s.
A thread of each rank passes a `monitored_barrier` every second, in a group of its own, whatever the
main thread computes or waits for. A rank that is missing there is named.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from lorakit.storage.run_dir import RunDir

ROUND_SECONDS = 1.0
# A healthy process passes the barrier even in a long step: 30 s of silence mean that it is stuck.
SILENT = timedelta(seconds=30)
# Time for an error in this or another process to be printed.
GRACE_SECONDS = 2.0
# After this time a lost rank has been named, even where rank 0 is the lost one.
LOST_SECONDS = SILENT.seconds + 5 * GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class Member:
    """One rank; processes of the same host and pid namespace can see each other."""

    rank: int
    device: str
    host: str
    namespace: str
    pid: int
    versions: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device} on {self.host}, process {self.pid})"


class RankWatch(threading.Thread):
    """Thread that passes barriers with the other ranks' threads.

    Args:
        group: a gloo group used only here.
        store: a connection to the launcher's store used only here.
    """

    def __init__(self, members: Sequence[Member], rank: int, group: Any, store: Any) -> None:
        super().__init__(daemon=True, name="rank watch")
        self.members, self.own, self.group, self.store = members, members[rank], group, store
        self.step = 0
        self.folder: Path | None = None
        self.checkpoint_summary: Callable[[], str] = lambda: "nothing was trained yet"
        self.gate, self.wake = threading.Lock(), threading.Event()
        self.rounds, self.last = 0, sys.maxsize
        self.parent = os.getppid()
        self.failing = False
        self.stopped: list[int] = []

    def finish(self, gather: Callable[[int], list[int]]) -> None:
        """End the threads of all ranks after the same barrier."""
        with self.gate:  # no new round while the ranks compare theirs
            self.last = max(gather(self.rounds))
        self.wake.set()
        self.join()

    def fail(self) -> None:
        """Let the other ranks end silently, because this one prints an error."""
        self.failing = True
        self._ask(lambda: self.store.set("failed", ""))
        if self.own.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * ROUND_SECONDS)  # the others read the store of this process
        self.last = 0
        # A thread inside the barrier would abort the interpreter; the others read the store.
        self.join(2 * GRACE_SECONDS)

    def run(self) -> None:
        import torch.distributed as dist

        while self._begins_round():
            if not self.failing and self._ask(lambda: self.store.check(["failed"])):
                self._abort("")
            try:
                dist.monitored_barrier(self.group, SILENT, wait_all_ranks=True)
            except RuntimeError as error:
                if self.failing:
                    return
                self._judge(str(error))
            if os.getppid() != self.parent:
                # The launcher has ended: finish the step, save and stop, once.
                self.parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            self.wake.wait(ROUND_SECONDS)

    def _begins_round(self) -> bool:
        with self.gate:
            begins = self.rounds < self.last
            self.rounds += begins
            return begins

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Ask the store; None if it has ended, or is part of a stopped rank 0."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS)
        return answers[0] if answers else None

    def _judge(self, error: str) -> None:
        """Name the ranks that missed a barrier: rank 0 knows them, the others miss rank 0."""
        faulty = [0]
        if self.own.rank == 0:
            named = re.search(r"anks? ([\d, ]+) failed to pass", error)
            faulty = [int(number) for number in named[1].split(",")] if named else self._broken()
        else:
            time.sleep(GRACE_SECONDS)  # for the words of rank 0, if it lives
        if self._ask(lambda: self.store.check(["failed"])):
            self._abort("")
        reports = self._ask(lambda: self.store.add("reports", 1)) or max(1, self.own.rank)
        members = [self.members[rank] for rank in faulty]
        self._abort(self.message(members, error) if reports == 1 else "")

    def _broken(self) -> list[int]:
        """Ranks whose connection is closed, which the barrier's error does not name."""
        import torch
        import torch.distributed as dist

        broken = []
        for rank in range(1, len(self.members)):
            try:
                dist.irecv(torch.empty(1), rank, self.group)
            except RuntimeError:
                broken.append(rank)
        return broken

    def message(self, faulty: Sequence[Member], error: str) -> str:
        """Say what happened to the faulty ranks, and how to continue."""
        lines = [f"error: {m} {self._fate(m)}, after step {self.step}" for m in faulty]
        if not faulty:
            lines = [f"error: a rank does not answer after step {self.step}: {error}"]
        remedy = "start the same command again"
        if self.folder is not None and len({member.host for member in self.members}) > 1:
            remedy += " on every machine, with --resume"
        elif self.folder is not None:
            remedy = f"resume with: {RunDir(self.folder).going_on(len(self.members))}"
        cause = "check dmesg: the kernel kills what takes too much memory"
        return "\n".join([*lines, f"  {self.checkpoint_summary()}", f"hint: {cause}; {remedy}"])

    def _fate(self, member: Member) -> str:
        if (member.host, member.namespace) != (self.own.host, self.own.namespace):
            return "has ended or does not answer"
        with suppress(psutil.Error):
            if psutil.Process(member.pid).status() != psutil.STATUS_ZOMBIE:
                self.stopped.append(member.pid)
                return f"has not answered for {SILENT.seconds} s"
        return "ended without an error message"

    def _abort(self, message: str) -> None:
        """End this process, though its main thread may be blocked; write its stacks."""
        with suppress(OSError):
            if self.folder is not None:
                path = self.folder / f"stacks_rank{self.own.rank}.txt"
                with path.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                message += message and f"\n  stacks of each process: {self.folder}/stacks_rank*.txt"
        if message:
            os.write(2, f"\n{message}\n".encode())
        time.sleep(GRACE_SECONDS)
        self._kill_stopped()
        os._exit(1)

    def _kill_stopped(self) -> None:
        """Kill the stopped ranks of this machine, which torchrun would wait 30 s for.

        Called last: the launcher reports the first process that it finds ended, and this one has
        said the reason.
        """
        for pid in self.stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
