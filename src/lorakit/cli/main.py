"""Arguments enter; files, tables or one JSON object leave. Exit 0 done, 1 fault, 2 bad input."""

from __future__ import annotations

import os
import sys

from lorakit.cli import doctor, import_recipe, inspect, plan, run_commands, train
from lorakit.cli.app import app, log
from lorakit.console import keep_streams_going
from lorakit.distributed.process_group import set_cuda_device_from_local_rank
from lorakit.errors import LorakitError

# The commands register themselves when these are imported.
__all__ = ["doctor", "import_recipe", "inspect", "main", "plan", "run_commands", "train"]


def main() -> None:
    """Entry point: a LorakitError is one message and an exit code; bugs keep their traceback."""
    keep_streams_going()
    set_cuda_device_from_local_rank()
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"rank {rank}: "
    try:
        app()
    except LorakitError as error:
        log.print(f"error: {who}{error.message}", markup=False)
        if error.hint:
            log.print(f"hint: {error.hint}", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.print("stopped")
        sys.exit(130)
    except MemoryError as error:
        log.print(f"error: {who}out of memory: {error or 'the system gave no more'}", markup=False)
        log.print("hint: `lorakit plan` says what each command takes; nothing half-made was kept")
        sys.exit(1)
