"""Entry point of the command line; exit code 0 for success, 1 for a fault, 2 for bad input."""

from __future__ import annotations

import sys

from lorakit.cli import doctor, import_recipe, inspect, plan, run_commands, sweep, train, ui
from lorakit.cli.app import app, log
from lorakit.console import keep_streams_going
from lorakit.distributed.launch_env import launched_rank, prepare_rank
from lorakit.errors import LorakitError

# The commands register themselves when these are imported.
__all__ = [
    "doctor",
    "import_recipe",
    "inspect",
    "main",
    "plan",
    "run_commands",
    "sweep",
    "train",
    "ui",
]


WINDOWS = (
    "lorakit is developed and tested on Linux; use WSL 2 if something fails here "
    "(learn.microsoft.com/windows/wsl/install)"
)


def main() -> None:
    """Run a command; print a LorakitError as one message, and keep the traceback of bugs."""
    keep_streams_going()
    prepare_rank()
    rank = launched_rank()
    prefix = f"rank {rank}: " if rank else ""
    if sys.platform == "win32":
        log.print(f"note: {WINDOWS}")
    try:
        app()
    except LorakitError as error:
        log.print(f"error: {prefix}{error.message}")
        if error.hint:
            log.print(f"hint: {error.hint}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.print("stopped")
        sys.exit(130)
    except MemoryError as error:
        log.print(f"error: {prefix}out of memory: {error or 'the allocation failed'}")
        log.print(
            "hint: run `lorakit plan` for the memory of each command; partial files were removed"
        )
        sys.exit(1)
