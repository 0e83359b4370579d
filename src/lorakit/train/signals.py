"""Turn Ctrl-C or SIGTERM into a stop request; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

WORD = b"\nstopping: this step is finished and saved first; once more stops at once\n"
ECHO_SECONDS = 5.0


class StopRequest:
    """Set once by a signal; the trainer finishes its step, saves and stops."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at = 0.0  # seconds of the monotonic clock

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells expect: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.signal is None else 128 + int(self.signal)


@contextmanager
def catch_signals(alone: bool = True) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; no effect outside the main thread.

    SIGHUP is ignored, so closing the terminal does not stop training.

    Args:
        alone: False for one of several ranks: duplicates within 5 s are ignored, because terminal
            and torchrun forward each signal once more, and only rank 0 prints.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, _frame: FrameType | None) -> None:
        if not request.asked:
            request.signal, request.at = signal.Signals(signum), time.monotonic()
            if alone:
                with suppress(OSError):  # stderr may be closed
                    os.write(2, WORD)
        elif not alone and time.monotonic() - request.at < ECHO_SECONDS:
            return
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt  # keeps a notebook's kernel alive
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    before: dict[Any, Any] = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
