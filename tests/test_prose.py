"""The words of docstrings, comments and messages: the field's terms, and plain sentences."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lorakit"
# Code, tables and page templates; the chat templates in `assets` are those of models.
FILES = sorted(p for s in ("py", "yaml", "html.jinja") for p in PACKAGE.rglob(f"*.{s}"))

# Patterns, each with the number of them that 10,000 words may have.
MENDED = r"\b(mend(s|ed)?|holes?|wish(es)?|baton|shel(f|ves)|anew|beside)\b"
PATTERNS = {
    "enters / leaves (name inputs and outputs under Args and Returns)": r"\b(enters?|leaves)\b",
    "told, tells, say, said (name who prints or reports)": r"\b(told|tells?|says?|said)\b",
    "lies, stands (for is)": r"\b(lies?|stands?)\b",
    "is none, is no (write is not)": r"(?<![Tt]here )\b(is|are) (none|no(?! longer))\b",
    "an opening What, That or Where clause": r"(?:^|[.:!?]\s+)(What|That|Where) [a-z]",
    "so many, by turns, of its own accord": r"\b(so many|by turns|of its own accord)\b",
    "mend, hole, wish, baton, shelf, anew": MENDED,
    "card (write GPU)": r"\b(?<!model )cards?\b",
    "whole (write complete, or intact)": r"\bwhole\b(?! number)",
    "foreign, heard, habit, spread": r"\b(foreign|heard|habits?|spread)\b",
}
MOST = 3


def texts_of(path):
    """Docstrings, comments and string constants of at least two words; lines of other files."""
    source = path.read_text()
    if path.suffix != ".py":
        yield from source.splitlines()
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string[1:]


def counted(paths):
    """(words, matches of each pattern) over `paths`."""
    words, found = 0, {name: [] for name in PATTERNS}
    for path in paths:
        for text in texts_of(path):
            words += len(re.findall(r"\w+", text))
            for name, pattern in PATTERNS.items():
                for match in re.finditer(
                    pattern, text, 0 if "What" in name or "none" in name else re.IGNORECASE
                ):
                    around = text[max(0, match.start() - 30) : match.end() + 30]
                    found[name].append(f"{path.relative_to(PACKAGE)}: {around!r}")
    return words, found


@pytest.mark.parametrize("name", PATTERNS)
def test_words_that_only_we_use_are_rare(name):
    words, found = counted(FILES)
    allowed = MOST * words / 10_000
    assert len(found[name]) <= allowed, "\n".join(found[name][:40])


def test_docstrings_open_with_one_clause():
    """A first line that ends: it fits a list of functions."""
    bad = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node)
                if doc and re.match(r"What |That |Where |Whether |Nothing ", doc):
                    bad.append(f"{path.relative_to(PACKAGE)}: {doc.splitlines()[0]}")
    assert not bad, "\n".join(bad[:40])
