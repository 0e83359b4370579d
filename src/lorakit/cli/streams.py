"""The process's stdout and stderr enter; the same leave, without secrets, unable to end the work.

`lorakit train ... | head -1` closes a pipe, a log may lie on a full disk: what would have been
printed is lost, the run goes on.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lorakit.redact import redacted


class Lasting:
    """A text stream whose writes never raise for want of a reader or of space."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what can be written, less tokens and passwords; says that all was."""
        self._try(self.stream.write, redacted(text))
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        self._try(self.stream.flush)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except BrokenPipeError:
            # Nobody reads on. What others write there, or the exit flushes, must not fail either.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except OSError:
            pass  # a full disk may have room again


def keep_streams_going() -> None:
    """Let this process outlive its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))
