"""Records count and print; they cannot be changed."""

import dataclasses

import pytest

from lorakit.types import IGNORE, Example, MemoryPlan, Origin


def test_origin_reads_as_file_and_row():
    assert str(Origin("train.jsonl", 17)) == "train.jsonl:17"


def test_trained_tokens_counts_labels():
    example = Example([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4], Origin("x", 1))
    assert example.trained_tokens == 2


def test_plan_sums_its_parts():
    plan = MemoryPlan({"a": 3, "b": 4}, available_bytes=10, fits=True)
    assert plan.total_bytes == 7
    assert plan.as_dict()["total_bytes"] == 7


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Origin("x", 1).row = 2
