"""Silence third-party warnings and progress bars, and protect stdout and stderr.

The command line silences libraries permanently, a call from Python only for its duration.

Output streams remove secrets and ignore write errors: `lorakit train ... | head -1` closes a pipe,
and a log may be on a full disk. The text is then lost, but the run continues.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from lorakit.redact import redacted

LOGGERS = (
    "bitsandbytes", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "matplotlib",
)  # fmt: skip


def quiet(offline: bool = False) -> None:
    """Silence the libraries' output; `offline` also disables their network access."""
    if offline:
        # The libraries read these once, at import.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # datasets sets the level of its logger when it is imported, from this variable.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    _ignore_warnings()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def silence_libraries(offline: bool = False) -> Iterator[None]:
    """Call `quiet` for the duration of a block, and restore a notebook's settings afterwards."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    switches = _network_switches() if offline else []
    before = [(module, name, getattr(module, name)) for module, name in switches]
    with warnings.catch_warnings():
        try:
            quiet()
            for module, name, _ in before:
                setattr(module, name, True)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            for module, name, value in before:
                setattr(module, name, value)


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _network_switches() -> list[tuple[Any, str]]:
    """Attributes in which the libraries keep the offline variables that they read at import."""
    import datasets
    import huggingface_hub

    modules = (huggingface_hub.constants, datasets.config)
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return [(module, name) for module in modules for name in names if hasattr(module, name)]


def plain_console(**settings: Any) -> Console:
    """Console without markup and emoji codes: "[x]" and ":key:" in a path or an answer are text."""
    return Console(highlight=False, markup=False, emoji=False, **settings)


@contextmanager
def literal(console: Console) -> Iterator[None]:
    """Print on a caller's console as on a `plain_console`."""
    names = [name for name in ("_markup", "_emoji") if hasattr(console, name)]
    before = {name: getattr(console, name) for name in names}
    try:
        for name in names:
            setattr(console, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(console, name, value)


class SafeStream:
    """Text stream that ignores broken pipes and full disks."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text` without secrets, ignoring errors; return its length."""
        self._try(self.stream.write, redacted(text))
        return len(text)

    def flush(self) -> None:
        """Flush, ignoring errors."""
        self._try(self.stream.flush)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except BrokenPipeError:
            # The reader is gone: other writes and the flush at exit must not fail either.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except OSError:
            pass  # a full disk may have free space later


def keep_streams_going() -> None:
    """Replace stdout and stderr by streams whose errors do not stop the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))
