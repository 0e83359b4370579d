"""Run the code of completions with unit tests in limited subprocesses.

Each completion runs in a process of its own with limits of time, memory, file size and processes,
an empty temporary folder, and an environment without secrets. Where the kernel allows user
namespaces, it has no network, cannot signal other processes, and all file systems but the
temporary folder are read-only. It can read what you can read: this limits accidents of sampled
code, and does not stop an attacker.

Tests pass if the program reaches its end: the launcher then writes a random word that it read from
its input, so that `sys.exit(0)` or a printed "OK" in a completion does not count.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Stops a process that set up its limits, but whose kill was not delivered.
GRACE_SECONDS = 2.0
_FENCE = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)

# In the first process: namespaces, then the second one, which has no capability to undo them.
_LAUNCH = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid, where = os.getuid(), os.getgid(), os.getcwd()
class Attributes(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("set", "clear", "propagation", "userns")]
def isolate():
    # user, mount, process, network and IPC namespaces
    if libc.unshare(0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000):
        return "no"
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"),
                       ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    libc.mount(None, b"/", None, 0x4000 | 0x40000, None)
    read_only = Attributes(set=1)
    if libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(read_only), ctypes.sizeof(read_only)):
        return "network"
    libc.mount(b"tmpfs", where.encode(), b"tmpfs", 0, b"size=64m")
    os.chdir(where)
    return "all"
try:
    state = isolate()
except (OSError, AttributeError):
    state = "no"
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 255)
os.execv(sys.executable, [sys.executable, "-I", "-c", sys.argv[1], state, *sys.argv[2:]])
"""
# In the second process: limits, then the program.
_RUN = r"""
import json, os, resource, sys
state, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
request = json.load(sys.stdin)
report = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
os.write(report, json.dumps(state).encode() + b"\n")
def limit(kind, value):
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass
limit(resource.RLIMIT_CPU, seconds + 1)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, 2**24)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, 256)
word = request.pop("word")
with open("program.py", "w") as handle:
    handle.write(request["program"])
import runpy
try:
    runpy.run_path("program.py", run_name="__main__")
except BaseException:
    os._exit(1)
os.write(report, word.encode())
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class SandboxRun:
    """Result of a program with its tests; `isolation` is "all", "network" or "no"."""

    passed: bool
    timed_out: bool
    isolation: str


def code_in(text: str) -> str:
    """The code of a completion: its last fenced block, or all of it."""
    blocks = _FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def run_tests(code: str, tests: str, seconds: float, memory: int) -> SandboxRun:
    """Run code followed by its tests.

    Args:
        seconds: wall-clock limit.
        memory: limit in bytes of the address space.
    """
    word = secrets.token_hex(16)
    request = json.dumps({"program": f"{code}\n\n{tests}\n", "word": word})
    limits = [str(max(1, round(seconds))), str(memory)]
    with tempfile.TemporaryDirectory(prefix="lorakit-tests-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _LAUNCH, _RUN, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        late = False
        try:
            out, _ = child.communicate(request.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            late, out = True, b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE_SECONDS)
    state, _, rest = out.partition(b"\n")
    isolation = str(json.loads(state)) if state else "unknown"
    return SandboxRun(rest == word.encode(), late, isolation)


def joined_tests(value: Any) -> str:
    """Tests of a row as a program: a text, or a list of lines such as assert statements."""
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


class UnitTests:
    """1 where the tests of a row pass, 0 elsewhere.

    Args:
        column: of the row, with the tests.
        memory: limit in MiB.
        note: prints a line.
    """

    def __init__(
        self, column: str, seconds: float, memory: int, note: Callable[[str], None]
    ) -> None:
        self.column, self.seconds, self.memory, self.note = column, seconds, memory, note
        self.described = False

    def __call__(self, attempts: Sequence[Any]) -> list[float | None]:
        """Run the tests of all completions, as many at once as there are cores."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            runs = list(pool.map(self._run, attempts))
        self._describe([run for run in runs if run is not None])
        return [None if run is None else float(run.passed) for run in runs]

    def _run(self, attempt: Any) -> SandboxRun | None:
        tests = joined_tests(attempt.fields.get(self.column))
        if not tests.strip():
            return None
        return run_tests(code_in(attempt.text), tests, self.seconds, self.memory * 2**20)

    def _describe(self, runs: Sequence[SandboxRun]) -> None:
        known = [run.isolation for run in runs if run.isolation != "unknown"]
        if self.described or not known:
            return
        self.described = True
        self.note(f"reward unit_tests: {ISOLATION[known[0]]}")


ISOLATION = {
    "all": "sampled code runs without network and with read-only file systems",
    "network": "sampled code runs without network, but can write where you can (this kernel "
    "cannot make all file systems read-only)",
    "no": "SAMPLED CODE RUNS WITH YOUR RIGHTS and network: this system allows no user namespaces; "
    "only time and memory are limited. Run in a container, or as a user without rights",
}
