"""The guide's examples go through the real reader, its recipes parse, and it knows every fault."""

import ast
import re
from pathlib import Path

import pytest

from lorakit.data.formats.row_formats import FORMATS, guess_format, to_conversation
from lorakit.data.issues import IssueLog, check_turns
from lorakit.data.sources.readers import read_rows
from lorakit.data.tokenize.encode import encode
from lorakit.recipe.loader import load_recipe
from lorakit.types import Conversation

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "your_own_data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
ROWS = [(kind, name, text) for kind, name, text in BLOCKS if name]
MAKERS = {"RowError", "FatalRowError", "fault", "add", "_add"}


@pytest.mark.parametrize(("kind", "name", "text"), ROWS)
def test_each_example_is_read_as_what_the_guide_says(tmp_path, kind, name, text):
    path = tmp_path / f"rows.{kind}"
    path.write_text(text, encoding="utf-8")
    rows = list(read_rows(str(path)))
    guess = guess_format(rows)
    assert guess.name == name
    assert {str(key) for row in rows for key in row.values} <= set(guess.used)
    for row in rows:
        item, log = to_conversation(row, guess, None), IssueLog()
        if isinstance(item, Conversation):
            assert check_turns(item, log) == item
        assert log.faults() == ()


def test_all_formats_but_one_have_an_example():
    assert {f.name for f in FORMATS} - {name for _, name, _ in ROWS} == {"prompt/response"}


def test_tool_examples_can_be_trained_with_a_template_that_writes_tools(
    tmp_path, family, trained_runs
):
    found, qwen3 = [], family("qwen3")
    for kind, _, text in ROWS:
        if "tools" in text:
            path = tmp_path / f"rows.{kind}"
            path.write_text(text, encoding="utf-8")
            rows = list(read_rows(str(path)))
            item = to_conversation(rows[0], guess_format(rows), None)
            found.append(trained_runs(qwen3, encode(qwen3, item)))
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0][-1] == "It is 21 degrees.<|im_end|>"


@pytest.mark.parametrize("text", [text for kind, _, text in BLOCKS if kind == "yaml"])
def test_each_recipe_line_is_a_recipe(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: demo\n" + ("" if "data:" in text else "data: demo\n") + text)
    load_recipe(recipe)


def test_keys_and_values_named_in_the_guide_exist():
    named = [pair for pair in re.findall(r"`(\w+): (\w+)`", GUIDE) if pair[0] != "train"]
    assert ("strict", "true") in named
    for key, value in named:
        load_recipe(None, [f"{key}={value}"], {"model": "demo", "data": "demo"})


def kinds():
    """The first text of every call that makes a fault."""
    for path in sorted((ROOT / "src" / "lorakit" / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            kind = node.args[name == "_add"]
            if name in MAKERS and isinstance(kind, ast.Constant) and isinstance(kind.value, str):
                yield kind.value


def test_every_fault_is_explained():
    found = set(kinds())
    assert {"too long", "no trained answer", "two BOS tokens"} <= found
    table = GUIDE[GUIDE.index("## What each fault means") :].replace("\\|", "|")
    assert [kind for kind in sorted(found) if kind.split(" (\ufffd")[0] not in table] == []
