"""Exceptions of lorakit: one message with the fault, and a hint with the fix.

The hierarchy (exit code of the command line in brackets):

    LorakitError
    ├── RecipeError      [2]  a key, a value or a flag is wrong
    ├── DataError        [2]  a file, a row or a column is wrong
    ├── ModelError       [2]  a base model or an adapter cannot be used
    ├── RunError         [2]  a run directory is missing, taken or unfit for the command
    ├── DependencyError  [2]  a needed package is missing or broken
    └── WorkError        [1]  a fault during the work: a full disk, a failed check

Any other exception is a bug of lorakit and shows its traceback.
"""

from __future__ import annotations

from lorakit.redact import redacted


class LorakitError(Exception):
    """Base of all errors: the fault and the value found (`message`), and the fix (`hint`)."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _printable(message)
        self.hint = _printable(hint) if hint else None
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """Show only the message in IPython, since a user's mistake needs no traceback."""
        return f"{type(self).__name__}: {self}".splitlines()


def _printable(text: str) -> str:
    """Remove secrets, and escape lone surrogates."""
    return redacted(text).encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type if the message is empty."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class RecipeError(LorakitError):
    """A recipe key, a value or a flag is wrong; one message lists all faults of a recipe."""


class DataError(LorakitError):
    """A data file, row or column cannot be used; names the file and the row."""


class ModelError(LorakitError):
    """A base model, tokenizer or adapter is missing, gated, damaged or of the wrong type."""


class RunError(LorakitError):
    """A run directory is missing, already in use, or lacks files that the command needs."""


class DependencyError(LorakitError):
    """A needed package is missing or does not work here; the hint has the install command."""


class WorkError(LorakitError):
    """A fault after the work had started, such as a full disk or a failed check."""

    exit_code = 1
