"""What the libraries below would say of their own accord enters; silence leaves.

The command line is quiet for good, a call from Python for its own duration only.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def quietly(offline: bool = False) -> Iterator[None]:
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
