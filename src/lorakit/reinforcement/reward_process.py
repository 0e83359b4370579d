"""Run a reward function of the user, or a pattern, in a child process with a time limit.

The child ends when it hangs, crashes or takes too much memory; the run then ends with one message
and keeps its last step. Prints of the function go to the terminal's error output.

The two processes exchange JSON lines through pipes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import RecipeError, WorkError

# The import of a file may load torch.
START_SECONDS = 120.0
MOST_BYTES = 2**26


class RewardProcess:
    """A child process that holds one reward function; it ends with this object, or by `close`.

    Args:
        spec: `{"file", "function"}` or `{"pattern"}`, see `reward_worker`.
        seconds: time limit of a call.
    """

    def __init__(self, spec: dict[str, str], shown: str, seconds: float) -> None:
        self.shown, self.seconds = shown, seconds
        requests, self._to_child = os.pipe()
        self._from_child, replies = os.pipe()
        module = "lorakit.reinforcement.reward_worker"
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, str(requests), str(replies), json.dumps(spec)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(requests, replies),
            start_new_session=True,
        )
        os.close(requests)
        os.close(replies)
        self._rest = b""
        ends = (self._to_child, self._from_child)
        self.close = weakref.finalize(self, _end, self._child, ends)
        try:
            reply = self._read(START_SECONDS)
        except WorkError as error:
            self.close()
            raise RecipeError(f"reward_funcs: {shown}: {error.message}") from error
        if "error" in reply:
            self.close()
            raise RecipeError(f"reward_funcs: {shown}: {reply['error']}", reply.get("hint"))

    def call(self, values: dict[str, Any]) -> Any:
        """Call the function with keyword arguments of JSON values.

        Raises:
            WorkError: it raised, took too long, or its process ended.
        """
        line = json.dumps(values, default=str).encode() + b"\n"
        deadline = time.monotonic() + self.seconds
        try:
            while line:
                left = deadline - time.monotonic()
                if not select.select([], [self._to_child], [], max(0.0, left))[1]:
                    break
                line = line[os.write(self._to_child, line[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            pass  # the reply below reports it
        reply = self._read(max(0.0, deadline - time.monotonic()))
        if "error" in reply:
            raise WorkError(reply["error"], reply.get("hint"))
        return reply["values"]

    def _read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._from_child], [], [], left)[0]
            if not ready:
                self.close()
                raise WorkError(
                    f"did not finish within {self.seconds:g} s",
                    hint="make it faster, or raise its timeout",
                )
            piece = os.read(self._from_child, 2**16)
            if not piece or len(self._rest) > MOST_BYTES:
                self.close()
                code = self._child.returncode
                raise WorkError(f"its process ended (exit code {code}) without a reward")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply


def _end(child: subprocess.Popen[bytes], ends: tuple[int, int]) -> None:
    """Close both pipes and end the child."""
    for descriptor in ends:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
    child.wait()


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


class FileReward:
    """A function of the user's file, called as TRL calls reward functions."""

    def __init__(self, path: Path, function: str, seconds: float) -> None:
        spec = {"file": str(path), "function": function}
        self.process = RewardProcess(spec, f"{path.name}:{function}", seconds)

    def __call__(self, attempts: Sequence[Any]) -> Any:
        """Call f(prompts, completions, completion_ids, **columns)."""
        names = dict.fromkeys(name for attempt in attempts for name in attempt.fields)
        columns = {name: [a.fields.get(name) for a in attempts] for name in names}
        return self.process.call(
            {
                **columns,
                "prompts": [a.prompt for a in attempts],
                "completions": [a.text for a in attempts],
                "completion_ids": [a.ids for a in attempts],
            }
        )


class RegexReward:
    """1 where a pattern is found in the completion, 0 elsewhere."""

    def __init__(self, pattern: str, seconds: float) -> None:
        self.process = RewardProcess({"pattern": pattern}, f"regex {pattern!r}", seconds)

    def __call__(self, attempts: Sequence[Any]) -> Any:
        return self.process.call({"completions": [a.text for a in attempts]})
