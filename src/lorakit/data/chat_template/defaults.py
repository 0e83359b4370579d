"""Variables of a chat template that a run fixes for training and every later use.

A default is written in front of the template: `{% if NAME is not defined %}{% set NAME = VALUE %}`.
It is saved with the adapter's tokenizer, so that chat, evaluation and engines render the prompts
that were trained; a request may still set another value.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Mapping

from lorakit.data.chat_template.program import variables_of
from lorakit.errors import RecipeError

Value = str | bool | int | float
# Variables that every request fills, and those of the tokenizer.
_FILLED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_THINKING = "enable_thinking"
_DEFAULT = re.compile(r"{% if (\w+) is not defined %}{% set \1 = .*? %}{% endif %}", re.DOTALL)
# gpt-oss: strftime_now("%Y-%m-%d"); Ministral: strftime_now('%d-%m-%Y').
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def default_for(name: str, value: Value) -> str:
    """Return the template text that sets `name` where a request does not."""
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def has_default(template: str, name: str) -> bool:
    """True if a default for `name` is among those that `template` begins with."""
    while found := _DEFAULT.match(template):
        if found[1] == name:
            return True
        template = template[found.end() :]
    return False


def with_defaults(template: str, values: Mapping[str, Value]) -> str:
    """Put the recipe's `template_kwargs` in front of `template`.

    Raises:
        RecipeError: the template reads no variable of that name.
    """
    known = variables_of(template) - _FILLED
    choices = sorted(name for name in known if not name.endswith("_token"))
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, choices, 1)
            reads = ", ".join(choices) or "no variable of its own"
            raise RecipeError(
                f"template_kwargs: {name} is not read by this model's chat template, which reads "
                f"{reads}",
                hint=f"did you mean {near[0]}?" if near else "remove it",
            )
    # `enable_thinking` comes first, where `with_thinking_fixed` looks for it.
    ordered = sorted(values.items(), key=lambda pair: (pair[0] != _THINKING, pair[0]))
    return "".join(default_for(name, value) for name, value in ordered) + template


def with_thinking_fixed(template: str) -> str:
    """Fix the thinking default of a template, so that a request cannot change it.

    llama.cpp, and therefore Ollama, define `enable_thinking` as true in every request.
    """
    for value in (True, False):
        default = default_for(_THINKING, value)
        if template.startswith(default):
            fixed = f"{{% set {_THINKING} = {_literal(value)} %}}"
            return fixed + template.removeprefix(default)
    return template


def prints_today(template: str) -> bool:
    """True if the template writes the date of the day on which it is rendered."""
    return bool(_TODAY.search(template))


def with_date(template: str, date: str) -> str:
    """Write `date` (YYYY-MM-DD) where the template prints the day on which it is rendered."""
    day = datetime.date.fromisoformat(date)
    return _TODAY.sub(lambda found: json.dumps(day.strftime(found[2])), template)


def _literal(value: Value) -> str:
    """A Jinja literal; its strings read the escapes of JSON."""
    return json.dumps(value)
