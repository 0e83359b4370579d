"""The table of silent failures is whole and points at checks and tests that are there."""

import ast
import json
from pathlib import Path

import pytest
from tests.silent_failures import CLASSES

ROOT = Path(__file__).parents[1]


def test_there_are_26_ways_each_named_once():
    assert len({c.name for c in CLASSES}) == len(CLASSES) == 26


def test_each_check_was_seen_to_turn_its_test_red():
    path = ROOT / "benchmarks" / "results" / "silent_failures.json"
    rows = json.loads(path.read_text())["rows"]
    assert [row["class"] for row in rows] == [c.name for c in CLASSES]
    assert all(row["green_with"] and row["red_without"] for row in rows)


@pytest.mark.parametrize("one", CLASSES, ids=lambda c: c.name)
def test_the_check_and_its_test_are_there(one):
    path, _, name = one.test.partition("::")
    defined = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(n, "name")}
    assert name.partition("[")[0] in defined
    source = (ROOT / "src" / "lorakit" / one.file).read_text()
    assert source.count(one.check) == 1, f"{one.file}: {one.check!r}"
    ast.parse(source.replace(one.check, one.without))
