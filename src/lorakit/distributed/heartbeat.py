"""This process's steps enter; the end of a run leaves as soon as a process beside it dies or hangs.

Each rank writes a line to the launcher's store every second and reads the others'. A collective
operation waits for ever for a rank that is gone: torchrun alone was still waiting 150 s after one
of two ranks was stopped. So the thread here names the rank, keeps the stacks of its own process,
and ends that at once, whatever its main thread waits for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from lorakit.storage.run_dir import RunDir

BEAT_SECONDS = 1.0
# A live process beats whatever it computes; what holds all its threads up for so long is no step.
SILENT_SECONDS = 30.0
# An all-reduce of one number takes milliseconds; the first one makes the connections.
PREFLIGHT_SECONDS = 60.0
# Time for what raised an error, in this process or beside it, to say it.
GRACE_SECONDS = 2.0
# After the launcher's end: time to finish a step and save.
ORPHAN_SECONDS = 600.0


@dataclass(slots=True)
class Beat:
    """What a rank says of itself. `state`: "preflight", "ready", "failed" or "left"."""

    rank: int
    pid: int
    host: str
    pid_namespace: str
    device: str
    world_size: int = 0
    step: int = 0
    state: str = "preflight"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device} on {self.host}, process {self.pid})"

    def shares_host_with(self, own: Beat) -> bool:
        """Whether both are processes of one machine, or of one container in it."""
        return (self.host, self.pid_namespace) == (own.host, own.pid_namespace)

    def dead(self, own: Beat) -> bool:
        """Whether the process is known to be gone; of another machine's nothing is known."""
        return self.shares_host_with(own) and not psutil.pid_exists(self.pid)


def key(rank: int) -> str:
    """Where rank `rank` writes its beat."""
    return f"beat/{rank}"


class Heartbeat(threading.Thread):
    """Beats for this process and watches the others.

    Args:
        store: a connection of this thread's own.
    """

    def __init__(self, store: Any, rank: int, count: int, device: str) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.world_size = store, count
        space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        self.own_beat = Beat(rank, os.getpid(), socket.gethostname(), space, device)
        self.checkpoint_summary: Callable[[], str] = lambda: "nothing was trained yet"
        self.folder: Path | None = None
        self.done = threading.Event()
        self.parent = os.getppid()
        self.changed: dict[int, tuple[int, float]] = {}
        self.born = time.monotonic()
        self.orphaned: float | None = None
        self.publish()

    def publish(self) -> None:
        """Write this process's line."""
        self.own_beat.world_size += 1
        self.store.set(key(self.own_beat.rank), json.dumps(asdict(self.own_beat)))

    def set_step(self, step: int, kept: Callable[[], str], folder: Path | None = None) -> None:
        """Step `step` is taken; what `kept` then says, and `folder`, are for a sudden end."""
        self.own_beat.step, self.checkpoint_summary, self.folder = step, kept, folder

    def shutdown(self, state: str) -> None:
        """Say goodbye: nobody takes this process's silence for a fault."""
        self.done.set()
        if self.is_alive():
            # A thread that is in the store while the interpreter ends would abort the process.
            self.join(GRACE_SECONDS)
        self.own_beat.state = state
        with suppress(Exception):
            self.publish()

    def run(self) -> None:
        last = self.born = time.monotonic()
        while not self.done.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > SILENT_SECONDS / 3:
                # This process itself stood still, and perhaps the whole machine did.
                self.changed.clear()
            last = now
            try:
                self.publish()
                beats = self.read()
            except Exception:  # the store went with its launcher
                self._without_launcher()
                continue
            if os.getppid() != self.parent:
                self._without_launcher()
            self._check_peers(beats)

    def read(self) -> list[Beat]:
        """What every rank said last."""
        found = self.store.multi_get([key(rank) for rank in range(self.world_size)])
        return [Beat(**json.loads(text)) for text in found]

    def _check_peers(self, beats: list[Beat]) -> None:
        now = time.monotonic()
        gone, silent, failed = [], [], []
        for beat in beats:
            if self.changed.get(beat.rank, (-1, 0.0))[0] != beat.world_size:
                self.changed[beat.rank] = (beat.world_size, now)
            if beat.rank == self.own_beat.rank or beat.state == "left":
                continue
            if beat.state == "failed":
                failed.append(beat)
            elif beat.dead(self.own_beat):
                gone.append(beat)
            elif now - self.changed[beat.rank][1] > SILENT_SECONDS:
                silent.append(beat)
        if failed:
            time.sleep(GRACE_SECONDS)  # it says itself what happened
            self._abort([], "")
        elif gone or silent:
            apart = not all(beat.shares_host_with(self.own_beat) for beat in beats)
            self._abort([*gone, *silent], self._failure_message(gone, silent, apart))
        elif self.own_beat.state == "preflight" and now - self.born > PREFLIGHT_SECONDS:
            stuck = [b for b in beats if b.state == "preflight"]
            self._abort(stuck[1:], no_answer(stuck))

    def _failure_message(self, gone: list[Beat], silent: list[Beat], apart: bool) -> str:
        lines = [
            f"error: {beat} has ended without a word, after step {beat.step}: was it killed?"
            for beat in gone
        ]
        lines += [
            f"error: {beat} has not answered for {SILENT_SECONDS:.0f} s, after step {beat.step}"
            for beat in silent
        ]
        why = "the kernel kills what takes too much memory (dmesg tells); " if gone else ""
        if self.folder is None:
            again = "start the same command again"
        elif apart:
            again = "start the same command again on every machine, with --resume"
        else:
            again = f"go on with: {RunDir(self.folder).going_on(self.world_size)}"
        return "\n".join([*lines, f"  {self.checkpoint_summary()}", f"hint: {why}{again}"])

    def _abort(self, troubled: list[Beat], words: str) -> None:
        """End this process; the first of those that are well says why."""
        stacks = self._keep_stacks()
        ill = {beat.rank for beat in troubled}
        if words and self.own_beat.rank == min(set(range(self.world_size)) - ill):
            where = f"\n  where each process stood: {stacks}" if stacks else ""
            sys.stderr.write(f"\n{words}{where}\n")
            sys.stderr.flush()
        for beat in troubled:
            # A stopped process would outlive all; torchrun waits 30 s for it.
            if beat.shares_host_with(self.own_beat):
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def _keep_stacks(self) -> Path | None:
        """Where this process's threads stood, into the run's folder; the name of all ranks' files.

        The other ranks write theirs in the same second, and say nothing.
        """
        if self.folder is None or not self.folder.is_dir():
            return None
        with suppress(OSError):
            path = self.folder / f"stacks_rank{self.own_beat.rank}.txt"
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            return self.folder / "stacks_rank*.txt"
        return None

    def _without_launcher(self) -> None:
        """Whoever started this process is gone: finish the step, save and stop, as at SIGTERM."""
        if self.orphaned is None:
            self.orphaned = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self.orphaned > ORPHAN_SECONDS:
            os._exit(1)


def no_answer(stuck: list[Beat]) -> str:
    """The message of an all-reduce that never came back."""
    names = "\n".join(f"  {beat}" for beat in stuck)
    return (
        f"error: no answer to a first all-reduce within {PREFLIGHT_SECONDS:.0f} s from\n{names}\n"
        "hint: NCCL_DEBUG=INFO shows what it tries; cards of one machine that cannot reach each "
        "other need NCCL_P2P_DISABLE=1, several machines an open network (NCCL_SOCKET_IFNAME)"
    )
