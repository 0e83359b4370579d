"""Arguments enter; files, tables or one JSON object leave. Exit 0 done, 1 fault, 2 bad input."""

from __future__ import annotations

import sys
import traceback

from lorakit.cli import after, before, doctor, plan, train
from lorakit.cli.base import app, log
from lorakit.cli.streams import keep_streams_going
from lorakit.errors import LorakitError
from lorakit.redact import redacted_streams

# The commands register themselves when these are imported.
__all__ = ["after", "before", "doctor", "main", "plan", "train"]


def main() -> None:
    """Entry point: a LorakitError is one message and an exit code; bugs keep their traceback."""
    keep_streams_going()
    with redacted_streams():
        _run()


def _run() -> None:
    try:
        app()
    except LorakitError as error:
        log.print(f"error: {error.message}", markup=False)
        if error.hint:
            log.print(f"hint: {error.hint}", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.print("stopped")
        sys.exit(130)
    except Exception:
        # Printed here, since the interpreter would do it after the streams are its own again.
        traceback.print_exc()
        sys.exit(1)
