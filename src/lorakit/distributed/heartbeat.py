"""Detect dead or hung ranks, and abort the run with a message that names them.

Each rank writes a line to the launcher's store every second and reads the others'. A collective
operation waits indefinitely for a dead rank: torchrun alone was still waiting 150 s after one of
two ranks was stopped. The thread here names that rank, writes the stacks of its own process, and
ends the process at once, even while the main thread is blocked.
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
# A healthy process sends heartbeats even during long steps: 30 s of silence mean that it is stuck.
SILENT_SECONDS = 30.0
# An all-reduce of one number takes milliseconds; the first one opens the connections.
PREFLIGHT_SECONDS = 60.0
# Time for an error in this or another process to be printed.
GRACE_SECONDS = 2.0
# Time to finish a step and save after the launcher has ended.
ORPHAN_SECONDS = 600.0


@dataclass(slots=True)
class Beat:
    """Status of one rank. `state`: "preflight", "ready", "failed" or "left"."""

    rank: int
    pid: int
    host: str
    pid_namespace: str
    device: str
    beats: int = 0
    step: int = 0
    state: str = "preflight"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device} on {self.host}, process {self.pid})"

    def shares_host_with(self, own: Beat) -> bool:
        """True if both are processes of one machine, or of one container on it."""
        return (self.host, self.pid_namespace) == (own.host, own.pid_namespace)

    def dead(self, own: Beat) -> bool:
        """True if the process is known to be dead; unknown for processes of other machines."""
        return self.shares_host_with(own) and not psutil.pid_exists(self.pid)


def key(rank: int) -> str:
    """Store key of rank `rank`'s heartbeat."""
    return f"beat/{rank}"


class Heartbeat(threading.Thread):
    """Thread that sends heartbeats of this process and checks those of the others.

    Args:
        store: a connection used only by this thread.
    """

    def __init__(self, store: Any, rank: int, count: int, device: str) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.world_size = store, count
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        self.own_beat = Beat(rank, os.getpid(), socket.gethostname(), namespace, device)
        self.checkpoint_summary: Callable[[], str] = lambda: "nothing was trained yet"
        self.folder: Path | None = None
        self.done = threading.Event()
        self.parent = os.getppid()
        self.changed: dict[int, tuple[int, float]] = {}
        self.born = time.monotonic()
        self.orphaned: float | None = None
        self.publish()

    def publish(self) -> None:
        """Write this process's status to the store."""
        self.own_beat.beats += 1
        self.store.set(key(self.own_beat.rank), json.dumps(asdict(self.own_beat)))

    def set_step(self, step: int, kept: Callable[[], str], folder: Path | None = None) -> None:
        """Record the step, the text that describes kept work, and the run's folder."""
        self.own_beat.step, self.checkpoint_summary, self.folder = step, kept, folder

    def shutdown(self, state: str) -> None:
        """Publish the final state, so that other ranks do not take the silence for a fault."""
        self.done.set()
        if self.is_alive():
            # A thread inside the store at interpreter shutdown would abort the process.
            self.join(GRACE_SECONDS)
        self.own_beat.state = state
        with suppress(Exception):
            self.publish()

    def run(self) -> None:
        last = self.born = time.monotonic()
        while not self.done.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > SILENT_SECONDS / 3:
                # This process itself was suspended, and perhaps the complete machine.
                self.changed.clear()
            last = now
            try:
                self.publish()
                beats = self.read()
            except Exception:  # the store ended with its launcher
                self._without_launcher()
                continue
            if os.getppid() != self.parent:
                self._without_launcher()
            self._check_peers(beats)

    def read(self) -> list[Beat]:
        """Read the latest status of every rank."""
        entries = self.store.multi_get([key(rank) for rank in range(self.world_size)])
        return [Beat(**json.loads(entry)) for entry in entries]

    def _check_peers(self, beats: list[Beat]) -> None:
        now = time.monotonic()
        gone, silent, failed = [], [], []
        for beat in beats:
            if self.changed.get(beat.rank, (-1, 0.0))[0] != beat.beats:
                self.changed[beat.rank] = (beat.beats, now)
            if beat.rank == self.own_beat.rank or beat.state == "left":
                continue
            if beat.state == "failed":
                failed.append(beat)
            elif beat.dead(self.own_beat):
                gone.append(beat)
            elif now - self.changed[beat.rank][1] > SILENT_SECONDS:
                silent.append(beat)
        if failed:
            time.sleep(GRACE_SECONDS)  # the failed rank reports the error itself
            self._abort([], "")
        elif gone or silent:
            apart = not all(beat.shares_host_with(self.own_beat) for beat in beats)
            self._abort([*gone, *silent], self._failure_message(gone, silent, apart))
        elif self.own_beat.state == "preflight" and now - self.born > PREFLIGHT_SECONDS:
            stuck = [b for b in beats if b.state == "preflight"]
            self._abort(stuck[1:], no_answer(stuck))

    def _failure_message(self, gone: list[Beat], silent: list[Beat], apart: bool) -> str:
        lines = [
            f"error: {beat} ended without an error message after step {beat.step}" for beat in gone
        ]
        lines += [
            f"error: {beat} has not answered for {SILENT_SECONDS:.0f} s, after step {beat.step}"
            for beat in silent
        ]
        cause = "check dmesg: the kernel kills what takes too much memory; " if gone else ""
        if self.folder is None:
            remedy = "start the same command again"
        elif apart:
            remedy = "start the same command again on every machine, with --resume"
        else:
            remedy = f"resume with: {RunDir(self.folder).going_on(self.world_size)}"
        return "\n".join([*lines, f"  {self.checkpoint_summary()}", f"hint: {cause}{remedy}"])

    def _abort(self, faulty: list[Beat], message: str) -> None:
        """End this process; the first healthy rank prints the reason."""
        stacks_path = self._write_stacks()
        faulty_ranks = {beat.rank for beat in faulty}
        if message and self.own_beat.rank == min(set(range(self.world_size)) - faulty_ranks):
            stacks_line = f"\n  stacks of each process: {stacks_path}" if stacks_path else ""
            sys.stderr.write(f"\n{message}{stacks_line}\n")
            sys.stderr.flush()
        for beat in faulty:
            # A stopped process would outlive all; torchrun waits 30 s for it.
            if beat.shares_host_with(self.own_beat):
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def _write_stacks(self) -> Path | None:
        """Write the stacks of this process's threads to the run's folder.

        The other ranks write theirs in the same second, without a message.

        Returns:
            The name pattern of all ranks' files, or None if nothing was written.
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
        """Finish the step, save and stop, as after SIGTERM, because the launcher has ended."""
        if self.orphaned is None:
            self.orphaned = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self.orphaned > ORPHAN_SECONDS:
            os._exit(1)


def no_answer(stuck: list[Beat]) -> str:
    """The message for a first all-reduce that does not return."""
    names = "\n".join(f"  {beat}" for beat in stuck)
    return (
        f"error: no answer to a first all-reduce within {PREFLIGHT_SECONDS:.0f} s from\n{names}\n"
        "hint: set NCCL_DEBUG=INFO for details; GPUs of one machine without peer access need "
        "NCCL_P2P_DISABLE=1, several machines an open network (NCCL_SOCKET_IFNAME)"
    )
