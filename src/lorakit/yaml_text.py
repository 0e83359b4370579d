"""YAML text enters; its values leave, read within bounds: no tags, no aliases, no depth, no bulk.

A recipe is a short flat file that people pass on. Ten lines of aliases unfold to a billion items,
and a tag asks for an object of the reader's choice; a recipe needs neither. The events of the
parser are looked at before a value is made of them.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
)

# The longest recipe of every key takes 4,000 characters; the rest is room for a system prompt.
LONGEST, EVENTS, DEPTH = 2**18, 20_000, 16


class YamlFault(Exception):
    """What is wrong, its line (from 1) where one can be named, and what to do."""

    def __init__(self, what: str, line: int | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.line, self.hint = what, line, hint


def read_yaml(text: str) -> Any:
    """The value of one YAML document, with the lines of its keys.

    Raises:
        YamlFault: no YAML, or more than a recipe needs of it.
    """
    if len(text) > LONGEST:
        raise YamlFault(f"more than {LONGEST:,} characters; a recipe is a few lines")
    try:
        _refuse_bombs(text)
        return YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML: {error.problem}"
        raise YamlFault(what, mark.line + 1 if mark else None) from error
    # Dates and numbers that are none raise what Python's own types do.
    except (YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise YamlFault(f"not valid YAML: {first[:200]}") from error


def _refuse_bombs(text: str) -> None:
    depth = documents = 0
    for count, event in enumerate(YAML(typ="rt", pure=True).parse(text)):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            hint = "write the value out where it is meant"
            raise YamlFault("anchors (&) and aliases (*) are not read", line, hint)
        tag = getattr(event, "tag", None)
        if tag:
            what = f"tags such as {str(tag)[:60]} are not read"
            raise YamlFault(what, line, "write the plain value; quote it if it begins with !")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        if documents > 1:
            raise YamlFault("a second document begins", line, "remove what follows ---")
        if depth > DEPTH:
            raise YamlFault(f"nested more than {DEPTH} deep", line)
        if count > EVENTS:
            raise YamlFault(f"more than {EVENTS:,} values; a recipe has a few dozen", line)
