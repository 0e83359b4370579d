"""Run a chat template as transformers would, within limits on its time and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from lorakit.data.chat_template.sandbox import LimitedEnvironment, LimitReached

T = TypeVar("T")


class Program:
    """A compiled chat template."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        """Compile `text`; `names` are the variables of the template besides the turns.

        Raises:
            LimitReached: the template is too long, or uses operations that are not allowed.
            TemplateError: it is not valid jinja2.
        """
        self._env = LimitedEnvironment(_plain_environment())
        self._template = self._env.from_string(text)
        self._names = {**self._template.globals, "tools": None, "documents": None, **names}

    def render(self, values: dict[str, Any]) -> str:
        """Render to text, in 6 µs for three turns; jinja2's `render` copies names one by one.

        Raises:
            LimitReached: a limit was exceeded; names the line of the template if it is known.
        """
        return self._run(values, lambda pieces: self._env.joined(list(pieces)))

    def generated(self, values: dict[str, Any]) -> list[tuple[int, int]]:
        """Character ranges of the {% generation %} blocks in the rendered text."""
        blocks: list[str] = []
        ranges: list[tuple[int, int]] = []

        def write(pieces: Iterator[str]) -> None:
            for piece in pieces:
                self._env.take(len(piece))
                blocks.append(piece)

        with self._env.activate_tracker(blocks, ranges):  # type: ignore[attr-defined]
            self._run(values, write)
        return ranges

    def _run(self, values: dict[str, Any], write: Callable[[Iterator[str]], T]) -> T:
        env, template = self._env, self._template
        env.begin(values)
        names = {**self._names, **values}
        context = env.context_class(env, names, template.name, template.blocks)
        try:
            return write(template.root_render_func(context))
        except LimitReached as limit:
            message = f"{limit}{self._line(limit)}"
        # Raised outside the handler: the caught error references all text that was rendered.
        raise LimitReached(message)

    def _line(self, limit: LimitReached) -> str:
        frame, line = limit.__traceback__, 0
        while frame:
            if "__jinja_template__" in frame.tb_frame.f_globals:
                line = self._template.get_corresponding_lineno(frame.tb_lineno)
            frame = frame.tb_next
        return f" (its line {line})" if line else ""


@functools.cache
def variables_of(text: str) -> set[str]:
    """Names of the variables that a template reads and does not set before."""
    from jinja2 import TemplateError, meta

    environment = _plain_environment()
    try:
        # Its functions, such as raise_exception and strftime_now, are not variables.
        return meta.find_undeclared_variables(environment.parse(text)) - set(environment.globals)
    except (TemplateError, RecursionError):
        return set()  # reported when it is rendered


def _plain_environment() -> Any:
    """Environment of transformers, compiled for an empty template, not for an untrusted one."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment
