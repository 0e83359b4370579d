"""Patterns of a recipe or an adapter and a model's names enter; nothing leaves, or a fault.

peft matches them by `re`, which knows no limit of time: `(\\w+)+!` on a name of 30 letters takes
longer than the run. So they go over all names in a process of their own first, 20 ms where there
is a pattern at all.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorakit.errors import LorakitError, RecipeError
from lorakit.recipe.schema import Recipe

SECONDS = 1  # of processor time; a pattern that ends takes microseconds a name
WALL_SECONDS = 60  # where a process cannot be given a limit of its own
_PLAIN = re.compile(r"[\w.-]*")
# As peft and `model/param_counts.py` put a setting's patterns to a name.
FORMS = {
    "target_modules": "({})$",
    "exclude_modules": "({})$",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
_CHILD = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
for number, (pattern, form) in enumerate(patterns):
    print(number, flush=True)
    try:
        re.compile(pattern)
        compiled = re.compile(form.replace("{{}}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"is no regular expression: {{error}}")
    for name in names:
        compiled.match(name)
"""


def check_patterns(recipe: Recipe, names: Iterable[str]) -> None:
    """Refuse a recipe one of whose patterns is none, or would not end.

    Raises:
        RecipeError: names the key and the pattern.
    """
    check_settings({key: getattr(recipe, key, None) for key in FORMS}, names, "", RecipeError)


def check_settings(
    settings: Mapping[str, Any], names: Iterable[str], where: str, kind: type[LorakitError]
) -> None:
    """The same for the keys of any mapping, such as adapter_config.json.

    Args:
        names: of all modules that peft will look at.
        where: what precedes the key in the message.
    """
    found = [(key, text) for key in FORMS for text in _patterns(key, settings.get(key))]
    if not found:
        return
    number, trouble = _tried(tuple(found), tuple(names))
    if trouble:
        key, text = found[number]
        raise kind(
            f"{where}{key}: {text[:80]!r} {trouble}",
            hint="list the names instead, such as [q_proj, v_proj], or repeat nothing that repeats "
            r"itself: .*\.(q|v)_proj takes both in every layer",
        )


def _patterns(key: str, value: Any) -> Iterator[str]:
    """The texts of a setting that are patterns, and more than a name."""
    if isinstance(value, str):
        value = [value]
    elif key in ("target_modules", "exclude_modules") or not isinstance(value, list | dict):
        return  # a list of these is compared by its ends
    yield from (text for text in value if isinstance(text, str) and not _PLAIN.fullmatch(text))


@functools.lru_cache(maxsize=32)
def _tried(patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[int, str]:
    """(which one, what is wrong with it), the latter empty where all are well."""
    work = [[(text, FORMS[key]) for key, text in patterns], names]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps(work),
            capture_output=True,
            encoding="utf-8",
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return len(said.split()) - 1, f"was not through after {WALL_SECONDS} s"
    number = len(done.stdout.split()) - 1
    if done.returncode == 0:
        return number, ""
    if done.returncode < 0:
        return number, f"was not through with the model's {len(names):,} names after {SECONDS} s"
    return number, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "cannot be run"
