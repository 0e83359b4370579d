"""Read YAML without tags and aliases, and within limits of depth and size.

A recipe is a short flat file that people pass on. Ten lines of aliases expand to a billion items,
and a tag requests an arbitrary object; a recipe needs neither. The events of the parser are checked
before values are constructed.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
)

from lorakit.errors import RecipeError

# A recipe with every key takes 4,000 characters; the rest is for a long system prompt.
LONGEST, EVENTS, DEPTH = 2**18, 20_000, 16


class YamlFault(Exception):
    """A fault of a YAML text, with its line (from 1) if known, and a hint."""

    def __init__(self, what: str, line: int | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.line, self.hint = what, line, hint


def read_yaml(text: str, aliases: bool = False) -> Any:
    """Read the value of one YAML document, with the lines of its keys.

    Args:
        aliases: allow anchors and aliases, within limits, for files of other tools.

    Raises:
        YamlFault: not valid YAML, or beyond the limits.
    """
    if len(text) > LONGEST:
        raise YamlFault(f"more than {LONGEST:,} characters; a recipe is a few lines")
    try:
        _refuse_bombs(text, aliases)
        value = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = f"not valid YAML: {error.problem}"
        raise YamlFault(fault, mark.line + 1 if mark else None) from error
    # Invalid dates and numbers raise the errors of Python's own types.
    except (YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise YamlFault(f"not valid YAML: {first[:200]}") from error
    if aliases:
        _refuse_unfolding(value)
    return value


def read_yaml_file(path: Path, hint: str, aliases: bool = False) -> CommentedMap:
    """Read a file of `key: value` lines, with the lines of its keys.

    Args:
        hint: hint of the error if the file does not exist, or does not have such lines.
        aliases: as in `read_yaml`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        with path.open(encoding="utf-8-sig") as handle:
            loaded = read_yaml(handle.read(LONGEST + 1), aliases)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe", hint) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}", "save it as UTF-8 text") from error
    except YamlFault as fault:
        line = f"line {fault.line}: " if fault.line else ""
        hint = fault.hint or "correct the file"
        raise RecipeError(f"{path}: {line}{fault.what}", hint) from fault
    if not isinstance(loaded, CommentedMap):
        shape = "empty" if loaded is None else type(plain(loaded)).__name__
        raise RecipeError(f"{path}: a recipe is a list of `key: value` lines, found {shape}", hint)
    return loaded


def plain(value: Any) -> Any:
    """Convert YAML nodes, paths and tuples to the plain values that strict validation expects."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    for scalar_type in (bool, int, float, str):
        if isinstance(value, scalar_type):
            return scalar_type(value)
    return value


def _refuse_unfolding(value: Any) -> None:
    """Count the values with every alias expanded, as later code will traverse them."""
    count, pending = 0, [(value, 0)]
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > EVENTS:
            raise YamlFault(f"more than {EVENTS:,} values once its aliases are unfolded")
        if depth > DEPTH:  # each alias may be one level deeper than the last
            raise YamlFault(f"nested more than {DEPTH} deep")
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        pending += [(each, depth + 1) for each in inside]


def _refuse_bombs(text: str, aliases: bool) -> None:
    depth = documents = 0
    for count, event in enumerate(YAML(typ="rt", pure=True).parse(text)):
        line = event.start_mark.line + 1
        if not aliases and (isinstance(event, AliasEvent) or getattr(event, "anchor", None)):
            hint = "write the value out in each place"
            raise YamlFault("anchors (&) and aliases (*) are not read", line, hint)
        tag = getattr(event, "tag", None)
        if tag:
            fault = f"tags such as {str(tag)[:60]} are not read"
            raise YamlFault(fault, line, "write the plain value; quote it if it begins with !")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        if documents > 1:
            raise YamlFault("a second document begins", line, "remove what follows ---")
        if depth > DEPTH:
            raise YamlFault(f"nested more than {DEPTH} deep", line)
        if count > EVENTS:
            raise YamlFault(f"more than {EVENTS:,} values; a recipe has a few dozen", line)
