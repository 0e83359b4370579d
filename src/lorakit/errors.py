"""A user's mistake or a failed promise enters as facts; one clear message and a way out leave.

The tree (exit code of the command line in brackets):

    LorakitError
    ├── RecipeError      [2]  a key, a value or a flag is wrong
    ├── DataError        [2]  a file, a row or a column is wrong
    ├── ModelError       [2]  a base model or an adapter cannot be used as asked
    ├── RunError         [2]  a run directory is missing, taken or unfit for the command
    ├── DependencyError  [2]  a package the request needs is absent or broken
    └── WorkError        [1]  the work itself found a fault: no space left, a check that failed

Anything else that reaches the user is a bug of lorakit and shows its traceback.
"""

from __future__ import annotations

from lorakit.redact import redacted


class LorakitError(Exception):
    """What is wrong and what was found (`message`), and what to do about it (`hint`)."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _printable(message)
        self.hint = _printable(hint) if hint else None
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the message alone, a user's mistake has no frames to read."""
        return f"{type(self).__name__}: {self}".splitlines()


def _printable(text: str) -> str:
    """Without secrets, and half characters of a file's text by their codes."""
    return redacted(text).encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type where it says nothing."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class RecipeError(LorakitError):
    """A recipe key, a value or a flag is wrong; all faults of one recipe come in one message."""


class DataError(LorakitError):
    """A data file, row or column cannot be used; names the file and the row."""


class ModelError(LorakitError):
    """A base model, tokenizer or adapter is missing, gated, damaged or of another kind."""


class RunError(LorakitError):
    """A run directory is missing, already taken, or lacks what the command needs."""


class DependencyError(LorakitError):
    """A package that the request needs is absent or does not work here; names the install line."""


class WorkError(LorakitError):
    """The work was started rightly and found a fault: disk full, a check that failed."""

    exit_code = 1
