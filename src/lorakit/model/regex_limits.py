"""Check that the patterns of a recipe or an adapter are valid and match within a time limit.

peft matches them with `re`, which has no timeout: `(\\w+)+!` on a name of 30 letters takes longer
than the run. So a subprocess first matches them against all names, which takes 20 ms; recipes
without patterns skip it.
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

SECONDS = 1  # of processor time; a normal pattern takes microseconds per name
WALL_SECONDS = 60  # if the subprocess cannot set a CPU limit
_PLAIN = re.compile(r"[\w.-]*")
# How peft and `model/param_counts.py` embed each setting's patterns.
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
for index, (pattern, form) in enumerate(patterns):
    print(index, flush=True)
    try:
        re.compile(pattern)
        compiled = re.compile(form.replace("{{}}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"is not a regular expression: {{error}}")
    for name in names:
        compiled.match(name)
"""


def check_patterns(recipe: Recipe, names: Iterable[str]) -> None:
    """Refuse a recipe with a pattern that is not valid or takes too long.

    Raises:
        RecipeError: names the key and the pattern.
    """
    check_settings({key: getattr(recipe, key, None) for key in FORMS}, names, "", RecipeError)


def check_settings(
    settings: Mapping[str, Any], names: Iterable[str], where: str, kind: type[LorakitError]
) -> None:
    """Refuse such patterns in any mapping, such as adapter_config.json.

    Args:
        names: names of all modules that peft will match.
        where: prefix of the key in the message.
        kind: class of the exception to raise.
    """
    patterns = [(key, text) for key in FORMS for text in _patterns(key, settings.get(key))]
    if not patterns:
        return
    index, fault = _match_in_subprocess(tuple(patterns), tuple(names))
    if fault:
        key, text = patterns[index]
        raise kind(
            f"{where}{key}: {text[:80]!r} {fault}",
            hint="list the names instead, such as [q_proj, v_proj], or avoid nested repetition: "
            r".*\.(q|v)_proj matches both in every layer",
        )


def _patterns(key: str, value: Any) -> Iterator[str]:
    """Yield the strings of a setting that are patterns rather than plain names."""
    if isinstance(value, str):
        value = [value]
    elif key in ("target_modules", "exclude_modules") or not isinstance(value, list | dict):
        return  # peft compares lists of these by suffix
    yield from (text for text in value if isinstance(text, str) and not _PLAIN.fullmatch(text))


@functools.lru_cache(maxsize=32)
def _match_in_subprocess(
    patterns: tuple[tuple[str, str], ...], names: tuple[str, ...]
) -> tuple[int, str]:
    """Match all names in a subprocess; return (pattern index, fault), an empty fault if fine."""
    request = [[(text, FORMS[key]) for key, text in patterns], names]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        return len(printed.split()) - 1, f"did not finish within {WALL_SECONDS} s"
    index = len(done.stdout.split()) - 1
    if done.returncode == 0:
        return index, ""
    if done.returncode < 0:
        return index, f"did not finish on the model's {len(names):,} names within {SECONDS} s"
    return index, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "cannot be run"
