"""A chat template's text enters; a program leaves that turns conversations into text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from lorakit.data.sandbox import LimitedEnvironment, LimitReached

T = TypeVar("T")


class Program:
    """A compiled template, ready to be rendered with turns."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        """Compile `text`; `names` are what it sees beside the turns.

        Raises:
            LimitReached: it is too long, or uses what is not run.
            TemplateError: it is no jinja2.
        """
        self._env = LimitedEnvironment(_plain_environment())
        self._template = self._env.from_string(text)
        self._names = {**self._template.globals, "tools": None, "documents": None, **names}

    def render(self, values: dict[str, Any]) -> str:
        """The text, in 6 µs for three turns; jinja2's own `render` copies all names one by one.

        Raises:
            LimitReached: with the line of the template, where that can be found.
        """
        return self._run(values, lambda pieces: self._env.joined(list(pieces)))

    def generated(self, values: dict[str, Any]) -> list[tuple[int, int]]:
        """Where in the text the {% generation %} blocks begin and end."""
        blocks: list[str] = []
        found: list[tuple[int, int]] = []

        def write(pieces: Iterator[str]) -> None:
            for piece in pieces:
                self._env.take(len(piece))
                blocks.append(piece)

        with self._env.activate_tracker(blocks, found):  # type: ignore[attr-defined]
            self._run(values, write)
        return found

    def _run(self, values: dict[str, Any], write: Callable[[Iterator[str]], T]) -> T:
        env, template = self._env, self._template
        env.begin(values)
        given = {**self._names, **values}
        context = env.context_class(env, given, template.name, template.blocks)
        try:
            return write(template.root_render_func(context))
        except LimitReached as limit:
            what = f"{limit}{self._line(limit)}"
        # Outside: the error above holds all that the template has made.
        raise LimitReached(what)

    def _line(self, limit: LimitReached) -> str:
        place, found = limit.__traceback__, 0
        while place:
            if "__jinja_template__" in place.tb_frame.f_globals:
                found = self._template.get_corresponding_lineno(place.tb_lineno)
            place = place.tb_next
        return f" (its line {found})" if found else ""


@functools.cache
def _plain_environment() -> Any:
    """Transformers' own, of an empty template: the foreign one is never compiled in it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment
