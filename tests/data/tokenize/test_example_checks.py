"""Examples that would spoil a run are refused with the row named, whatever made them."""

import pytest

from lorakit.data.tokenize.encode import encode
from lorakit.data.tokenize.example_checks import verify_example
from lorakit.errors import DataError
from lorakit.types import IGNORE, Example


def sabotage(example, ids=None, labels=None):
    return Example(ids or example.input_ids, labels or example.labels, example.origin)


def test_verify_refuses_masked_unclosed_and_doubled_examples(smollm, chat):
    (good,) = encode(smollm, chat("a?", "one"))
    verify_example(smollm, good)
    masked = sabotage(good, labels=[IGNORE] * len(good.labels))
    with pytest.raises(DataError, match=r"rows.jsonl:7: no token of this row would be trained"):
        verify_example(smollm, masked)
    unclosed = sabotage(good, labels=[*good.labels[:-1], IGNORE])
    with pytest.raises(DataError, match=r"rows.jsonl:7: a trained part ends with 'one'"):
        verify_example(smollm, unclosed)
    doubled = sabotage(good, [1, *good.input_ids], [IGNORE, *good.labels])
    with pytest.raises(DataError, match=r"rows.jsonl:7: it begins with two BOS"):
        verify_example(smollm, doubled)
