"""What the libraries below would say of their own accord enters; silence leaves.

The command line is quiet for good, a call from Python for its own duration only.

The process's stdout and stderr enter; the same leave, without secrets, unable to end the work.

`lorakit train ... | head -1` closes a pipe, a log may lie on a full disk: what would have been
printed is lost, the run goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakit.redact import redacted

LOGGERS = (
    "bitsandbytes", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "matplotlib",
)  # fmt: skip


def quiet(offline: bool = False) -> None:
    """Keep the libraries' own chatter off the screen; `offline` closes their network too."""
    if offline:
        # These are read once, when the libraries are imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    _ignore_warnings()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def silence_libraries(offline: bool = False) -> Iterator[None]:
    """As `quiet`, until the block ends: a notebook's own settings are then as they were."""
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
    """Where the libraries keep what they read from the environment when they were imported."""
    import datasets
    import huggingface_hub

    places = (huggingface_hub.constants, datasets.config)
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return [(place, name) for place in places for name in names if hasattr(place, name)]


class SafeStream:
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
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))
