"""Ctrl-C or SIGTERM enters; a flag for the training loop leaves. The second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

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
    """Turn the first SIGINT or SIGTERM into a request; outside the main thread nothing changes.

    A closed terminal (SIGHUP) does not end the run: hours of work hang on no window.

    Args:
        alone: one of several ranks gets what its launcher hands on a second time at once, from the
            terminal or from torchrun: that is no second wish, and rank 0 speaks for all.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if not request.asked:
            request.signal, request.at = signal.Signals(number), time.monotonic()
            if alone:
                with suppress(OSError):  # nobody reads it any more
                    os.write(2, WORD)
        elif not alone and time.monotonic() - request.at < ECHO_SECONDS:
            return
        elif number == signal.SIGINT:
            raise KeyboardInterrupt  # a notebook's kernel lives on
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
